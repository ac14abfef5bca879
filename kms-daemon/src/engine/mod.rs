//! The rules of the KMS. It knows neither gRPC nor sockets; adapters hand it a [`Call`] and get an answer.
//!
//! Every call goes through [`Engine::run`], which writes its audit record before the answer leaves. Locks are taken in
//! this order: a key's turn (`holders`), `reports` or `anchors`, aliases, one key's state (several: in the order of their ids), the manifest, then
//! leaves, of which none is held while another is taken: the observed time, the cached materials, the offers of import, the
//! sessions, the store's own. A session's `clearing` is
//! taken under a key's turn alone, its `row` under `clearing`, a key's read lock or the manifest, and leaves under that. Whoever writes
//! a row of a key, of a holder, of an anchor or of what depends on a key holds the manifest, and the ratchet holds it from its first step to the end of its fourth, so
//! every change waits for that, and none is left behind in an epoch that is over; the keys that die are locked from before their intent is recorded until they are Destroyed. A call that uses a
//! key holds the key's read lock until its record is durable, and a change of state holds the write lock: so no call that
//! begins after DisableKey has returned succeeds, and none that succeeded is still unrecorded.

mod aliases;
#[cfg(test)]
mod anchor_tests;
mod anchors;
mod call;
mod clearing;
mod cryptography;
mod dependants;
#[cfg(test)]
mod dependants_tests;
mod destruction;
#[cfg(test)]
mod destruction_tests;
#[cfg(test)]
mod explorer;
mod filesystem;
#[cfg(test)]
mod holder_tests;
mod holders;
mod import;
#[cfg(test)]
mod import_tests;
mod keys;
mod open;
mod refusals;
mod sessions;
#[cfg(test)]
mod tests;
mod time;

pub use call::{Call, Principal, Trail};
pub use keys::NewKey;
pub use open::{NewKeystore, OpenError, Placement};

pub(crate) use anchors::{Anchor, Move};
pub(crate) use cryptography::{Action, Outcome, Release, Request};
pub(crate) use dependants::{Dependant, Usage};
pub(crate) use filesystem::{Asked, Watched};
pub(crate) use refusals::OVERFLOW_UID;
pub(crate) use sessions::{Exit, SessionId};

use crate::audit::{Audit, AuditError, Record};
use crate::clock::{Clock, DrillClock};
use crate::home::Home;
use crate::metrics::{Calls, Metrics};
use crate::observed::Observed;
use crate::rows::{AliasRow, CHECKPOINT_KEY, CheckpointRow, KeyRow, MANIFEST_KEY, ManifestRow};
use crate::slot::{Keeper, SlotKind};
use crate::store::{Change, RowSet, Store, StoreError, Table};
use dependants::Reports;
use holders::Turns;
use import::Imports;
use kms_api::proto::KeyState;
use kms_api::{Code, KmsError};
use kms_crypto::{NonceSource, SecretKey};
use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use prost::Message;
use refusals::Refusals;
use sessions::Sessions;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::broadcast;
use uuid::Uuid;

/// How many records may lie behind the last checkpoint before another is written.
const CHECKPOINT_RECORDS: u64 = 1024;
/// State changes that a slow watcher may lag behind, at most.
const EVENT_BACKLOG: usize = 256;

type KeyLock = Arc<RwLock<KeyRow>>;

/// A key's state has changed.
#[derive(Debug, Clone)]
pub struct KeyEvent {
    /// The key.
    pub key_id: Uuid,
    /// What it may do now.
    pub state: KeyState,
    /// The keystore's revocation epoch after the change.
    pub revocation_epoch: u64,
}

/// Whether a change takes something away from somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// It does.
    Restrictive,
    /// What it takes away was taken before.
    Repeated,
    /// It does not.
    Other,
}

/// One keystore, open.
pub struct Engine {
    store: Store,
    audit: Audit,
    /// Makes the slot of the next epoch.
    keeper: Keeper,
    /// Where this keystore lies; never changes.
    node: Node,
    /// Whoever holds this may change the keystore.
    manifest: Mutex<ManifestRow>,
    /// Records in the log at the last checkpoint.
    checkpoint: AtomicU64,
    state_seq: AtomicU64,
    revocation_epoch: AtomicU64,
    keys: RwLock<BTreeMap<Uuid, KeyLock>>,
    aliases: RwLock<BTreeMap<String, AliasRow>>,
    /// By key and version; what is disabled is not in here.
    materials: Mutex<LruCache<(Uuid, Uuid), Arc<SecretKey>>>,
    imports: Imports,
    /// Whose data keys are where.
    sessions: Sessions,
    turns: Turns,
    reports: Reports,
    /// Taken by whoever moves an anchor, over what it reads and what it writes.
    anchors: Mutex<()>,
    boot_id: String,
    session_nonces: NonceSource,
    refusals: Refusals,
    events: broadcast::Sender<KeyEvent>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    /// The same clock, in a keystore for drills.
    drill: Option<Arc<DrillClock>>,
    /// What was seen of the clock.
    time: Mutex<Observed>,
    started_boot_ms: u64,
    /// Keys whose state in memory takes more away than what is stored.
    unstored: Mutex<BTreeSet<Uuid>>,
    lacks_reserve: AtomicBool,
    /// Dropped last: it stays locked until everything above is closed.
    home: Home,
}

