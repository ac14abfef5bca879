//! Holders of data keys: their rows, how they are taken over after a restart, and how a revocation makes them let go.
//!
//! A revocation is over when every holder of the key has acknowledged it, was fenced, or is gone; `clearing` decides what is
//! done to each. No lock of a key is held meanwhile: the key is stored as revoked by then, so that nobody becomes a holder.

use super::clearing::{Cache, Cleared, Clearing, Seen, Step, takes_over};
use super::sessions::{DRAIN_MAX_MS, Exit, Facts, Mount, Owner, Session, SessionId, Sessions};
use super::{Engine, KeyEvent, OpenError, failed, internal};
use crate::fence::{Life, Process, Reach, may_be_mounted, within};
use crate::rows::HolderRow;
use crate::store::{Store, StoreError, Table};
use kms_api::{Code, KmsError};
use parking_lot::Mutex;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Beyond what a mount asked for to go dark.
const GRACE_MS: u64 = 2_000;
/// How long a killed process may take to end. One that waits for a disk ends when the disk answers.
const EXIT_MAX_MS: u64 = 10_000;
/// How long the kernel may take to drop a mount's cache.
const INVALIDATION_MAX: Duration = Duration::from_secs(10);
/// How long a holder is left unobserved: an exit does not ring.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The id of this boot of this host.
pub(super) fn boot_id() -> Result<String, KmsError> {
    let id = std::fs::read_to_string(BOOT_ID).map_err(|_| internal())?;
    Ok(id.trim().to_owned())
}

/// One change of a key's state at a time, the wait for its holders included. Taken before every lock of [`Engine`].
#[derive(Default)]
pub(super) struct Turns(Mutex<BTreeMap<Uuid, Arc<Mutex<()>>>>);

impl Turns {
    pub(super) fn of(&self, key: Uuid) -> Arc<Mutex<()>> {
        Arc::clone(self.0.lock().entry(key).or_default())
    }
}

/// The holders that an earlier kmsd left behind in this boot. The rows of earlier boots are removed: their kernel is gone,
/// and with it every page that it cached.
pub(super) fn load(
    store: &Store,
    boot_id: &str,
    mut reach: impl FnMut(SessionId) -> Option<Arc<dyn Reach>>,
) -> Result<Sessions, OpenError> {
    let damaged = || StoreError::Damaged("holders");
    let mut left = Vec::new();
    for (key, plain) in store.scan(Table::Holders)? {
        let row = HolderRow::decode(plain.as_slice()).map_err(|_| damaged())?;
        if row.boot_id != boot_id {
            let mut change = store.begin();
            change.delete(Table::Holders, &key)?;
            change.commit(false)?;
            continue;
        }
        let id = SessionId::try_from(row.session_id.as_slice()).map_err(|_| damaged())?;
        let keys = row
            .keys
            .iter()
            .map(|id| Uuid::from_slice(id).map_err(|_| damaged()));
        let process = match Process::find(row.pid) {
            Ok(process) => Some(process),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => None,
            // One that may be alive must not be taken for gone, and what it holds with it.
            Err(error) => {
                return Err(OpenError::Other(format!(
                    "process {}, which may hold data keys, cannot be looked at: {error}",
                    row.pid
                )));
            }
        };
        let process = process
            .filter(|process| process.began_at(row.started_ticks))
            .map(|process| Arc::new(process) as Arc<dyn Life>);
        let facts = Facts {
            owner: Owner {
                uid: row.uid,
                pid: row.pid,
            },
            started_ticks: row.started_ticks,
            volume: Uuid::from_slice(&row.volume).map_err(|_| damaged())?,
            domain: row.domain.try_into().map_err(|_| damaged())?,
            drain_max_ms: row.drain_max_ms,
        };
        let mount = Mount {
            minor: row.device_minor,
            reach: reach(id),
        };
        let used = keys.collect::<Result<BTreeSet<_>, _>>()?;
        left.push(Session::left_behind(id, facts, process, used, mount));
    }
    Ok(Sessions::holding(left))
}

