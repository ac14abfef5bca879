//! The engine's [`KeyService`] over a session with kmsd.

use crate::engine::{Ino, InodeLedger, IssuedKey, KeyContext, KeyError, KeyService, Position, Renewal};
use fuse_device::{AbortHandle, FuseDevice};
use kms_client::{
    Client, ClientError, Code, Descriptors, EncryptionContext, KeyState, KmsError, Ledger, Session,
};
use kms_crypto::SecretKey;
use parking_lot::{Mutex, RwLock};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest wait for one call to kmsd: a FUSE request that waits longer is a stuck process.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the watcher waits before it tries again to watch.
const WATCH_PAUSE: Duration = Duration::from_millis(200);

/// A session that is opened anew when kmsd was restarted. kmsd knows it by this process: it is opened after the
/// process has gone to the background.
pub struct SessionKeys {
    client: Client,
    volume: [u8; 16],
    cmk: String,
    drain_max: Duration,
    session: RwLock<Arc<Session>>,
    reopening: Mutex<()>,
    /// What is handed to kmsd with every session, once there is a mount.
    mount: OnceLock<MountHandles>,
    /// The furthest that kmsd was seen to have come.
    seen: Mutex<Position>,
}

/// What kmsd needs to drop what the kernel caches of a mount.
pub struct MountHandles {
    /// A clone of the FUSE device.
    pub device: FuseDevice,
    /// The inodes that the kernel may cache.
    pub ledger: Arc<Ledger>,
    /// What ends the connection, where that could be had.
    pub abort: Option<AbortHandle>,
    /// Of the mount's anonymous device.
    pub device_minor: u32,
}

impl MountHandles {
    fn descriptors(&self) -> Descriptors<'_> {
        Descriptors {
            device: self.device.as_fd(),
            ledger: self.ledger.as_fd(),
            abort: self.abort.as_ref().map(AsFd::as_fd),
            device_minor: self.device_minor,
        }
    }
}

/// Lists inodes where kmsd can read them.
pub struct SharedLedger(pub Arc<Ledger>);

impl InodeLedger for SharedLedger {
    fn add(&self, ino: Ino) -> u32 {
        self.0.add(ino.0)
    }

    fn remove(&self, place: u32) {
        self.0.remove(place);
    }
}

/// Connects to the kmsd at `socket`.
///
/// # Errors
/// If nothing answers there.
pub fn connect(socket: &Path) -> Result<Client, KeyError> {
    Client::connect(socket, CALL_TIMEOUT).map_err(|error| key_error(&error))
}

