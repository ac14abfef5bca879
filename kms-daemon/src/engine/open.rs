//! How a keystore is made and opened.

use super::{EVENT_BACKLOG, Engine, Node, SessionId, fresh_uuid, holders};
use crate::audit::{Audit, AuditError, Record, Tail};
use crate::clock::{Clock, DrillClock};
use crate::epoch::EpochKeys;
use crate::fence::Reach;
use crate::home::{Home, HomeError};
use crate::metrics::Metrics;
use crate::observed::{Observed, Reading};
use crate::ratchet::Keystore;
use crate::rows::{
    AliasRow, CHECKPOINT_KEY, CheckpointRow, KeyRow, MANIFEST_KEY, ManifestRow, TIME_KEY, TimeRow,
};
use crate::slot::{Keeper, SlotError, SlotKind, open_root, seal_root};
use crate::store::{RowSet, Store, StoreError, Table};
use kms_api::KmsError;
use kms_crypto::{CryptoError, NonceSource, SecretKey};
use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use prost::Message;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use tokio::sync::broadcast;
use uuid::Uuid;

const FIRST_EPOCH: u64 = 1;
/// CMK versions whose material is kept open, at most.
const MATERIALS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);

/// Why a keystore cannot be made or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The directory.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The root slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The database knows less than the log.
    #[error(
        "the key store lacks {missing} changes that its audit log records: it was put back as it once was, or lost what \
         was durable. Put the true db/ back"
    )]
    RolledBack {
        /// How many writes of the manifest.
        missing: u64,
    },
    /// The slot and the database are of different times.
    #[error(
        "the root slot is of epoch {slot}, and the key store of epoch {store}: {older} was put back as it once was. Put \
         the true one back"
    )]
    OtherEpoch {
        /// The slot's epoch.
        slot: u64,
        /// The latest epoch that the database knows.
        store: u64,
        /// Which of the two is behind.
        older: &'static str,
    },
    /// The slot of an epoch that is over could not be destroyed.
    #[error("the root slot of an epoch that is over cannot be destroyed: {0}")]
    Unfinished(String),
    /// A primitive.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// Something else.
    #[error("{0}")]
    Other(String),
}

impl From<KmsError> for OpenError {
    fn from(error: KmsError) -> Self {
        Self::Other(error.message)
    }
}

/// Where a new keystore says it lies.
#[derive(Debug, Clone)]
pub struct Placement {
    /// 1 to 32 of a-z, 0-9 and '-'.
    pub region: String,
    /// 1 to 20 digits.
    pub account: String,
}

impl Placement {
    fn check(&self) -> Result<(), OpenError> {
        let region = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if !(1..=32).contains(&self.region.len()) || !self.region.chars().all(region) {
            return Err(OpenError::Other(
                "the region must be 1 to 32 of a-z, 0-9 and '-'".to_owned(),
            ));
        }
        if !(1..=20).contains(&self.account.len()) || !self.account.chars().all(|c| c.is_ascii_digit()) {
            return Err(OpenError::Other("the account must be 1 to 20 digits".to_owned()));
        }
        Ok(())
    }
}

/// What a new keystore is to be.
pub struct NewKeystore {
    /// Where it says it lies.
    pub placement: Placement,
    /// What opens its root key.
    pub keeper: Keeper,
    /// It says for ever that its clock may be shifted, and lets it be shifted.
    pub is_drill: bool,
}

impl Engine {
    /// Makes a keystore at `path`, with a file slot.
    ///
    /// # Errors
    /// [`OpenError`]; a home that is not empty is left as it was.
    pub fn init(path: &Path, placement: &Placement, clock: &dyn Clock) -> Result<(), OpenError> {
        let new = NewKeystore {
            placement: placement.clone(),
            keeper: Keeper::File,
            is_drill: false,
        };
        Self::init_with(path, &new, clock)
    }

    /// Makes a keystore at `path`.
    ///
    /// # Errors
    /// [`OpenError`]; a home that is not empty is left as it was.
    pub fn init_with(path: &Path, new: &NewKeystore, clock: &dyn Clock) -> Result<(), OpenError> {
        let placement = &new.placement;
        placement.check()?;
        let home = Home::create(path)?;
        let (keystore_id, node_id) = (fresh_uuid()?, fresh_uuid()?);
        let root = SecretKey::generate()?;
        let staged = home.staged_slot(FIRST_EPOCH);
        let kek = new.keeper.create(&staged, keystore_id, FIRST_EPOCH)?;
        seal_root(&home.root(FIRST_EPOCH), (keystore_id, FIRST_EPOCH), &kek, &root)?;
        let checkpoint = Audit::create(&home.audit_log(), keystore_id)?;
        let manifest = ManifestRow {
            revision: 1,
            keystore_id: keystore_id.as_bytes().to_vec(),
            node_id: node_id.as_bytes().to_vec(),
            epoch: FIRST_EPOCH,
            state_seq: 1,
            revocation_epoch: 0,
            region: placement.region.clone(),
            account: placement.account.clone(),
            created_ms: clock.now_ms(),
            test_clock: new.is_drill || clock.is_test(),
            row_set: RowSet::default().0.to_vec(),
        };
        let keys = EpochKeys::derive(&root, keystore_id, FIRST_EPOCH)?;
        let store = Store::open(&home.database(), keys, true)?;
        let mut change = store.begin();
        change.put(Table::Manifest, MANIFEST_KEY, &manifest.encode_to_vec())?;
        change.put(Table::Manifest, CHECKPOINT_KEY, &checkpoint.encode_to_vec())?;
        change.commit(true)?;
        drop(store);
        // The slot has its name last, since that is what makes this a keystore.
        home.select_slot(FIRST_EPOCH)?;
        Ok(home.sync()?)
    }

