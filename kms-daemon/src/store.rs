//! RocksDB as a store of sealed rows: nothing reaches it in the clear, and no row can be swapped, moved, put back or
//! left out unnoticed. docs/kms-format.md gives the bytes.

use crate::epoch::EpochKeys;
use kms_crypto::CryptoError;
use parking_lot::{RwLock, RwLockReadGuard};
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor,
    CompactOptions, DB, DBCompressionType, DBRecoveryMode, Direction, IteratorMode, Options, WriteBatch,
    WriteOptions,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use zeroize::Zeroizing;

/// Behind every key of every epoch.
const LAST_KEY: [u8; 9] = [0xff; 9];
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
    /// Nobody knows which epoch the disk selects.
    #[error("the key store is closed until kmsd is started anew: its root slot may or may not have changed")]
    Abandoned,
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
    /// Volumes and key domains that are encrypted under CMKs.
    Dependants,
    /// How far key domains of volumes have come.
    Anchors,
}

impl Table {
    /// Every table.
    pub const ALL: [Self; 8] = [
        Self::Manifest,
        Self::Keys,
        Self::Material,
        Self::Aliases,
        Self::PendingAudit,
        Self::Holders,
        Self::Dependants,
        Self::Anchors,
    ];

    /// The tables whose every row the manifest answers for.
    const COUNTED: [Self; 4] = [Self::Keys, Self::Material, Self::Aliases, Self::Anchors];

    /// The column family's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Keys => "keys",
            Self::Material => "material",
            Self::Aliases => "aliases",
            Self::PendingAudit => "pending_audit",
            Self::Holders => "holders",
            Self::Dependants => "dependants",
            Self::Anchors => "anchors",
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

/// The sealed rows of one epoch. Other epochs' rows may lie beside them while the keystore moves from one to the next.
pub struct Store {
    state: RwLock<State>,
    path: PathBuf,
}

struct State {
    /// None between a failure and the next attempt to open it again.
    db: Option<DB>,
    keys: Arc<EpochKeys>,
    /// It is not to be opened again by this process.
    abandoned: bool,
}

impl State {
    fn db(&self) -> Result<&DB, StoreError> {
        match &self.db {
            Some(db) => Ok(db),
            None if self.abandoned => Err(StoreError::Abandoned),
            None => Err(StoreError::Closed),
        }
    }
}

impl Store {
    /// Opens the database, and makes it first if `create`.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn open(path: &Path, keys: EpochKeys, create: bool) -> Result<Self, StoreError> {
        Ok(Self {
            state: RwLock::new(State {
                db: Some(open_database(path, create)?),
                keys: Arc::new(keys),
                abandoned: false,
            }),
            path: path.to_owned(),
        })
    }

    /// The keystore that the rows belong to.
    #[must_use]
    pub fn keystore_id(&self) -> Uuid {
        self.state().keys.keystore_id()
    }

