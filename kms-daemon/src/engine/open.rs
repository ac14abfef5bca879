//! How a keystore is made and opened.

use super::{CHECKPOINT_KEY, EVENT_BACKLOG, Engine, MANIFEST_KEY, Node, SessionId, fresh_uuid, holders};
use crate::audit::{Audit, AuditError, Record, Tail};
use crate::clock::Clock;
use crate::fence::Reach;
use crate::home::{Home, HomeError};
use crate::metrics::Metrics;
use crate::rows::{AliasRow, CheckpointRow, KeyRow, ManifestRow};
use crate::slot::{FileRootSlot, RootSlot, SlotError, open_root, seal_root};
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

impl Engine {
    /// Makes a keystore at `path`, with a file slot.
    ///
    /// # Errors
    /// [`OpenError`]; a home that is not empty is left as it was.
    pub fn init(path: &Path, placement: &Placement, clock: &dyn Clock) -> Result<(), OpenError> {
        placement.check()?;
        let home = Home::create(path)?;
        let (keystore_id, node_id) = (fresh_uuid()?, fresh_uuid()?);
        let (kek, root) = (SecretKey::generate()?, SecretKey::generate()?);
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
            test_clock: clock.is_test(),
            row_set: RowSet::default().0.to_vec(),
        };
        // The slot is written last, since it is what makes this a keystore: until then it exists in memory alone.
        let slot = UnwrittenSlot(keystore_id);
        let store = Store::open(&home.database(), &slot, &root, true)?;
        let mut change = store.begin();
        change.put(Table::Manifest, MANIFEST_KEY, &manifest.encode_to_vec())?;
        change.put(Table::Manifest, CHECKPOINT_KEY, &checkpoint.encode_to_vec())?;
        change.commit(true)?;
        drop(store);
        FileRootSlot::create(&home.slot(FIRST_EPOCH), keystore_id, FIRST_EPOCH, &kek)?;
        Ok(())
    }

    /// Opens the keystore at `path`: checks that its rows are those of its manifest and that its audit log reaches as
    /// far as it did, and logs the records of changes that a crash kept from the log.
    ///
    /// # Errors
    /// [`OpenError`], in one line that says what to do where something can be done.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        Self::open_keeping(path, clock, BTreeMap::new())
    }

    /// The same, with what mounts handed to an earlier kmsd of this boot, by their sessions.
    ///
    /// # Errors
    /// [`OpenError`]
    pub(crate) fn open_keeping(
        path: &Path,
        clock: Arc<dyn Clock>,
        mut kept: BTreeMap<SessionId, Arc<dyn Reach>>,
    ) -> Result<Self, OpenError> {
        let home = Home::open(path)?;
        let epoch = home.epoch()?;
        let slot = FileRootSlot::open(&home.slot(epoch), epoch)?;
        let root = open_root(&home.root(epoch), &slot)?;
        tracing::info!(epoch, erasure = ?slot.erasure(), "root slot opened");
        let open = || Store::open(&home.database(), &slot, &root, false);
        let store = open().or_else(|error| {
            if home.has_room() {
                return Err(OpenError::from(error));
            }
            // What its log holds is written out now. A kmsd that does not start disables nothing.
            tracing::warn!(%error, "there is no room to open the key store; giving up the reserve");
            home.release_reserve()?;
            Ok(open()?)
        })?;
        drop(root);

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
        replay(&store, &audit, &tail)?;

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
            sessions,
            turns: super::Turns::default(),
            boot_id,
            session_nonces: NonceSource::new()?,
            refusals: super::Refusals::default(),
            events: broadcast::Sender::new(EVENT_BACKLOG),
            metrics: Metrics::default(),
            started_boot_ms: clock.boot_ms(),
            unstored: Mutex::default(),
            lacks_reserve: AtomicBool::new(false),
            clock,
            store,
            audit,
            home,
        };
        engine.fill_reserve();
        Ok(engine)
    }
}

/// Names the keystore for the store that `init` makes, before there is a slot file.
struct UnwrittenSlot(Uuid);

impl RootSlot for UnwrittenSlot {
    fn erasure(&self) -> crate::slot::Erasure {
        crate::slot::Erasure::None
    }

    fn keystore_id(&self) -> Uuid {
        self.0
    }

    fn epoch(&self) -> u64 {
        FIRST_EPOCH
    }

    fn kek(&self) -> Result<SecretKey, SlotError> {
        Err(CryptoError::Authentication.into())
    }
}

/// What the manifest says that the counted rows add up to.
pub(super) fn row_set(manifest: &ManifestRow) -> RowSet {
    // Another length was never written; it then matches no rows, and the start says so.
    RowSet(manifest.row_set.as_slice().try_into().unwrap_or([0xff; 32]))
}

pub(super) fn decode<M: Message + Default>(store: &Store, key: &[u8]) -> Result<M, StoreError> {
    let damaged = || StoreError::Damaged("manifest");
    let plain = store.get(Table::Manifest, key)?.ok_or_else(damaged)?;
    M::decode(plain.as_slice()).map_err(|_| damaged())
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
