//! Filesystem sessions: who holds data keys, and under which CMKs.

use crate::fence::{Life, Reach};
use kms_api::session::{SESSION_ID_LEN, SessionKey};
use kms_api::{Code, KmsError};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use uuid::Uuid;

/// A client must renew within this long.
pub(super) const LEASE_TTL_MS: u32 = 10_000;
/// Sessions of one user, at most.
const SESSIONS_PER_UID_MAX: usize = 256;
/// A session that was not heard of for this long makes room for another.
const IDLE_MAX_MS: u64 = 10 * 60 * 1000;

/// How long a mount may take to go dark before it is fenced, where it does not say.
pub(super) const DRAIN_DEFAULT_MS: u32 = 5_000;
/// And at most, whatever it says.
pub(super) const DRAIN_MAX_MS: u32 = 30_000;

pub(crate) type SessionId = [u8; SESSION_ID_LEN];

/// One mount's session. It belongs to the process that opened it, and is a holder of data keys from the first that it was
/// given on.
pub(super) struct Session {
    pub(super) id: SessionId,
    /// None for a session of before this kmsd was started: its key is lost, so that it can ask for nothing. It is kept
    /// because what it was given is not.
    key: Option<SessionKey>,
    pub(super) facts: Facts,
    /// None if the process had ended before this kmsd was started.
    process: Option<Arc<dyn Life>>,
    /// The CMKs under which it was given something; each is in the holder's row before it is in here.
    used: Mutex<BTreeSet<Uuid>>,
    heard_boot_ms: AtomicU64,
    acknowledged_epoch: AtomicU64,
    mount: Mutex<Mount>,
    /// Held by whoever writes or deletes its row, and from before that to after what goes with it in memory: so that it does
    /// not end while something is added to it.
    pub(super) row: Mutex<()>,
    /// Held by whoever makes it let go.
    pub(super) clearing: Mutex<()>,
    /// The CMK of the volume key of the domain that it serves, once it was given that.
    volume_key: Mutex<Option<Uuid>>,
    /// Up to which epoch it was made to let go.
    cleared_epoch: AtomicU64,
    is_over: AtomicBool,
    over: Arc<Notify>,
}

/// The end of a session's process, to be waited for, unless the session ends before.
pub(crate) struct Exit {
    pub(crate) session: SessionId,
    /// None if it has ended.
    pub(crate) process: Option<Arc<dyn Life>>,
    pub(crate) over: Arc<Notify>,
}

/// What a session never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) owner: Owner,
    /// When the process began, in clock ticks since the boot.
    pub(super) started_ticks: u64,
    pub(super) volume: Uuid,
    /// The key domain of the volume.
    pub(super) domain: u16,
    pub(super) drain_max_ms: u32,
}

/// A session's mount, as far as kmsd knows of it.
#[derive(Clone, Default)]
pub(super) struct Mount {
    /// Its anonymous device.
    pub(super) minor: Option<u32>,
    /// What it handed over.
    pub(super) reach: Option<Arc<dyn Reach>>,
}

/// Who may use a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) pid: i32,
}

impl Session {
    /// A session that was just agreed on.
    pub(super) fn new(key: SessionKey, facts: Facts, process: Arc<dyn Life>, boot_ms: u64) -> Self {
        Self {
            id: key.id(),
            key: Some(key),
            process: Some(process),
            ..Self::bare([0; SESSION_ID_LEN], facts, boot_ms)
        }
    }

    /// A session that an earlier kmsd left behind.
    pub(super) fn left_behind(
        id: SessionId,
        facts: Facts,
        process: Option<Arc<dyn Life>>,
        used: BTreeSet<Uuid>,
        mount: Mount,
    ) -> Self {
        Self {
            process,
            used: Mutex::new(used),
            mount: Mutex::new(mount),
            ..Self::bare(id, facts, 0)
        }
    }

    fn bare(id: SessionId, facts: Facts, boot_ms: u64) -> Self {
        Self {
            id,
            key: None,
            facts,
            process: None,
            used: Mutex::default(),
            heard_boot_ms: AtomicU64::new(boot_ms),
            acknowledged_epoch: AtomicU64::new(0),
            mount: Mutex::default(),
            row: Mutex::default(),
            clearing: Mutex::default(),
            volume_key: Mutex::default(),
            cleared_epoch: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            over: Arc::default(),
        }
    }