impl SessionKeys {
    /// Opens a session for the volume whose keys `cmk`, an ARN, wraps. `drain_max` is how long it may take to go dark.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn open(client: Client, volume: [u8; 16], cmk: &str, drain_max: Duration) -> Result<Self, KeyError> {
        let session = client
            .open_session(volume, 0, drain_max)
            .map_err(|error| key_error(&error))?;
        Ok(Self {
            client,
            volume,
            cmk: cmk.to_owned(),
            drain_max,
            reopening: Mutex::new(()),
            mount: OnceLock::new(),
            seen: Mutex::new(position(session.position())),
            session: RwLock::new(Arc::new(session)),
        })
    }

    /// Takes in how far kmsd has come, by an answer to what was asked when `before` had been seen.
    fn note(&self, before: &Position, now: kms_client::Position) -> Result<(), KeyError> {
        let now = position(now);
        if !now.follows(before) {
            return Err(KeyError::RolledBack);
        }
        let mut seen = self.seen.lock();
        // Answers may overtake each other.
        if now.follows(&seen) {
            *seen = now;
        }
        Ok(())
    }

    /// Hands over, with this session and each that follows it, what kmsd needs to revoke a mount without its help. To be
    /// called before the mount answers its first request.
    ///
    /// # Errors
    /// kmsd does not take it: it could not keep what it promises of this mount.
    pub fn attach(&self, mount: MountHandles) -> Result<(), KeyError> {
        let _no_session_is_opened = self.reopening.lock();
        let mount = self.mount.get_or_init(|| mount);
        let session = Arc::clone(&self.session.read());
        session
            .attach(&mount.descriptors())
            .map_err(|error| key_error(&error))
    }

    /// Calls `ring` whenever a key's state may have changed, until the session is closed.
    ///
    /// # Errors
    /// No thread.
    pub fn watch(self: &Arc<Self>, ring: impl Fn() + Send + 'static) -> std::io::Result<Watcher> {
        let keys = Arc::clone(self);
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || {
                // Until its other end is dropped.
                while stopped.recv_timeout(WATCH_PAUSE) == Err(RecvTimeoutError::Timeout) {
                    let session = Arc::clone(&keys.session.read());
                    if let Ok(mut watch) = session.watch() {
                        // What changed since the last renewal was missed.
                        ring();
                        while watch.wait() {
                            ring();
                        }
                    }
                    // A session that kmsd knows no more is opened anew by the renewal.
                    ring();
                }
            })?;
        Ok(Watcher {
            keys: Arc::clone(self),
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Ends the session: nothing is held any more. The mount is gone by then.
    pub fn close(&self) {
        if let Err(error) = self.session.read().close() {
            // kmsd sees this process end.
            tracing::debug!(%error, "the session was not closed");
        }
    }

    /// Makes a call, in a new session if kmsd no longer knows this one.
    fn call<T>(&self, call: impl Fn(&Session) -> Result<T, ClientError>) -> Result<T, KeyError> {
        let session = Arc::clone(&self.session.read());
        match call(&session) {
            Err(error) if is_unknown_session(&error) => {
                let session = self.reopen(&session)?;
                call(&session)
            }
            other => other,
        }
        .map_err(|error| key_error(&error))
    }

    fn described_state(&self) -> Result<KeyState, ClientError> {
        KeyState::of(&self.client.describe_key(&self.cmk)?)
    }

    /// The session that follows `lost`, opened by whoever comes first.
    fn reopen(&self, lost: &Arc<Session>) -> Result<Arc<Session>, KeyError> {
        let _one_at_a_time = self.reopening.lock();
        let current = Arc::clone(&self.session.read());
        if !Arc::ptr_eq(&current, lost) {
            return Ok(current);
        }
        let before = *self.seen.lock();
        let open = || {
            let session = self.client.open_session(self.volume, 0, self.drain_max)?;
            // Before anything is asked for in it.
            if let Some(mount) = self.mount.get() {
                session.attach(&mount.descriptors())?;
            }
            Ok(session)
        };
        let session = open().map_err(|error: ClientError| key_error(&error))?;
        self.note(&before, session.position())?;
        let session = Arc::new(session);
        *self.session.write() = Arc::clone(&session);
        Ok(session)
    }
}

/// Watches until it is dropped.
pub struct Watcher {
    keys: Arc<SessionKeys>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.keys.client.stop_watching();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watches the session panicked");
        }
    }
}

impl KeyService for SessionKeys {
    fn issue(&self, contexts: &[KeyContext]) -> Result<Vec<IssuedKey>, KeyError> {
        let contexts: Vec<_> = contexts.iter().map(encryption_context).collect();
        let issued = self.call(|session| session.issue_data_keys(&self.cmk, &contexts))?;
        Ok(issued
            .into_iter()
            .map(|key| IssuedKey {
                wrapped: key.wrapped,
                key: key.key,
            })
            .collect())
    }

    fn open(&self, items: &[(KeyContext, Vec<u8>)]) -> Result<Vec<Result<SecretKey, KeyError>>, KeyError> {
        let items: Vec<_> = items
            .iter()
            .map(|(context, blob)| (encryption_context(context), blob.clone()))
            .collect();
        let opened = self.call(|session| session.open_data_keys(&items))?;
        Ok(opened
            .into_iter()
            .map(|key| key.map_err(|error| refusal_of_blob(&error)))
            .collect())
    }