    /// The epoch that the rows belong to.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.state().keys.epoch()
    }

    /// One row, opened.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if it is not what was written there.
    pub fn get(&self, table: Table, key: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        let state = self.state();
        let full = state.keys.full_key(key);
        let db = state.db()?;
        let value = db.get_pinned_cf(family(db, table)?, &full)?;
        value
            .map(|value| state.keys.unseal(table, &full, &value))
            .transpose()
    }

    /// Every row of this epoch in a table, opened, in the order of the keys.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if any is not what was written there.
    pub fn scan(&self, table: Table) -> Result<Vec<Row>, StoreError> {
        self.scan_with(&self.state().keys, table)
    }

    /// The same of the epoch that `keys` belong to.
    ///
    /// # Errors
    /// [`StoreError::Damaged`]
    pub fn scan_with(&self, keys: &EpochKeys, table: Table) -> Result<Vec<Row>, StoreError> {
        self.rows_below(keys, table, &[])
    }

    /// Every row of this epoch in a table whose key begins with `prefix`, opened, in the order of the keys.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if any is not what was written there.
    pub fn scan_below(&self, table: Table, prefix: &[u8]) -> Result<Vec<Row>, StoreError> {
        self.rows_below(&self.state().keys, table, prefix)
    }

    /// How many they are. None is opened.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn count_below(&self, table: Table, prefix: &[u8]) -> Result<usize, StoreError> {
        let mut count = 0;
        self.each_row(&self.state().keys, table, prefix, |_, _| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    fn rows_below(&self, keys: &EpochKeys, table: Table, prefix: &[u8]) -> Result<Vec<Row>, StoreError> {
        let mut rows = Vec::new();
        self.each_row(keys, table, prefix, |full, value| {
            let plain = keys.unseal(table, full, value)?;
            rows.push((EpochKeys::short_key(full).to_vec(), plain));
            Ok(())
        })?;
        Ok(rows)
    }

    /// What the counted rows add up to now.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn measure(&self) -> Result<RowSet, StoreError> {
        self.measure_with(&self.state().keys)
    }

    /// The same of the epoch that `keys` belong to.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn measure_with(&self, keys: &EpochKeys) -> Result<RowSet, StoreError> {
        let mut set = RowSet::default();
        for table in Table::COUNTED {
            self.each_row(keys, table, &[], |full, value| {
                set.toggle(keys.element(table, full, value));
                Ok(())
            })?;
        }
        Ok(set)
    }

    /// Begins a batch. It must be committed before the store goes to another epoch, or not at all.
    #[must_use]
    pub fn begin(&self) -> Change<'_> {
        self.begin_with(Arc::clone(&self.state().keys))
    }

    /// Begins a batch of rows of the epoch that `keys` belong to.
    #[must_use]
    pub fn begin_with(&self, keys: Arc<EpochKeys>) -> Change<'_> {
        Change {
            store: self,
            keys,
            batch: WriteBatch::default(),
            delta: RowSet::default(),
        }
    }

    /// Goes to the epoch that `keys` belong to, whose rows are written. The keys of the epoch before are wiped when the
    /// last change that was begun in it is gone.
    pub fn adopt(&self, keys: Arc<EpochKeys>) {
        self.state.write().keys = keys;
    }

    /// The epochs that have a row of this key in a table. Needs no key of them.
    ///
    /// # Errors
    /// [`StoreError::Database`]
    pub fn epochs_with(&self, table: Table, key: &[u8]) -> Result<BTreeSet<u64>, StoreError> {
        let state = self.state();
        let db = state.db()?;
        let mut epochs = BTreeSet::new();
        for row in db.iterator_cf(family(db, table)?, IteratorMode::Start) {
            let (full, _) = row?;
            if let Some((epoch, rest)) = full.split_first_chunk::<8>()
                && rest == key
            {
                epochs.insert(u64::from_be_bytes(*epoch));
            }
        }
        Ok(epochs)
    }

    /// Removes the rows of every other epoch, from the database's files, too. Nothing is written if there are none.
    ///
    /// # Errors
    /// [`StoreError::Database`]; it may be called again.
    pub fn drop_other_epochs(&self) -> Result<(), StoreError> {
        let state = self.state();
        let db = state.db()?;
        let epoch = state.keys.epoch();
        let (own, behind) = (state.keys.prefix(), epoch.saturating_add(1).to_be_bytes());
        let mut batch = WriteBatch::default();
        let mut found = false;
        for table in Table::ALL {
            let family = family(db, table)?;
            for row in db.iterator_cf(family, IteratorMode::Start).take(1) {
                found |= !row?.0.starts_with(&own);
            }
            let from = IteratorMode::From(&behind, Direction::Forward);
            for row in db.iterator_cf(family, from).take(1) {
                row?;
                found = true;
            }
            batch.delete_range_cf(family, [].as_slice(), own.as_slice());
            batch.delete_range_cf(family, behind.as_slice(), LAST_KEY.as_slice());
        }
        if !found {
            return Ok(());
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        db.write_opt(batch, &options)?;
        let mut compaction = CompactOptions::default();
        // Files of the last level, too, would keep what their ranges cover.
        compaction.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for table in Table::ALL {
            let family = family(db, table)?;
            // The log goes when nothing in it is needed.
            db.flush_cf(family)?;
            db.compact_range_cf_opt(family, None::<&[u8]>, None::<&[u8]>, &compaction);
        }
        Ok(())
    }

    /// Opens the database anew: RocksDB refuses every write after one has failed, even when there is room again.
    ///
    /// # Errors
    /// [`StoreError::Database`]; the store is closed then, and may be opened by another attempt.
    pub fn reopen(&self) -> Result<(), StoreError> {
        let mut state = self.state.write();
        if state.abandoned {
            return Err(StoreError::Abandoned);
        }
        // It holds a lock on its directory.
        drop(state.db.take());
        state.db = Some(open_database(&self.path, false)?);
        Ok(())
    }

    /// Closes the database until [`Self::reopen`].
    pub fn close(&self) {
        drop(self.state.write().db.take());
    }

    /// Closes the database for as long as this process runs.
    pub fn abandon(&self) {
        let mut state = self.state.write();
        drop(state.db.take());
        state.abandoned = true;
    }

    /// Whether it could not be opened again after a failure.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state().db.is_none()
    }

    /// A row's value as it lies in the database.
    #[cfg(test)]
    pub(crate) fn raw(&self, table: Table, key: &[u8]) -> Vec<u8> {
        let state = self.state();
        let db = state.db().unwrap();
        let value = db.get_cf(family(db, table).unwrap(), state.keys.full_key(key));
        value.unwrap().unwrap()
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        // Recursive: a change that is being made reads the rows it replaces.
        self.state.read_recursive()
    }

    fn each_row(
        &self,
        keys: &EpochKeys,
        table: Table,
        below: &[u8],
        mut show: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let prefix = keys.full_key(below);
        let state = self.state();
        let db = state.db()?;
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
}