    /// # Errors
    /// `Rejected.SessionNotFound` for a session that was left behind.
    pub(super) fn key(&self) -> Result<&SessionKey, KmsError> {
        self.key.as_ref().ok_or_else(unknown)
    }

    /// Adds CMKs under which it is about to be given something, once `store` has made a row with all of them durable.
    pub(super) fn add_used(
        &self,
        ids: &BTreeSet<Uuid>,
        store: impl FnOnce(&BTreeSet<Uuid>) -> Result<(), KmsError>,
    ) -> Result<(), KmsError> {
        if self.uses_all(ids) {
            return Ok(());
        }
        self.add_and_store(ids, store)
    }

    /// The same, and stores the row in any case.
    pub(super) fn add_and_store(
        &self,
        ids: &BTreeSet<Uuid>,
        store: impl FnOnce(&BTreeSet<Uuid>) -> Result<(), KmsError>,
    ) -> Result<(), KmsError> {
        // Held over the store: nobody takes a key for used before its row is durable.
        let mut used = self.used.lock();
        let all = used.union(ids).copied().collect();
        store(&all)?;
        *used = all;
        Ok(())
    }

    pub(super) fn used(&self) -> BTreeSet<Uuid> {
        self.used.lock().clone()
    }

    pub(super) fn uses_all(&self, ids: &BTreeSet<Uuid>) -> bool {
        ids.is_subset(&self.used.lock())
    }

    pub(super) fn uses(&self, id: Uuid) -> bool {
        self.used.lock().contains(&id)
    }

    /// Notes what it was given under a CMK, if that is the volume key of the domain that it serves.
    pub(super) fn note_volume_key(&self, context: &BTreeMap<String, String>, key: Uuid) {
        let is = |name: &str, value: &str| context.get(name).is_some_and(|found| found == value);
        let (volume, domain) = (
            self.facts.volume.simple().to_string(),
            self.facts.domain.to_string(),
        );
        if is("purpose", "vk") && is("volume", &volume) && is("domain", &domain) {
            *self.volume_key.lock() = Some(key);
        }
    }

    /// The CMK of the volume key of the domain that it serves, if it was given that.
    pub(super) fn volume_key(&self) -> Option<Uuid> {
        *self.volume_key.lock()
    }

    pub(super) fn mount(&self) -> Mount {
        self.mount.lock().clone()
    }

    pub(super) fn set_mount(&self, mount: Mount) {
        *self.mount.lock() = mount;
    }

    pub(super) fn process(&self) -> Option<&Arc<dyn Life>> {
        self.process.as_ref()
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged_epoch.load(Ordering::Acquire)
    }

    /// It was made to let go of what was revoked up to `epoch`.
    pub(super) fn note_cleared(&self, epoch: u64) {
        self.cleared_epoch.fetch_max(epoch, Ordering::AcqRel);
    }

    pub(super) fn is_cleared(&self, epoch: u64) -> bool {
        self.cleared_epoch.load(Ordering::Acquire) >= epoch
    }

    pub(super) fn exit(&self) -> Exit {
        Exit {
            session: self.id,
            process: self.process.clone(),
            over: Arc::clone(&self.over),
        }
    }

    /// Whether it holds nothing any more, or another session of the same process has taken over what it holds.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// # Errors
    /// `Rejected.SessionNotFound` once it is over.
    pub(super) fn must_go_on(&self) -> Result<(), KmsError> {
        if self.is_over() { Err(unknown()) } else { Ok(()) }
    }

    pub(super) fn is_left_behind(&self) -> bool {
        self.key.is_none()
    }

    fn is_idle(&self, boot_ms: u64) -> bool {
        boot_ms.saturating_sub(self.heard_boot_ms.load(Ordering::Relaxed)) >= IDLE_MAX_MS
            && self.used.lock().is_empty()
    }
}

/// What OpenSession answers, beside the keystore's position.
pub(crate) struct OpenedSession {
    /// Names the session.
    pub(crate) id: [u8; SESSION_ID_LEN],
    /// The server's X25519 key.
    pub(crate) server_public: [u8; 32],
    /// The client counts from when it sent the call.
    pub(crate) lease_ttl_ms: u32,
}