impl Engine {
    /// Makes a session a holder of `keys`, durably, before anything under them leaves. The caller holds the keys' read
    /// locks, so that a revocation sees it or it sees the revocation.
    pub(super) fn register(&self, session: &Session, keys: &BTreeSet<Uuid>) -> Result<(), KmsError> {
        // A row that is written while the keystore goes to its next epoch would be left behind in the one before.
        let _manifest = (!session.uses_all(keys)).then(|| self.manifest.lock());
        let _row = session.row.lock();
        session.must_go_on()?;
        session.add_used(keys, |all| self.store_holder(session, all, &[]))
    }

    /// Stores a holder's row, in place of those of `replaced`. The caller holds the manifest.
    fn store_holder(
        &self,
        session: &Session,
        keys: &BTreeSet<Uuid>,
        replaced: &[Arc<Session>],
    ) -> Result<(), KmsError> {
        let facts = &session.facts;
        let row = HolderRow {
            session_id: session.id.to_vec(),
            volume: facts.volume.as_bytes().to_vec(),
            boot_id: self.boot_id.clone(),
            uid: facts.owner.uid,
            pid: facts.owner.pid,
            started_ticks: facts.started_ticks,
            device_minor: session.mount().minor,
            drain_max_ms: facts.drain_max_ms,
            keys: keys.iter().map(|id| id.as_bytes().to_vec()).collect(),
            domain: facts.domain.into(),
        };
        let mut change = self.store.begin();
        let stored = change
            .put(Table::Holders, &session.id, &row.encode_to_vec())
            .and_then(|()| {
                replaced
                    .iter()
                    .try_for_each(|old| change.delete(Table::Holders, &old.id))
            })
            .and_then(|()| change.commit(true));
        stored.map_err(failed)
    }

    /// Has a session of this kmsd answer for what the same process was given by an earlier one. The caller holds the manifest,
    /// and its `row`.
    pub(super) fn take_over(&self, session: &Session, attached: Option<u32>) -> Result<(), KmsError> {
        let fits = |mount: &Mount| takes_over(attached, mount.minor);
        let left = self.sessions.left_behind_by(&session.facts, fits);
        if left.is_empty() {
            return Ok(());
        }
        let keys = left.iter().flat_map(|old| old.used()).collect();
        // One batch: at no moment does nobody answer for it.
        session.add_and_store(&keys, |all| self.store_holder(session, all, &left))?;
        for old in left {
            self.sessions.remove(&old);
        }
        Ok(())
    }

    /// Notes the descriptors that the process of a session has handed over.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`; `InternalFailure` if it could not be stored.
    pub(crate) fn attach(
        &self,
        owner: (u32, i32),
        session: &[u8],
        minor: u32,
        reach: Arc<dyn Reach>,
    ) -> Result<(), KmsError> {
        let (uid, pid) = owner;
        let session = self
            .sessions
            .get(session, Owner { uid, pid }, self.clock.boot_ms())?;
        let _manifest = self.manifest.lock();
        let _row = session.row.lock();
        // Its process may have ended: what is taken over now would not be seen to.
        session.must_go_on()?;
        session.set_mount(Mount {
            minor: Some(minor),
            reach: Some(reach),
        });
        self.store_holder(&session, &session.used(), &[])?;
        self.take_over(&session, Some(minor))
    }

    /// Ends a session whose mount is gone, as its process says. Where the kernel may cache something still, that word is not
    /// enough, since a connection can end before the mount does (umount -f): the end of the process ends the session. A key domain
    /// that is given up is one that the mount has let go of, as when it acknowledges: what the kernel caches of it is dropped.
    pub(super) fn closed(&self, session: &Session) {
        let is_given_up = session.facts.domain != 0 && {
            self.sessions.acknowledge(session, u64::MAX);
            bounded(session.mount(), |reach| reach.invalidate())
        };
        let _row = session.row.lock();
        if is_given_up || cache_of(session) == Cache::Nothing {
            self.end_session(session);
        } else {
            tracing::info!(holder = %describe(session), "a closed session waits for its process to end, since its mount is there");
        }
    }