    fn renew(&self, limit: Duration) -> Result<Renewal, KeyError> {
        let before = *self.seen.lock();
        let renewal = self.call(|session| session.renew(limit))?;
        self.note(&before, renewal.position)?;
        let listed = renewal
            .keys
            .iter()
            .find(|key| key.arn == self.cmk)
            .map(|key| key.state);
        let state = match listed {
            Some(state) => state,
            // A new session was given nothing yet, and is told of no key; ours may have been disabled meanwhile.
            None => self.described_state().map_err(|error| key_error(&error))?,
        };
        Ok(Renewal {
            lease: renewal.lease_ttl,
            epoch: renewal.revocation_epoch,
            state: match state {
                KeyState::Enabled => Ok(()),
                KeyState::Disabled | KeyState::PendingDeletion => Err(KeyError::Revoked),
                KeyState::PendingImport | KeyState::Destroyed => Err(KeyError::Erased),
            },
        })
    }

    fn acknowledge(&self, epoch: u64) -> Result<(), KeyError> {
        self.call(|session| session.acknowledge(epoch))
    }

    fn position(&self) -> Position {
        *self.seen.lock()
    }

    fn expect(&self, seen: Position) -> Result<(), KeyError> {
        let now = self.position();
        now.follows(&seen).then_some(()).ok_or(KeyError::RolledBack)
    }

    fn refuse(&self, refusing: bool) {
        self.client.refuse(refusing);
    }
}

fn position(position: kms_client::Position) -> Position {
    Position {
        keystore: position.keystore_id,
        epoch: position.epoch,
        state_seq: position.state_seq,
        audit_records: position.audit_records,
        audit_head: position.audit_head,
    }
}

fn encryption_context(context: &KeyContext) -> EncryptionContext {
    match context {
        KeyContext::VolumeKey {
            volume,
            domain,
            superblock_hash,
        } => EncryptionContext::volume_key(*volume, domain.0, *superblock_hash),
        KeyContext::Dek { volume, ino } => EncryptionContext::data_key(*volume, ino.domain().0, ino.0),
    }
}

fn is_unknown_session(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Kms(KmsError {
            code: Code::SessionNotFound,
            ..
        })
    )
}

fn key_error(error: &ClientError) -> KeyError {
    match error {
        ClientError::Unreachable(message) => KeyError::Unreachable(message.clone()),
        ClientError::Kms(error) => refusal(error),
        other => KeyError::Other(other.to_string()),
    }
}

/// What it means that kmsd did not open a blob: as a parameter, the blob or its context is wrong.
fn refusal_of_blob(error: &KmsError) -> KeyError {
    if error.code == Code::InvalidParameter {
        KeyError::BadBlob
    } else {
        refusal(error)
    }
}

/// What an answer of kmsd means to the engine.
fn refusal(error: &KmsError) -> KeyError {
    match error.code {
        Code::Disabled | Code::PendingDeletion => KeyError::Revoked,
        Code::KeyNotFound | Code::PendingImport => KeyError::Erased,
        Code::NoPermission => KeyError::Denied,
        Code::ServiceUnavailable | Code::Throttling => KeyError::Unreachable(error.to_string()),
        _ => KeyError::Other(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_of_the_kms_has_its_meaning() {
        let meaning = |code| refusal(&KmsError::new(code, "why"));
        assert_eq!(meaning(Code::Disabled), KeyError::Revoked);
        assert_eq!(meaning(Code::PendingDeletion), KeyError::Revoked);
        assert_eq!(meaning(Code::KeyNotFound), KeyError::Erased);
        assert_eq!(meaning(Code::NoPermission), KeyError::Denied);
        assert!(matches!(
            meaning(Code::ServiceUnavailable),
            KeyError::Unreachable(_)
        ));
        assert!(matches!(meaning(Code::InvalidParameter), KeyError::Other(_)));
    }
}
