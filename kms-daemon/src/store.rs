//! RocksDB as a store of sealed rows: nothing reaches it in the clear, and no row can be swapped, moved, put back or
//! left out unnoticed. docs/kms-format.md gives the bytes.

use crate::slot::RootSlot;
use kms_crypto::{
    CryptoError, KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Prf, Sealer, SecretKey, TAG_LEN, Tag, derive,
};
use parking_lot::{RwLock, RwLockReadGuard};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode,
    Direction, IteratorMode, Options, WriteBatch, WriteOptions,
};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use zeroize::Zeroizing;

const FORMAT: u8 = 1;
const BLOCK_CACHE_BYTES: usize = 8 << 20;
const WRITE_BUFFER_BYTES: usize = 4 << 20;
const WAL_BYTES_MAX: u64 = 16 << 20;

/// Why a row cannot be had or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// RocksDB failed.
    #[error("the key store's database failed: {0}")]
    Database(#[from] rocksdb::Error),
    /// A row is not what was written, or a family is missing.
    #[error("a row of the family '{0}' is damaged, or is another's")]
    Damaged(&'static str),
    /// It could not be opened again after a failure.
    #[error("the key store's database is closed after a failure; there may be no room for it")]
    Closed,
    /// The rows are not those that the manifest was written with.
    #[error("rows were put back, taken away or added behind the daemon's back")]
    RowSet,
    /// A primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

/// A column family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// The keystore as a whole.
    Manifest,
    /// Metadata of CMKs.
    Keys,
    /// Material of CMK versions.
    Material,
    /// Aliases.
    Aliases,
    /// Audit records of changes that may not have reached the log.
    PendingAudit,
    /// Who holds data keys.
    Holders,
}

impl Table {
    const ALL: [Self; 6] = [
        Self::Manifest,
        Self::Keys,
        Self::Material,
        Self::Aliases,
        Self::PendingAudit,
        Self::Holders,
    ];

    /// The tables whose every row the manifest answers for.
    const COUNTED: [Self; 3] = [Self::Keys, Self::Material, Self::Aliases];

    const fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Keys => "keys",
            Self::Material => "material",
            Self::Aliases => "aliases",
            Self::PendingAudit => "pending_audit",
            Self::Holders => "holders",
        }
    }
}

/// The XOR of a keyed hash of every counted row. It is stored sealed, so that nobody can look for rows that cancel out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowSet(pub [u8; 32]);

impl RowSet {
    /// Adds a row that was not there, or takes one away that was.
    pub fn toggle(&mut self, other: Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine ^= theirs;
        }
    }
}

/// A row's key, without the epoch, and its opened value.
pub type Row = (Vec<u8>, Zeroizing<Vec<u8>>);

/// The sealed rows of one epoch.
pub struct Store {
    /// None between a failure and the next attempt to open it again.
    db: RwLock<Option<DB>>,
    path: PathBuf,
    keystore_id: Uuid,
    epoch: u64,
    metadata: Sealer,
    material: Sealer,
    names: Prf,
    row_set: Prf,
    nonces: NonceSource,
}

