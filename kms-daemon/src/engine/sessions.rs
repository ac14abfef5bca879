//! Filesystem sessions: who holds data keys, and under which CMKs.

use kms_api::session::{SESSION_ID_LEN, SessionKey};
use kms_api::{Code, KmsError};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// A client must renew within this long.
pub(super) const LEASE_TTL_MS: u32 = 10_000;
/// Sessions of one user, at most.
const SESSIONS_PER_UID_MAX: usize = 256;
/// A session that was not heard of for this long makes room for another.
const IDLE_MAX_MS: u64 = 10 * 60 * 1000;

pub(super) type SessionId = [u8; SESSION_ID_LEN];

/// One mount's session. It belongs to the process that opened it.
pub(super) struct Session {
    pub(super) key: SessionKey,
    owner: Owner,
    /// The CMKs under which it was given something.
    used: Mutex<BTreeSet<Uuid>>,
    heard_boot_ms: AtomicU64,
    acknowledged_epoch: AtomicU64,
}

/// Who may use a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) pid: i32,
}

impl Session {
    pub(super) fn new(key: SessionKey, owner: Owner, boot_ms: u64) -> Self {
        Self {
            key,
            owner,
            used: Mutex::default(),
            heard_boot_ms: AtomicU64::new(boot_ms),
            acknowledged_epoch: AtomicU64::new(0),
        }
    }

    /// Notes CMKs before anything under them leaves.
    pub(super) fn note_used(&self, ids: impl Iterator<Item = Uuid>) {
        self.used.lock().extend(ids);
    }

    pub(super) fn used(&self) -> Vec<Uuid> {
        self.used.lock().iter().copied().collect()
    }

    pub(super) fn uses(&self, id: Uuid) -> bool {
        self.used.lock().contains(&id)
    }

    /// The client says that what was revoked up to `epoch` is gone. It never takes that back.
    pub(super) fn acknowledge(&self, epoch: u64) {
        self.acknowledged_epoch.fetch_max(epoch, Ordering::AcqRel);
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

#[derive(Default)]
pub(super) struct Sessions(Mutex<BTreeMap<SessionId, Arc<Session>>>);

impl Sessions {
    /// Adds a session; those of the same user that were not heard of for long make room.
    pub(super) fn insert(&self, session: Session, boot_ms: u64) -> Result<(), KmsError> {
        let owner = session.owner;
        let mut sessions = self.0.lock();
        sessions.retain(|_, held| {
            held.owner.uid != owner.uid
                || boot_ms.saturating_sub(held.heard_boot_ms.load(Ordering::Relaxed)) < IDLE_MAX_MS
        });
        let of_user = sessions
            .values()
            .filter(|held| held.owner.uid == owner.uid)
            .count();
        if of_user >= SESSIONS_PER_UID_MAX {
            let message = format!(
                "uid {} has {SESSIONS_PER_UID_MAX} sessions, which is the limit",
                owner.uid
            );
            return Err(KmsError::new(Code::LimitExceeded, message));
        }
        sessions.insert(session.key.id(), Arc::new(session));
        Ok(())
    }

    /// The session `id` of `owner`. Another's is as unknown as one that never was.
    pub(super) fn get(&self, id: &[u8], owner: Owner, boot_ms: u64) -> Result<Arc<Session>, KmsError> {
        let sessions = self.0.lock();
        let held = SessionId::try_from(id).ok().and_then(|id| sessions.get(&id));
        let session = held.filter(|held| held.owner == owner).ok_or_else(unknown)?;
        session.heard_boot_ms.store(boot_ms, Ordering::Relaxed);
        Ok(Arc::clone(session))
    }

    pub(super) fn remove(&self, session: &Session) {
        self.0.lock().remove(&session.key.id());
    }

    /// How many sessions were given something under a key.
    pub(super) fn holders_of(&self, id: Uuid) -> usize {
        self.0.lock().values().filter(|session| session.uses(id)).count()
    }

    pub(super) fn count(&self) -> usize {
        self.0.lock().len()
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

    fn session(id: u16, owner: Owner, boot_ms: u64) -> Session {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        let peer = KeyPair::generate().unwrap().public();
        let key = KeyPair::generate()
            .unwrap()
            .agree(Role::Server, bytes, peer)
            .unwrap();
        Session::new(key, owner, boot_ms)
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
    fn a_user_has_so_many_sessions_until_some_fall_silent() {
        let sessions = Sessions::default();
        for id in 0..256 {
            sessions.insert(session(id, OWNER, 0), 0).unwrap();
        }
        let one_more = sessions.insert(session(300, OWNER, 1), 1);
        assert_eq!(refused_code(one_more), Code::LimitExceeded);
        sessions
            .insert(session(301, Owner { uid: 9, pid: 1 }, 1), 1)
            .unwrap();
        sessions
            .insert(session(302, OWNER, IDLE_MAX_MS), IDLE_MAX_MS)
            .unwrap();
        assert_eq!(sessions.count(), 2);
    }
}