/// What is in every ARN.
#[derive(Debug, Clone)]
struct Node {
    region: String,
    account: String,
}

/// A change that is durable.
struct Written {
    next: ManifestRow,
    /// Records in the log, as the checkpoint in the batch has it.
    records: u64,
    /// The call's own.
    record: Vec<u8>,
}

/// The counters that GetMetrics answers.
pub(crate) struct Counters {
    pub(crate) operations: Vec<(&'static str, Calls)>,
    pub(crate) issued: u64,
    pub(crate) opened: u64,
    pub(crate) sessions: usize,
    pub(crate) audit_records: u64,
    pub(crate) uptime_ms: u64,
}

/// What GetKeystoreInfo answers.
pub(crate) struct Info {
    pub(crate) keystore_id: Uuid,
    pub(crate) manifest: ManifestRow,
    pub(crate) kind: SlotKind,
    pub(crate) is_suspended: bool,
    pub(crate) observed_ms: u64,
    pub(crate) now_ms: i64,
    pub(crate) audit: CheckpointRow,
}

/// What a mount remembers, to refuse a kmsd that knows less.
pub(crate) struct Position {
    pub(crate) keystore_id: Uuid,
    pub(crate) epoch: u64,
    pub(crate) state_seq: u64,
    pub(crate) audit: CheckpointRow,
}

impl Engine {
    /// Runs one call, and makes its audit record durable before its outcome is known to anybody. A panic inside is an
    /// `InternalFailure` of this call alone.
    ///
    /// # Errors
    /// The call's own; `ServiceUnavailable` if it could not be recorded.
    pub fn run<T>(
        &self,
        call: &Call,
        operation: impl FnOnce(&mut Trail) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        let mut trail = Trail::default();
        let outcome = catch_unwind(AssertUnwindSafe(|| operation(&mut trail))).unwrap_or_else(|_| {
            tracing::error!(request_id = %call.request_id, operation = call.operation, "panic in a handler");
            Err(internal())
        });
        let outcome = if trail.recorded {
            outcome
        } else {
            let code = outcome.as_ref().err().map(|error| error.code);
            let record = call.record(self.clock.now_ms(), &trail, code);
            self.record(&record).and(outcome)
        };
        self.metrics.count(call.operation, outcome.is_ok());
        // Only now may a writer have the keys.
        drop(trail);
        outcome
    }

    /// Appends a record to the log, durably.
    fn record(&self, record: &Record) -> Result<(), KmsError> {
        self.audit.append(record.encode_to_vec()).map_err(unrecorded)?;
        if self.audit.durable().records >= self.checkpoint.load(Ordering::Relaxed) + CHECKPOINT_RECORDS {
            self.checkpoint_lazily();
        }
        Ok(())
    }

    /// A checkpoint between changes only: a change's record is in the log before its pending row goes, and a checkpoint
    /// between the two would hide it from the start that has to tell whether it was logged.
    fn checkpoint_lazily(&self) {
        let Some(_manifest) = self.manifest.try_lock() else {
            return;
        };
        if let Err(error) = self.write_checkpoint(&self.audit.durable(), false) {
            tracing::warn!(%error, "the audit checkpoint was not written");
        }
    }

    fn write_checkpoint(&self, durable: &CheckpointRow, sync: bool) -> Result<(), StoreError> {
        let mut change = self.store.begin();
        change.put(Table::Manifest, CHECKPOINT_KEY, &durable.encode_to_vec())?;
        change.commit(sync)?;
        self.checkpoint.store(durable.records, Ordering::Relaxed);
        Ok(())
    }