    /// What opens the root key of the keystore at `path`.
    ///
    /// # Errors
    /// [`OpenError`] if it is no keystore.
    pub fn slot_kind(path: &Path) -> Result<SlotKind, OpenError> {
        Ok(SlotKind::of(&Home::present_slot(path)?)?)
    }

    /// Opens the keystore at `path`, whose slot is a file.
    ///
    /// # Errors
    /// [`OpenError`], in one line that says what to do where something can be done.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        Self::open_with(path, Keeper::File, clock, BTreeMap::new())
    }

    /// Opens the keystore at `path`: checks that its rows are those of its manifest and that its audit log reaches as
    /// far as it did, logs the records of changes that a crash kept from the log, and finishes or discards what a crash
    /// left of a ratchet. `kept` is what mounts handed to an earlier kmsd of this boot, by their sessions.
    ///
    /// # Errors
    /// [`OpenError`], in one line that says what to do where something can be done.
    pub(crate) fn open_with(
        path: &Path,
        keeper: Keeper,
        clock: Arc<dyn Clock>,
        mut kept: BTreeMap<SessionId, Arc<dyn Reach>>,
    ) -> Result<Self, OpenError> {
        let home = Home::open(path)?;
        // A name that is not durable selects nothing.
        home.sync()?;
        let epoch = home.epoch()?;
        let slot = keeper.open(&home.slot(epoch), epoch)?;
        let root = open_root(&home.root(epoch), &*slot)?;
        tracing::info!(epoch, slot = keeper.kind().name(), erasure = ?slot.erasure(), "root slot opened");
        let open = || -> Result<Store, OpenError> {
            let keys = EpochKeys::derive(&root, slot.keystore_id(), epoch)?;
            Ok(Store::open(&home.database(), keys, false)?)
        };
        let store = open().or_else(|error| {
            if home.has_room() {
                return Err(error);
            }
            // What its log holds is written out now. A kmsd that does not start disables nothing.
            tracing::warn!(%error, "there is no room to open the key store; giving up the reserve");
            home.release_reserve()?;
            open()
        })?;
        drop(root);
        check_epoch(&store)?;

        let mut manifest: ManifestRow = decode(&store, MANIFEST_KEY)?;
        if manifest.keystore_id != store.keystore_id().as_bytes() || manifest.epoch != epoch {
            return Err(StoreError::Damaged("manifest").into());
        }
        if store.measure()? != row_set(&manifest) {
            return Err(StoreError::RowSet.into());
        }
        if clock.is_test() && !manifest.test_clock {
            manifest.test_clock = true;
            manifest.revision += 1;
            let mut change = store.begin();
            change.put(Table::Manifest, MANIFEST_KEY, &manifest.encode_to_vec())?;
            change.commit(true)?;
        }
        let checkpoint: CheckpointRow = decode(&store, CHECKPOINT_KEY)?;
        let (audit, tail) = Audit::open(&home.audit_log(), store.keystore_id(), &checkpoint)?;
        if tail.revision > manifest.revision {
            return Err(OpenError::RolledBack {
                missing: tail.revision - manifest.revision,
            });
        }
        // Every row is known to be there under the present slot: what is left of other epochs goes.
        let keystore = Keystore {
            home: &home,
            store: &store,
            keeper: &keeper,
        };
        keystore
            .close_past(&mut |_| Ok(()))
            .map_err(|error| OpenError::Unfinished(error.to_string()))?;
        if let Err(error) = keystore.discard() {
            tracing::warn!(%error, "rows of another epoch stay until the next attempt");
        }
        replay(&store, &audit, &tail)?;
        let stored: Option<TimeRow> = find(&store, TIME_KEY)?;
        let shift_ms = stored.as_ref().map_or(0, |row| row.shift_ms);
        let drill = manifest
            .test_clock
            .then(|| Arc::new(DrillClock::new(Arc::clone(&clock), shift_ms)));
        let clock: Arc<dyn Clock> = match &drill {
            Some(drill) => Arc::clone(drill) as Arc<dyn Clock>,
            None => clock,
        };
        let now = Reading {
            wall_ms: clock.now_ms(),
            boot_ms: clock.boot_ms(),
        };
        let time = Observed::resume(stored, &clock.boot_id(), now);

        let (keys, aliases) = (load_keys(&store)?, load_aliases(&store)?);
        let boot_id = holders::boot_id()?;
        let sessions = holders::load(&store, &boot_id, |id| kept.remove(&id))?;
        tracing::info!(
            keys = keys.len(),
            test_clock = manifest.test_clock,
            "keystore opened"
        );
        let engine = Self {
            node: Node {
                region: manifest.region.clone(),
                account: manifest.account.clone(),
            },
            state_seq: AtomicU64::new(manifest.state_seq),
            revocation_epoch: AtomicU64::new(manifest.revocation_epoch),
            checkpoint: AtomicU64::new(checkpoint.records),
            manifest: Mutex::new(manifest),
            keys: RwLock::new(keys),
            aliases: RwLock::new(aliases),
            materials: Mutex::new(LruCache::new(MATERIALS_MAX)),
            imports: super::Imports::default(),
            sessions,
            turns: super::Turns::default(),
            reports: super::Reports::default(),
            anchors: parking_lot::Mutex::default(),
            boot_id,
            session_nonces: NonceSource::new()?,
            refusals: super::Refusals::default(),
            events: broadcast::Sender::new(EVENT_BACKLOG),
            metrics: Metrics::default(),
            started_boot_ms: clock.boot_ms(),
            unstored: Mutex::default(),
            lacks_reserve: AtomicBool::new(false),
            time: Mutex::new(time),
            clock,
            drill,
            keeper,
            store,
            audit,
            home,
        };
        engine.fill_reserve();
        if let Err(error) = engine.settle(&mut |_| Ok(())) {
            tracing::warn!(%error, "what was destroyed is not recorded as such yet");
        }
        Ok(engine)
    }
}

