//! From one root key to the next, leaving material behind. docs/kms-format.md, "Ratchet", has the steps and what a crash
//! leaves of each; nothing here knows why a key dies, or tells anybody.

use crate::epoch::EpochKeys;
use crate::home::{Home, HomeError, erase, remove};
use crate::rows::{AliasRow, KeyRow, MANIFEST_KEY, ManifestRow};
use crate::slot::{Keeper, SlotError, open_root, seal_root};
use crate::store::{Row, Store, StoreError, Table};
use kms_crypto::{CryptoError, SecretKey};
use prost::Message;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use uuid::Uuid;
use zeroize::Zeroizing;

/// What is done, and whose failure or crash leaves what it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// 0: the intent is recorded.
    Intended,
    /// 1: the next slot is written, and selects nothing.
    SlotStaged,
    /// 1: the next root key is written.
    RootWritten,
    /// 2: the survivors are written.
    RowsWritten,
    /// 2: they were read back.
    RowsChecked,
    /// 3: the next slot has its name, which may not be durable.
    SlotRenamed,
    /// 3: it is.
    Committed,
    /// 4: the old slot is overwritten.
    SlotOverwritten,
    /// 4: it is gone.
    SlotGone,
    /// 5: the rows of the old epoch are gone.
    RowsDropped,
}

#[cfg(test)]
impl Step {
    /// Every step, in order.
    pub(crate) const ALL: [Self; 10] = [
        Self::Intended,
        Self::SlotStaged,
        Self::RootWritten,
        Self::RowsWritten,
        Self::RowsChecked,
        Self::SlotRenamed,
        Self::Committed,
        Self::SlotOverwritten,
        Self::SlotGone,
        Self::RowsDropped,
    ];
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RatchetError {
    /// A file.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// A slot or a root key.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A primitive.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// What was read back is not what was written.
    #[error("the survivors were not read back as they were written")]
    NotAsWritten,
    /// The observer's.
    #[error(transparent)]
    Observed(#[from] io::Error),
}

/// What a ratchet that did not reach its end has left.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// The epoch is the old one.
    Before(RatchetError),
    /// Nobody knows; the store is closed until a start has looked.
    Unknown(RatchetError),
}

/// What a ratchet moves. Its caller holds whatever keeps others from writing rows.
pub(crate) struct Keystore<'a> {
    pub(crate) home: &'a Home,
    pub(crate) store: &'a Store,
    pub(crate) keeper: &'a Keeper,
}

/// One row of the next epoch: its table, its key there, its value.
type Survivor = (Table, Vec<u8>, Zeroizing<Vec<u8>>);