impl Store {
    /// Opens the database, and makes it first if `create`.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn open(
        path: &Path,
        slot: &dyn RootSlot,
        root: &SecretKey,
        create: bool,
    ) -> Result<Self, StoreError> {
        let keystore_id = slot.keystore_id();
        let key = |label| derive(root, KeySalt(keystore_id.as_bytes()), label);
        Ok(Self {
            db: RwLock::new(Some(open_database(path, create)?)),
            path: path.to_owned(),
            keystore_id,
            epoch: slot.epoch(),
            metadata: Sealer::new(key(Label::KeystoreMetadata)),
            material: Sealer::new(key(Label::KeystoreMaterial)),
            names: Prf::new(key(Label::KeystoreNames)),
            row_set: Prf::new(key(Label::KeystoreRowSet)),
            nonces: NonceSource::new()?,
        })
    }

    /// The keystore that the rows belong to.
    #[must_use]
    pub fn keystore_id(&self) -> Uuid {
        self.keystore_id
    }

    /// The epoch that the rows belong to.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A row key that says nothing about `name` to whoever lacks the root key.
    #[must_use]
    pub fn hidden_name(&self, name: &str) -> Vec<u8> {
        self.names.of(&[name.as_bytes()]).to_vec()
    }

    /// One row, opened.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if it is not what was written there.
    pub fn get(&self, table: Table, key: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        let full = self.full_key(key);
        let db = self.database();
        let db = db.as_ref().ok_or(StoreError::Closed)?;
        let value = db.get_pinned_cf(family(db, table)?, &full)?;
        value.map(|value| self.unseal(table, &full, &value)).transpose()
    }

    /// Every row of this epoch in a table, opened, in the order of the keys.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if any is not what was written there.
    pub fn scan(&self, table: Table) -> Result<Vec<Row>, StoreError> {
        let mut rows = Vec::new();
        self.each_row(table, |full, value| {
            let plain = self.unseal(table, full, value)?;
            rows.push((full.get(8..).unwrap_or_default().to_vec(), plain));
            Ok(())
        })?;
        Ok(rows)
    }

    /// What the counted rows add up to now.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn measure(&self) -> Result<RowSet, StoreError> {
        let mut set = RowSet::default();
        for table in Table::COUNTED {
            self.each_row(table, |full, value| {
                set.toggle(self.element(table, full, value));
                Ok(())
            })?;
        }
        Ok(set)
    }

    /// Begins a batch.
    #[must_use]
    pub fn begin(&self) -> Change<'_> {
        Change {
            store: self,
            batch: WriteBatch::default(),
            delta: RowSet::default(),
        }
    }

    /// Opens the database anew: RocksDB refuses every write after one has failed, even when there is room again.
    ///
    /// # Errors
    /// [`StoreError::Database`]; the store is closed then, and may be opened by another attempt.
    pub fn reopen(&self) -> Result<(), StoreError> {
        let mut db = self.db.write();
        // It holds a lock on its directory.
        drop(db.take());
        *db = Some(open_database(&self.path, false)?);
        Ok(())
    }

    /// Closes the database until [`Self::reopen`].
    pub fn close(&self) {
        drop(self.db.write().take());
    }

    /// Whether it could not be opened again after a failure.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.database().is_none()
    }

    fn database(&self) -> RwLockReadGuard<'_, Option<DB>> {
        // Recursive: a change that is being made reads the rows it replaces.
        self.db.read_recursive()
    }

    fn each_row(
        &self,
        table: Table,
        mut show: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let prefix = self.epoch.to_be_bytes();
        let db = self.database();
        let db = db.as_ref().ok_or(StoreError::Closed)?;
        let rows = db.iterator_cf(
            family(db, table)?,
            IteratorMode::From(&prefix, Direction::Forward),
        );
        for row in rows {
            let (key, value) = row?;
            if !key.starts_with(&prefix) {
                break;
            }
            show(&key, &value)?;
        }
        Ok(())
    }

    fn seal(&self, table: Table, full_key: &[u8], plain: &[u8]) -> Result<Vec<u8>, StoreError> {
        let nonce = self.nonces.next()?;
        let mut value = Vec::with_capacity(1 + NONCE_LEN + plain.len() + TAG_LEN);
        value.push(FORMAT);
        value.extend_from_slice(&nonce.0);
        let mut text = Zeroizing::new(plain.to_vec());
        let tag = self
            .sealer(table)
            .seal(nonce, &self.aad(table, full_key), &mut text)?;
        value.extend_from_slice(&text);
        value.extend_from_slice(&tag.0);
        Ok(value)
    }

    fn unseal(&self, table: Table, full_key: &[u8], value: &[u8]) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        let damaged = || StoreError::Damaged(table.name());
        let (&[FORMAT], rest) = value.split_first_chunk::<1>().ok_or_else(damaged)? else {
            return Err(damaged());
        };
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(damaged)?;
        let (text, tag) = rest.split_last_chunk::<TAG_LEN>().ok_or_else(damaged)?;
        let mut plain = Zeroizing::new(text.to_vec());
        self.sealer(table)
            .open(Nonce(*nonce), &self.aad(table, full_key), &mut plain, Tag(*tag))
            .map_err(|_| damaged())?;
        Ok(plain)
    }

    fn sealer(&self, table: Table) -> &Sealer {
        match table {
            Table::Material => &self.material,
            Table::Manifest | Table::Keys | Table::Aliases | Table::PendingAudit | Table::Holders => {
                &self.metadata
            }
        }
    }

    fn aad(&self, table: Table, full_key: &[u8]) -> Vec<u8> {
        length_prefixed(&[self.keystore_id.as_bytes(), table.name().as_bytes(), full_key])
    }

    fn element(&self, table: Table, full_key: &[u8], value: &[u8]) -> RowSet {
        RowSet(
            self.row_set
                .of(&[&length_prefixed(&[table.name().as_bytes(), full_key, value])]),
        )
    }

    fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [&self.epoch.to_be_bytes(), key].concat()
    }
}