/// The sessions, and a bell that rings when something about one has changed.
#[derive(Default)]
pub(super) struct Sessions {
    table: Mutex<BTreeMap<SessionId, Arc<Session>>>,
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Sessions {
    pub(super) fn holding(left_behind: Vec<Session>) -> Self {
        let table = left_behind
            .into_iter()
            .map(|session| (session.id, Arc::new(session)));
        Self {
            table: Mutex::new(table.collect()),
            ..Self::default()
        }
    }

    /// Adds a session; those of the same user that were not heard of for long, and hold nothing, make room.
    pub(super) fn insert(&self, session: Session, boot_ms: u64) -> Result<Arc<Session>, KmsError> {
        let uid = session.facts.owner.uid;
        let mut table = self.table.lock();
        table.retain(|_, held| held.facts.owner.uid != uid || !held.is_idle(boot_ms));
        let of_user = table.values().filter(|held| held.facts.owner.uid == uid).count();
        if of_user >= SESSIONS_PER_UID_MAX {
            let message = format!("uid {uid} has {SESSIONS_PER_UID_MAX} sessions, which is the limit");
            return Err(KmsError::new(Code::LimitExceeded, message));
        }
        let session = Arc::new(session);
        table.insert(session.id, Arc::clone(&session));
        Ok(session)
    }

    /// The session `id` of `owner`. Another's is as unknown as one that never was, or was left behind.
    pub(super) fn get(&self, id: &[u8], owner: Owner, boot_ms: u64) -> Result<Arc<Session>, KmsError> {
        let session = SessionId::try_from(id).ok().and_then(|id| self.any(id));
        let session = session
            .filter(|held| held.facts.owner == owner && !held.is_left_behind())
            .ok_or_else(unknown)?;
        session.heard_boot_ms.store(boot_ms, Ordering::Relaxed);
        Ok(session)
    }

    pub(super) fn any(&self, id: SessionId) -> Option<Arc<Session>> {
        self.table.lock().get(&id).map(Arc::clone)
    }

    /// Those that hold something, or anything under one key.
    pub(super) fn holders(&self, key: Option<Uuid>) -> Vec<Arc<Session>> {
        let holds = |held: &&Arc<Session>| match key {
            Some(key) => held.uses(key),
            None => !held.used.lock().is_empty(),
        };
        self.table.lock().values().filter(holds).map(Arc::clone).collect()
    }

    /// What the same process left with an earlier kmsd for the same domain of the same volume, and `fits`. Another domain's
    /// session would have to answer for keys that it knows nothing of.
    pub(super) fn left_behind_by(&self, facts: &Facts, fits: impl Fn(&Mount) -> bool) -> Vec<Arc<Session>> {
        let same = |held: &&Arc<Session>| {
            held.is_left_behind()
                && held.facts.owner == facts.owner
                && held.facts.started_ticks == facts.started_ticks
                && (held.facts.volume, held.facts.domain) == (facts.volume, facts.domain)
                && fits(&held.mount.lock())
        };
        self.table.lock().values().filter(same).map(Arc::clone).collect()
    }

    /// The session holds nothing any more.
    pub(super) fn remove(&self, session: &Session) {
        self.table.lock().remove(&session.id);
        session.is_over.store(true, Ordering::Release);
        session.over.notify_one();
        self.ring();
    }

    /// The client says that what was revoked up to `epoch` is gone. It never takes that back.
    pub(super) fn acknowledge(&self, session: &Session, epoch: u64) {
        session.acknowledged_epoch.fetch_max(epoch, Ordering::AcqRel);
        self.ring();
    }

    /// How often the bell rang; what is looked at after this is not older.
    pub(super) fn changes(&self) -> u64 {
        *self.changes.lock()
    }

    pub(super) fn ring(&self) {
        *self.changes.lock() += 1;
        self.changed.notify_all();
    }

    /// Waits until the bell has rung since `seen`, or for `limit`.
    pub(super) fn wait(&self, seen: u64, limit: Duration) {
        let mut changes = self.changes.lock();
        if *changes == seen {
            self.changed.wait_for(&mut changes, limit);
        }
    }

    pub(super) fn count(&self) -> usize {
        self.table.lock().len()
    }
}

fn unknown() -> KmsError {
    KmsError::new(
        Code::SessionNotFound,
        "no such session of this process; open another",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use kms_api::session::{KeyPair, Role};

    const OWNER: Owner = Owner { uid: 5, pid: 6 };

    /// A process that never ends.
    struct Immortal;

    impl Life for Immortal {
        fn has_exited(&self) -> bool {
            false
        }

        fn kill(&self) -> std::io::Result<()> {
            Ok(())
        }

        fn descriptor(&self) -> std::os::fd::BorrowedFd<'_> {
            unreachable!("nobody waits for it")
        }
    }

    fn facts(owner: Owner) -> Facts {
        Facts {
            owner,
            started_ticks: 1,
            volume: Uuid::from_bytes([3; 16]),
            domain: 0,
            drain_max_ms: DRAIN_DEFAULT_MS,
        }
    }

    fn session(id: u16, owner: Owner, boot_ms: u64) -> Session {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        let peer = KeyPair::generate().unwrap().public();
        let key = KeyPair::generate()
            .unwrap()
            .agree(Role::Server, bytes, peer)
            .unwrap();
        Session::new(key, facts(owner), Arc::new(Immortal), boot_ms)
    }

    fn refused_code<T>(result: Result<T, KmsError>) -> Code {
        result.err().unwrap().code
    }

    #[test]
    fn a_session_is_its_process_s_alone() {
        let sessions = Sessions::default();
        sessions.insert(session(1, OWNER, 0), 0).unwrap();
        let mut id = [0; 16];
        id[1] = 1;
        assert!(sessions.get(&id, OWNER, 1).is_ok());
        for owner in [Owner { uid: 6, ..OWNER }, Owner { pid: 7, ..OWNER }] {
            assert_eq!(refused_code(sessions.get(&id, owner, 1)), Code::SessionNotFound);
        }
        for id in [[0; 16].as_slice(), &id[..15], &[]] {
            assert_eq!(refused_code(sessions.get(id, OWNER, 1)), Code::SessionNotFound);
        }
    }

    #[test]
    fn one_left_behind_answers_to_nobody_and_is_found_by_its_own_process() {
        let used = BTreeSet::from([Uuid::from_bytes([9; 16])]);
        let mount = Mount {
            minor: Some(4),
            reach: None,
        };
        let left = Session::left_behind([1; 16], facts(OWNER), None, used, mount);
        let sessions = Sessions::holding(vec![left]);
        assert_eq!(
            refused_code(sessions.get(&[1; 16], OWNER, 1)),
            Code::SessionNotFound
        );
        let found = |facts: &Facts, minor| sessions.left_behind_by(facts, |mount| mount.minor == minor).len();
        assert_eq!(found(&facts(OWNER), Some(4)), 1);
        assert_eq!(found(&facts(OWNER), None), 0);
        let later = Facts {
            started_ticks: 2,
            ..facts(OWNER)
        };
        let others = [
            Facts {
                domain: 1,
                ..facts(OWNER)
            },
            Facts {
                volume: Uuid::nil(),
                ..facts(OWNER)
            },
        ];
        for other in [later].iter().chain(&others) {
            assert_eq!(found(other, Some(4)), 0);
        }
        assert_eq!(sessions.holders(None).len(), 1);
    }

    #[test]
    fn a_key_is_used_only_once_its_row_is_stored() {
        let one = session(1, OWNER, 0);
        let key = Uuid::from_bytes([9; 16]);
        let keys = BTreeSet::from([key]);
        let failing = |_: &BTreeSet<Uuid>| Err(KmsError::new(Code::InternalFailure, "no"));
        assert!(one.add_used(&keys, failing).is_err());
        assert!(!one.uses(key));
        one.add_used(&keys, |_| Ok(())).unwrap();
        assert!(one.uses(key));
        // Nothing is stored again.
        one.add_used(&keys, failing).unwrap();
    }

    #[test]
    fn a_user_has_so_many_sessions_until_some_that_hold_nothing_fall_silent() {
        let sessions = Sessions::default();
        for id in 0..256 {
            sessions.insert(session(id, OWNER, 0), 0).unwrap();
        }
        let one_more = sessions.insert(session(300, OWNER, 1), 1);
        assert_eq!(refused_code(one_more), Code::LimitExceeded);
        sessions
            .insert(session(301, Owner { uid: 9, pid: 1 }, 1), 1)
            .unwrap();
        let holder = sessions.any([0; 16]).unwrap();
        let key = BTreeSet::from([Uuid::from_bytes([9; 16])]);
        holder.add_used(&key, |_| Ok(())).unwrap();
        sessions
            .insert(session(302, OWNER, IDLE_MAX_MS), IDLE_MAX_MS)
            .unwrap();
        assert_eq!(sessions.count(), 3);
        assert!(sessions.any([0; 16]).is_some());
    }
}