    /// Commits what `build` puts into a batch together with the manifest, the checkpoint and the call's own record, synced;
    /// then appends the record to the log. The caller holds the lock of what it changes. `apply` puts the change into
    /// memory and is told the revocation epoch; changes are applied in the order of their epochs.
    ///
    /// What takes something away needs no log: its record waits in the batch until there is one again. Everything else is
    /// refused without. And if it cannot be stored, it still holds for as long as this daemon runs, though the caller is
    /// told that it failed.
    fn commit(
        &self,
        call: &Call,
        trail: &mut Trail,
        effect: Effect,
        build: impl Fn(&mut Change<'_>) -> Result<(), StoreError>,
        apply: impl FnOnce(u64),
    ) -> Result<(), KmsError> {
        let mut manifest = self.manifest.lock();
        if effect == Effect::Other {
            self.audit.probe().map_err(unrecorded)?;
        }
        let mut written = self.write_change(call, trail, &manifest, effect, &build);
        if let Err(error) = &written
            && self.recover(effect, error, &mut manifest)
        {
            written = self.write_change(call, trail, &manifest, effect, &build);
        }
        let Written {
            next,
            records,
            record,
        } = match written {
            Ok(written) => written,
            Err(error) => {
                if effect == Effect::Restrictive {
                    tracing::error!("what was to be taken away is refused in memory alone");
                    manifest.revocation_epoch += 1;
                    self.revocation_epoch
                        .store(manifest.revocation_epoch, Ordering::Release);
                    apply(manifest.revocation_epoch);
                }
                return Err(failed(error));
            }
        };
        self.checkpoint.store(records, Ordering::Relaxed);
        self.state_seq.store(next.state_seq, Ordering::Release);
        self.revocation_epoch
            .store(next.revocation_epoch, Ordering::Release);
        let revocation_epoch = next.revocation_epoch;
        *manifest = next;
        apply(revocation_epoch);
        // From here on the change has happened and its record is durable, in the batch: what fails now is repeated by
        // the next start, and is no reason to tell the caller that nothing happened.
        trail.recorded = true;
        match self.audit.append(record) {
            Ok(()) => self.forget_pending(call.request_id.as_bytes()),
            Err(error) => {
                tracing::error!(%error, "a change's record waits in the key store for the next start")
            }
        }
        if self.lacks_reserve.load(Ordering::Relaxed) && self.home.has_room() {
            self.fill_reserve();
        }
        drop(manifest);
        Ok(())
    }

    fn write_change(
        &self,
        call: &Call,
        trail: &Trail,
        manifest: &ManifestRow,
        effect: Effect,
        build: impl Fn(&mut Change<'_>) -> Result<(), StoreError>,
    ) -> Result<Written, StoreError> {
        let mut change = self.store.begin();
        build(&mut change)?;
        let next = next_manifest(manifest, change.delta(), effect);
        let record = Record {
            revision: next.revision,
            ..call.record(self.clock.now_ms(), trail, None)
        };
        let record = record.encode_to_vec();
        let durable = self.audit.durable();
        change.put(Table::Manifest, MANIFEST_KEY, &next.encode_to_vec())?;
        change.put(Table::Manifest, CHECKPOINT_KEY, &durable.encode_to_vec())?;
        change.put(Table::PendingAudit, call.request_id.as_bytes(), &record)?;
        change.commit(true)?;
        Ok(Written {
            next,
            records: durable.records,
            record,
        })
    }

    /// Opens the database anew after a failure; whether another attempt is worth it. For what takes something away the
    /// reserve is given up.
    ///
    /// A batch whose sync failed may be whole in the database's log, and comes back now: a change whose caller was told
    /// that it failed. Its rows are the manifest's that came with it, so that one counts. Memory goes on without them
    /// until the next start, which logs the record that came with them, too.
    fn recover(&self, effect: Effect, error: &StoreError, manifest: &mut ManifestRow) -> bool {
        tracing::error!(%error, "the key store failed; opening it anew");
        if effect == Effect::Other {
            // The reserve is not for this, and without room the database would only be closed.
            if !self.home.has_room() {
                return false;
            }
        } else {
            self.lacks_reserve.store(true, Ordering::Relaxed);
            if let Err(error) = self.home.release_reserve() {
                tracing::error!(%error, "the reserve stays where it is");
            }
        }
        let stored = self
            .store
            .reopen()
            .and_then(|()| open::decode::<ManifestRow>(&self.store, MANIFEST_KEY));
        match stored {
            Ok(stored) => {
                let revocation_epoch = stored.revocation_epoch.max(manifest.revocation_epoch);
                *manifest = ManifestRow {
                    revocation_epoch,
                    ..stored
                };
                true
            }
            Err(error) => {
                tracing::error!(%error, "the key store cannot be opened; the next change tries again");
                // Without its manifest no row of it means anything.
                self.store.close();
                false
            }
        }
    }

    fn fill_reserve(&self) {
        let filled = self.home.fill_reserve();
        self.lacks_reserve.store(filled.is_err(), Ordering::Relaxed);
        if let Err(error) = filled {
            tracing::warn!(%error, "there is no reserve: a full disk could keep keys from being disabled");
        }
    }

    fn forget_pending(&self, key: &[u8]) {
        let mut change = self.store.begin();
        let removed = change
            .delete(Table::PendingAudit, key)
            .and_then(|()| change.commit(false));
        if let Err(error) = removed {
            tracing::warn!(%error, "a logged record stays pending; the next start sees that it was logged");
        }
    }

    /// Records that a call was refused before its content was looked at, at most once in a while for each user.
    ///
    /// # Errors
    /// Always one: `Forbidden.NoPermission`, or `ServiceUnavailable` if that could not be recorded.
    pub fn refuse(&self, call: &Call) -> KmsError {
        self.metrics.count(call.operation, false);
        if let Some(count) = self.refusals.count(call.principal.uid, self.clock.boot_ms()) {
            let mut record = call.record(self.clock.now_ms(), &Trail::default(), Some(Code::NoPermission));
            record.count = count;
            if let Err(error) = self.record(&record) {
                return error;
            }
        }
        KmsError::new(
            Code::NoPermission,
            format!("uid {} may not use this kmsd", call.principal.uid),
        )
    }

    /// acs:kms:REGION:ACCOUNT:key/ID
    #[must_use]
    pub fn arn(&self, key_id: Uuid) -> String {
        format!("{}key/{key_id}", self.arn_prefix())
    }

    fn arn_prefix(&self) -> String {
        format!("acs:kms:{}:{}:", self.node.region, self.node.account)
    }

    /// acs:kms:REGION:ACCOUNT:alias/NAME
    #[must_use]
    pub(crate) fn alias_arn(&self, alias: &str) -> String {
        format!("{}{alias}", self.arn_prefix())
    }

    /// Changes of keys' states, from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<KeyEvent> {
        self.events.subscribe()
    }

    pub(crate) fn revocation_epoch(&self) -> u64 {
        self.revocation_epoch.load(Ordering::Acquire)
    }

    pub(crate) fn position(&self) -> Position {
        Position {
            keystore_id: self.store.keystore_id(),
            epoch: self.store.epoch(),
            state_seq: self.state_seq.load(Ordering::Acquire),
            audit: self.audit.durable(),
        }
    }

    pub(crate) fn info(&self) -> Info {
        let manifest = self.manifest.lock().clone();
        Info {
            keystore_id: self.store.keystore_id(),
            manifest,
            kind: self.keeper.kind(),
            is_suspended: self.is_suspended(),
            observed_ms: self.observed_ms(),
            now_ms: self.clock.now_ms(),
            audit: self.audit.durable(),
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        let (issued, opened) = self.metrics.data_keys();
        Counters {
            operations: self.metrics.operations(),
            issued,
            opened,
            sessions: self.sessions.count(),
            audit_records: self.audit.durable().records,
            uptime_ms: self.clock.boot_ms().saturating_sub(self.started_boot_ms),
        }
    }

    /// Records what refusals are still unrecorded, and where the log ends. To be called once, when no call is under
    /// way; a daemon that is killed instead loses neither records nor keys, only this.
    pub fn close(&self) {
        for record in self.refusals.drain(self.clock.now_ms()) {
            if let Err(error) = self.record(&record) {
                tracing::warn!(%error, "refusals were not recorded");
            }
        }
        let _manifest = self.manifest.lock();
        self.store_time();
        if let Err(error) = self.write_checkpoint(&self.audit.durable(), true) {
            tracing::warn!(%error, "the audit checkpoint was not written");
        }
    }
}

fn next_manifest(manifest: &ManifestRow, delta: RowSet, effect: Effect) -> ManifestRow {
    let mut next = manifest.clone();
    next.revision += 1;
    if effect == Effect::Restrictive {
        next.state_seq += 1;
        next.revocation_epoch += 1;
    }
    let mut rows = open::row_set(manifest);
    rows.toggle(delta);
    next.row_set = rows.0.to_vec();
    next
}

fn unrecorded(error: AuditError) -> KmsError {
    tracing::error!(%error, "a call was refused because it cannot be recorded");
    KmsError::new(
        Code::ServiceUnavailable,
        "the call cannot be recorded in the audit log; see kmsd's own log",
    )
}

fn failed(error: StoreError) -> KmsError {
    tracing::error!(%error, "the key store failed");
    internal()
}

fn internal() -> KmsError {
    KmsError::new(Code::InternalFailure, "kmsd failed; see its log")
}

fn fresh_uuid() -> Result<Uuid, KmsError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|_| internal())?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}