/// Rows that are written together or not at all. A row may be named once only.
pub struct Change<'a> {
    store: &'a Store,
    keys: Arc<EpochKeys>,
    batch: WriteBatch,
    delta: RowSet,
}

impl Change<'_> {
    /// A row key that says nothing about `name` to whoever lacks the root key.
    #[must_use]
    pub fn hidden_name(&self, name: &str) -> Vec<u8> {
        self.keys.hidden_name(name)
    }

    /// Writes a row, in place of what was there.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn put(&mut self, table: Table, key: &[u8], plain: &[u8]) -> Result<(), StoreError> {
        let full = self.keys.full_key(key);
        let value = self.keys.seal(table, &full, plain)?;
        self.forget(table, &full)?;
        if Table::COUNTED.contains(&table) {
            self.delta.toggle(self.keys.element(table, &full, &value));
        }
        let state = self.store.state();
        self.batch.put_cf(family(state.db()?, table)?, &full, value);
        Ok(())
    }

    /// Removes a row.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn delete(&mut self, table: Table, key: &[u8]) -> Result<(), StoreError> {
        let full = self.keys.full_key(key);
        self.forget(table, &full)?;
        let state = self.store.state();
        self.batch.delete_cf(family(state.db()?, table)?, &full);
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
        let state = self.store.state();
        Ok(state
            .db()?
            .write_opt(WriteBatch::from_data(self.batch.data()), &options)?)
    }

    fn forget(&mut self, table: Table, full_key: &[u8]) -> Result<(), StoreError> {
        if !Table::COUNTED.contains(&table) {
            return Ok(());
        }
        let state = self.store.state();
        let db = state.db()?;
        if let Some(old) = db.get_pinned_cf(family(db, table)?, full_key)? {
            self.delta.toggle(self.keys.element(table, full_key, &old));
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
    use kms_crypto::{CryptoError, SecretKey};

    fn open(home: &Path, create: bool) -> Store {
        let root = SecretKey::fill_with(|_| Ok::<(), CryptoError>(())).unwrap();
        let keys = EpochKeys::derive(&root, Uuid::from_bytes([1; 16]), 1).unwrap();
        Store::open(&home.join("db"), keys, create).unwrap()
    }

    fn raw_put(store: &Store, table: Table, key: &[u8], value: &[u8]) {
        let state = store.state();
        let db = state.db().unwrap();
        db.put_cf(family(db, table).unwrap(), state.keys.full_key(key), value)
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
            raw_put(&store, to.0, to.1, &store.raw(Table::Keys, b"a"));
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
        let old = store.raw(Table::Keys, b"a");
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