/// The database must have a manifest of the slot's epoch. That of another epoch says which of the two is behind.
fn check_epoch(store: &Store) -> Result<(), OpenError> {
    let epochs = store.epochs_with(Table::Manifest, MANIFEST_KEY)?;
    let slot = store.epoch();
    match epochs.last() {
        Some(&store) if !epochs.contains(&slot) => Err(OpenError::OtherEpoch {
            slot,
            store,
            older: if store > slot { "the slot" } else { "db/" },
        }),
        _ => Ok(()),
    }
}

/// What the manifest says that the counted rows add up to.
pub(super) fn row_set(manifest: &ManifestRow) -> RowSet {
    // Another length was never written; it then matches no rows, and the start says so.
    RowSet(manifest.row_set.as_slice().try_into().unwrap_or([0xff; 32]))
}

pub(super) fn decode<M: Message + Default>(store: &Store, key: &[u8]) -> Result<M, StoreError> {
    find(store, key)?.ok_or(StoreError::Damaged("manifest"))
}

fn find<M: Message + Default>(store: &Store, key: &[u8]) -> Result<Option<M>, StoreError> {
    let plain = store.get(Table::Manifest, key)?;
    plain
        .map(|plain| M::decode(plain.as_slice()).map_err(|_| StoreError::Damaged("manifest")))
        .transpose()
}

/// Logs, in the order of their times, the pending records that the log lacks.
fn replay(store: &Store, audit: &Audit, tail: &Tail) -> Result<(), OpenError> {
    let mut pending = Vec::new();
    for (key, plain) in store.scan(Table::PendingAudit)? {
        let record = Record::decode(plain.as_slice()).map_err(|_| StoreError::Damaged("pending_audit"))?;
        pending.push((record.time_ms, key, plain));
    }
    pending.sort_by_key(|(time_ms, ..)| *time_ms);
    for (_, key, plain) in pending {
        if !tail.succeeded.contains(&key) {
            audit.append(plain.to_vec())?;
        }
        let mut change = store.begin();
        change.delete(Table::PendingAudit, &key)?;
        change.commit(true)?;
    }
    Ok(())
}

fn load_keys(store: &Store) -> Result<BTreeMap<Uuid, super::KeyLock>, StoreError> {
    let damaged = || StoreError::Damaged("keys");
    let rows = store.scan(Table::Keys)?.into_iter().map(|(key, plain)| {
        let id = Uuid::from_slice(&key).map_err(|_| damaged())?;
        let row = KeyRow::decode(plain.as_slice()).map_err(|_| damaged())?;
        Ok((id, Arc::new(RwLock::new(row))))
    });
    rows.collect()
}

fn load_aliases(store: &Store) -> Result<BTreeMap<String, AliasRow>, StoreError> {
    let rows = store.scan(Table::Aliases)?.into_iter().map(|(_, plain)| {
        let row = AliasRow::decode(plain.as_slice()).map_err(|_| StoreError::Damaged("aliases"))?;
        Ok((row.name.clone(), row))
    });
    rows.collect()
}