    /// Ends a session that holds nothing any more. The caller holds its `row`.
    fn end_session(&self, session: &Session) {
        self.sessions.remove(session);
        let mut change = self.store.begin();
        let removed = change
            .delete(Table::Holders, &session.id)
            .and_then(|()| change.commit(false));
        if let Err(error) = removed {
            // The next kmsd finds its process ended and its mount gone.
            tracing::warn!(%error, "the row of a holder that holds nothing stays");
        }
    }

    /// A session or its process has ended: what the kernel still caches of its mount is dropped, since nobody else can say
    /// when that must go. Whether nothing is left of it.
    pub(crate) fn process_exited(&self, id: SessionId) -> bool {
        let Some(session) = self.sessions.any(id) else {
            return true;
        };
        if session.process().is_some_and(|process| !process.has_exited()) {
            return false;
        }
        let cleared = self.clear(&session, u64::MAX, 0).inspect_err(|why| {
            tracing::warn!(holder = %describe(&session), why, "the mount of an ended process may still show what it cached");
        });
        cleared.is_ok()
    }

    /// Whether there is such a session, left behind or not.
    pub(crate) fn knows(&self, id: SessionId) -> bool {
        self.sessions.any(id).is_some()
    }

    /// What an earlier kmsd left behind, to be watched: the exits of processes that are alive, and at once those of others.
    pub(crate) fn left_behind(&self) -> Vec<Exit> {
        let sessions = self.sessions.holders(None);
        let left = sessions.iter().filter(|session| session.is_left_behind());
        left.map(|session| session.exit()).collect()
    }