/// Rows that are written together or not at all. A row may be named once only.
pub struct Change<'a> {
    store: &'a Store,
    batch: WriteBatch,
    delta: RowSet,
}

impl Change<'_> {
    /// Writes a row, in place of what was there.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn put(&mut self, table: Table, key: &[u8], plain: &[u8]) -> Result<(), StoreError> {
        let full = self.store.full_key(key);
        let value = self.store.seal(table, &full, plain)?;
        self.forget(table, &full)?;
        if Table::COUNTED.contains(&table) {
            self.delta.toggle(self.store.element(table, &full, &value));
        }
        let db = self.store.database();
        let db = db.as_ref().ok_or(StoreError::Closed)?;
        self.batch.put_cf(family(db, table)?, &full, value);
        Ok(())
    }

    /// Removes a row.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn delete(&mut self, table: Table, key: &[u8]) -> Result<(), StoreError> {
        let full = self.store.full_key(key);
        self.forget(table, &full)?;
        let db = self.store.database();
        let db = db.as_ref().ok_or(StoreError::Closed)?;
        self.batch.delete_cf(family(db, table)?, &full);
        Ok(())
    }

    /// How the counted rows' sum moves with this batch.
    #[must_use]
    pub fn delta(&self) -> RowSet {
        self.delta
    }

    /// Writes the batch; durable when this returns if `sync`. It may be written again, which changes nothing more.
    ///
    /// # Errors
    /// [`StoreError::Database`]; RocksDB then refuses every further write until [`Store::reopen`].
    pub fn commit(&self, sync: bool) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        let db = self.store.database();
        let db = db.as_ref().ok_or(StoreError::Closed)?;
        Ok(db.write_opt(WriteBatch::from_data(self.batch.data()), &options)?)
    }

    fn forget(&mut self, table: Table, full_key: &[u8]) -> Result<(), StoreError> {
        if !Table::COUNTED.contains(&table) {
            return Ok(());
        }
        let db = self.store.database();
        let db = db.as_ref().ok_or(StoreError::Closed)?;
        if let Some(old) = db.get_pinned_cf(family(db, table)?, full_key)? {
            self.delta.toggle(self.store.element(table, full_key, &old));
        }
        Ok(())
    }
}

/// Each field behind its length, so that no two lists of fields share a byte string.
pub(crate) fn length_prefixed(fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(fields.iter().map(|field| field.len() + 4).sum());
    for field in fields {
        // No field comes near 4 GiB: messages and rows are bounded by 8 MiB.
        let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(field);
    }
    bytes
}

fn family(db: &DB, table: Table) -> Result<&ColumnFamily, StoreError> {
    db.cf_handle(table.name())
        .ok_or(StoreError::Damaged(table.name()))
}