impl Keystore<'_> {
    /// Steps 1 to 3: everything but the material of `dying`, whose rows become those given, goes to the next epoch, which
    /// is selected and open when this returns. `manifest` is what the next one is to say, but for its epoch and row set;
    /// answers the manifest as written. `reached` is told each step, and may fail it.
    ///
    /// # Errors
    /// [`Stopped`] says which epoch it is.
    pub(crate) fn advance(
        &self,
        manifest: &ManifestRow,
        dying: &BTreeMap<Uuid, KeyRow>,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<ManifestRow, Stopped> {
        let next = self.store.epoch().saturating_add(1);
        let (keys, manifest) = self.prepare(next, manifest, dying, reached).map_err(|error| {
            self.discard_quietly();
            Stopped::Before(error)
        })?;
        let unknown = |error| {
            self.store.abandon();
            Stopped::Unknown(error)
        };
        if let Err(error) = self.home.select_slot(next) {
            // A file system over a network may say so of a rename that it did.
            if self.home.slots().is_ok_and(|slots| !slots.contains(&next)) {
                self.discard_quietly();
                return Err(Stopped::Before(error.into()));
            }
            return Err(unknown(error.into()));
        }
        reached(Step::SlotRenamed).map_err(|error| unknown(error.into()))?;
        self.home.sync().map_err(|error| unknown(error.into()))?;
        self.store.adopt(keys);
        Ok(manifest)
    }

    /// Steps 1 and 2.
    fn prepare(
        &self,
        next: u64,
        manifest: &ManifestRow,
        dying: &BTreeMap<Uuid, KeyRow>,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<(Arc<EpochKeys>, ManifestRow), RatchetError> {
        // What an attempt before this one left would stand in the way, or count.
        self.discard()?;
        let keystore_id = self.store.keystore_id();
        let root = SecretKey::generate()?;
        let kek = self
            .keeper
            .create(&self.home.staged_slot(next), keystore_id, next)?;
        reached(Step::SlotStaged)?;
        seal_root(&self.home.root(next), (keystore_id, next), &kek, &root)?;
        reached(Step::RootWritten)?;
        let keys = Arc::new(EpochKeys::derive(&root, keystore_id, next)?);
        drop((kek, root));

        let mut survivors = self.survivors(&keys, dying)?;
        let mut change = self.store.begin_with(Arc::clone(&keys));
        for (table, key, plain) in &survivors {
            change.put(*table, key, plain)?;
        }
        let manifest = ManifestRow {
            epoch: next,
            row_set: change.delta().0.to_vec(),
            ..manifest.clone()
        };
        let encoded = Zeroizing::new(manifest.encode_to_vec());
        change.put(Table::Manifest, MANIFEST_KEY, &encoded)?;
        let row_set = change.delta();
        change.commit(true)?;
        drop(change);
        survivors.push((Table::Manifest, MANIFEST_KEY.to_vec(), encoded));
        reached(Step::RowsWritten)?;

        // Everything as a start would find it: from the files alone.
        self.store.reopen()?;
        let slot = self.keeper.open(&self.home.staged_slot(next), next)?;
        let root = open_root(&self.home.root(next), &*slot)?;
        let found = EpochKeys::derive(&root, slot.keystore_id(), next)?;
        if self.store.measure_with(&found)? != row_set || !self.holds(&found, survivors)? {
            return Err(RatchetError::NotAsWritten);
        }
        reached(Step::RowsChecked)?;
        Ok((keys, manifest))
    }

    /// Every row of the present epoch as it is to be in the next one, but the manifest.
    fn survivors(
        &self,
        next: &EpochKeys,
        dying: &BTreeMap<Uuid, KeyRow>,
    ) -> Result<Vec<Survivor>, RatchetError> {
        let mut survivors = Vec::new();
        for table in Table::ALL {
            for (key, plain) in self.store.scan(table)? {
                let id = key.first_chunk::<16>().copied().map(Uuid::from_bytes);
                let death = id.and_then(|id| dying.get(&id));
                survivors.extend(match (table, death) {
                    (Table::Manifest, _) if key == MANIFEST_KEY => None,
                    (Table::Material, Some(_)) => None,
                    (Table::Keys, Some(row)) => Some((table, key, Zeroizing::new(row.encode_to_vec()))),
                    (Table::Aliases, _) => {
                        let row = AliasRow::decode(plain.as_slice());
                        let row = row.map_err(|_| StoreError::Damaged(table.name()))?;
                        Some((table, next.hidden_name(&row.name), plain))
                    }
                    _ => Some((table, key, plain)),
                });
            }
        }
        Ok(survivors)
    }

    /// Whether the epoch of `keys` has these rows, and no others.
    fn holds(&self, keys: &EpochKeys, rows: Vec<Survivor>) -> Result<bool, RatchetError> {
        let mut meant: BTreeMap<&'static str, BTreeMap<Vec<u8>, Zeroizing<Vec<u8>>>> = BTreeMap::new();
        for (table, key, plain) in rows {
            meant.entry(table.name()).or_default().insert(key, plain);
        }
        for table in Table::ALL {
            let found: Vec<Row> = self.store.scan_with(keys, table)?;
            let mut meant = meant.remove(table.name()).unwrap_or_default();
            for (key, plain) in found {
                if meant.remove(&key).as_deref() != Some(&*plain) {
                    return Ok(false);
                }
            }
            if !meant.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn discard_quietly(&self) {
        let discarded = self.store.reopen().map_err(RatchetError::from);
        if let Err(error) = discarded.and_then(|()| self.discard()) {
            tracing::warn!(%error, "what was made of the next epoch stays until the next attempt, or start");
        }
    }

    /// Takes away what selects nothing: staged slots, which are destroyed as any slot is, the roots that they open, and the
    /// rows of other epochs. Step 5 but for its record, when the old slot is gone.
    pub(crate) fn discard(&self) -> Result<(), RatchetError> {
        for epoch in self.home.staged_slots()? {
            erase(&self.home.staged_slot(epoch), || Ok(()))?;
        }
        for epoch in self.home.roots()? {
            if epoch != self.store.epoch() {
                remove(&self.home.root(epoch))?;
            }
        }
        Ok(self.store.drop_other_epochs()?)
    }

    /// Step 4: destroys every slot of an epoch before this one. The present one must be known to open every row.
    pub(crate) fn close_past(
        &self,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<(), RatchetError> {
        for epoch in self.home.slots()? {
            if epoch < self.store.epoch() {
                let path = self.home.slot(epoch);
                erase(&path, || {
                    reached(Step::SlotOverwritten).map_err(HomeError::io(&path))
                })?;
                tracing::info!(epoch, "the slot of an epoch was destroyed");
            }
        }
        Ok(())
    }
}