    /// Waits until no holder of `key` can show anything that was revoked up to `epoch`, by force where it must be.
    ///
    /// # Errors
    /// `RevocationIncomplete`, which names the holders that may.
    pub(super) fn clear_holders(&self, key: Uuid, epoch: u64) -> Result<(), KmsError> {
        let mut stuck = Vec::new();
        // Again for those that have taken over what others left behind.
        loop {
            let holders: Vec<_> = self
                .sessions
                .holders(Some(key))
                .into_iter()
                .filter(|holder| !holder.is_cleared(epoch) && !stuck.iter().any(|(id, _)| *id == holder.id))
                .collect();
            if holders.is_empty() {
                break;
            }
            let outcomes = std::thread::scope(|scope| {
                let threads: Vec<_> = holders
                    .iter()
                    .map(|holder| {
                        scope.spawn(|| {
                            let deadline_ms =
                                u64::from(holder.facts.drain_max_ms.min(DRAIN_MAX_MS)) + GRACE_MS;
                            self.clear(holder, epoch, deadline_ms)
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join())
                    .collect::<Vec<_>>()
            });
            for (holder, outcome) in holders.iter().zip(outcomes) {
                let why = match outcome {
                    Ok(Ok(())) => continue,
                    Ok(Err(why)) => why,
                    Err(_) => "kmsd failed; see its log",
                };
                stuck.push((holder.id, format!("{}: {why}", describe(holder))));
            }
        }
        if stuck.is_empty() {
            return Ok(());
        }
        let holders: Vec<_> = stuck.into_iter().map(|(_, text)| text).collect();
        Err(KmsError::new(
            Code::RevocationIncomplete,
            format!(
                "the key is revoked, and gives nothing to anybody, but what was read before may still be shown by {}",
                holders.join("; ")
            ),
        ))
    }

    /// Makes one holder let go of what was revoked up to `epoch`.
    fn clear(&self, holder: &Session, epoch: u64, patience_ms: u64) -> Result<(), &'static str> {
        let _one_at_a_time = holder.clearing.lock();
        let mut clearing = Clearing::of(epoch);
        let mut deadline = self.clock.boot_ms().saturating_add(patience_ms);
        loop {
            let changes = self.sessions.changes();
            if holder.is_over() {
                return Ok(());
            }
            let step = clearing.next(&self.see(holder, deadline));
            let mount = holder.mount();
            let went_well = match step {
                Step::Wait => {
                    self.sessions.wait(changes, LOOK_AGAIN);
                    continue;
                }
                Step::Done(cleared) => {
                    if cleared == Cleared::Acknowledged {
                        holder.note_cleared(epoch);
                    } else {
                        let _row = holder.row.lock();
                        // Its mount may have been attached since, and what others left taken over with it.
                        if clearing.next(&self.see(holder, deadline)) != step {
                            continue;
                        }
                        self.end_session(holder);
                    }
                    tracing::info!(holder = %describe(holder), epoch, ?cleared, "a holder let go");
                    return Ok(());
                }
                Step::Stuck(stuck) => return Err(stuck.as_str()),
                Step::Invalidate => bounded(mount, |reach| reach.invalidate()),
                Step::Kill => {
                    tracing::warn!(holder = %describe(holder), epoch, "a holder that does not let go is ended");
                    deadline = self.clock.boot_ms().saturating_add(EXIT_MAX_MS);
                    holder.process().is_none_or(|process| {
                        process
                            .kill()
                            .inspect_err(|error| tracing::error!(%error, "it cannot be killed"))
                            .is_ok()
                    })
                }
                Step::Bury => match mount.reach.as_ref().map(|reach| reach.abort()) {
                    // Without an end to it, dirty pages would wait for a server that is gone.
                    Some(Ok(())) => bounded(mount, |reach| {
                        reach.invalidate()?;
                        reach.invalidate()
                    }),
                    aborted => {
                        tracing::warn!(holder = %describe(holder), ?aborted, "its connection cannot be ended");
                        // It ends with the last of its descriptors: until then its users would wait for ever.
                        holder.set_mount(Mount { reach: None, ..mount });
                        false
                    }
                },
            };
            clearing.did(step, went_well);
        }
    }

    fn see(&self, holder: &Session, deadline: u64) -> Seen {
        // The exit first: what a living process does to its mount is seen by what is asked after it.
        let has_exited = holder.process().is_none_or(|process| process.has_exited());
        Seen {
            acknowledged: holder.acknowledged(),
            has_exited,
            cache: cache_of(holder),
            is_overdue: self.clock.boot_ms() >= deadline,
        }
    }

    /// Has every holder of a key told, once more, that it is revoked.
    pub(super) fn tell_again(&self, key: Uuid, state: kms_api::proto::KeyState, epoch: u64) {
        // Nobody may be watching.
        let _ = self.events.send(KeyEvent {
            key_id: key,
            state,
            revocation_epoch: epoch,
        });
    }
}

/// What the kernel may cache of a holder's mount.
fn cache_of(holder: &Session) -> Cache {
    let Mount { minor, reach } = holder.mount();
    Cache::of(reach.map(|reach| reach.is_gone()), minor, may_be_mounted)
}

/// Does something to a mount's cache that may block in the kernel for ever. Whether it was done.
fn bounded(mount: Mount, act: impl FnOnce(&dyn Reach) -> Result<(), String> + Send + 'static) -> bool {
    let Some(reach) = mount.reach else {
        return false;
    };
    match within(INVALIDATION_MAX, move || act(&*reach)) {
        Some(Ok(())) => true,
        Some(Err(error)) => {
            tracing::warn!(error, "a mount's cache");
            false
        }
        None => {
            tracing::warn!("the kernel did not drop a mount's cache in time");
            false
        }
    }
}

/// A holder in words.
fn describe(holder: &Session) -> String {
    let Facts {
        owner,
        volume,
        domain,
        ..
    } = &holder.facts;
    let domain = match domain {
        0 => String::new(),
        domain => format!(", domain {domain}"),
    };
    let device = holder
        .mount()
        .minor
        .map(|minor| format!(", device 0:{minor}"))
        .unwrap_or_default();
    format!(
        "process {} of uid {} (volume {volume}{domain}{device})",
        owner.pid, owner.uid
    )
}