fn open_database(path: &Path, create: bool) -> Result<DB, rocksdb::Error> {
    let families = Table::ALL.map(|table| ColumnFamilyDescriptor::new(table.name(), family_options()));
    let mut options = Options::default();
    options.create_if_missing(create);
    // A keystore of an earlier version lacks the later families.
    options.create_missing_column_families(true);
    options.set_error_if_exists(create);
    // What was acknowledged is whole in the log; a torn end is what was not.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_keep_log_file_num(2);
    options.set_stats_dump_period_sec(0);
    options.set_max_open_files(64);
    DB::open_cf_descriptors(&options, path, families)
}

fn family_options() -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    // Sealed bytes do not compress.
    options.set_compression_type(DBCompressionType::None);
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::{FileRootSlot, SlotError};

    fn open(home: &Path, create: bool) -> Store {
        let root = SecretKey::fill_with(|_| Ok::<(), SlotError>(())).unwrap();
        let path = home.join("slot-1");
        let slot = if create {
            FileRootSlot::create(&path, Uuid::from_bytes([1; 16]), 1, &root).unwrap()
        } else {
            FileRootSlot::open(&path, 1).unwrap()
        };
        Store::open(&home.join("db"), &slot, &root, create).unwrap()
    }

    fn raw_get(store: &Store, table: Table, key: &[u8]) -> Vec<u8> {
        let db = store.database();
        let db = db.as_ref().unwrap();
        let value = db.get_cf(family(db, table).unwrap(), store.full_key(key));
        value.unwrap().unwrap()
    }

    fn raw_put(store: &Store, table: Table, key: &[u8], value: &[u8]) {
        let db = store.database();
        let db = db.as_ref().unwrap();
        db.put_cf(family(db, table).unwrap(), store.full_key(key), value)
            .unwrap();
    }

    #[test]
    fn a_row_moved_to_another_key_or_family_is_damaged() {
        let home = tempfile::tempdir().unwrap();
        let store = open(home.path(), true);
        let mut change = store.begin();
        change.put(Table::Keys, b"a", b"row").unwrap();
        change.commit(true).unwrap();
        assert_eq!(store.get(Table::Keys, b"a").unwrap().unwrap().as_slice(), b"row");
        for to in [(Table::Keys, b"b".as_slice()), (Table::Aliases, b"a")] {
            raw_put(&store, to.0, to.1, &raw_get(&store, Table::Keys, b"a"));
            assert!(matches!(store.get(to.0, to.1), Err(StoreError::Damaged(_))));
        }
    }

    #[test]
    fn the_row_set_follows_every_change_and_sees_a_row_put_back() {
        let home = tempfile::tempdir().unwrap();
        let store = open(home.path(), true);
        let mut kept = store.measure().unwrap();
        assert_eq!(kept, RowSet::default());
        let mut step = |change: Change<'_>| {
            kept.toggle(change.delta());
            change.commit(true).unwrap();
            assert_eq!(store.measure().unwrap(), kept);
        };
        let mut change = store.begin();
        change.put(Table::Keys, b"a", b"enabled").unwrap();
        change.put(Table::Material, b"a", b"material").unwrap();
        change.put(Table::Manifest, b"m", b"not counted").unwrap();
        step(change);
        let old = raw_get(&store, Table::Keys, b"a");
        let mut change = store.begin();
        change.put(Table::Keys, b"a", b"disabled").unwrap();
        step(change);
        let mut change = store.begin();
        change.delete(Table::Material, b"a").unwrap();
        step(change);

        raw_put(&store, Table::Keys, b"a", &old);
        assert_eq!(
            store.get(Table::Keys, b"a").unwrap().unwrap().as_slice(),
            b"enabled"
        );
        assert_ne!(store.measure().unwrap(), kept);
    }

    #[test]
    fn rows_outlive_the_process() {
        let home = tempfile::tempdir().unwrap();
        let store = open(home.path(), true);
        let mut change = store.begin();
        change.put(Table::Keys, b"a", b"row").unwrap();
        change.commit(true).unwrap();
        drop(store);
        assert_eq!(open(home.path(), false).scan(Table::Keys).unwrap().len(), 1);
    }
}
