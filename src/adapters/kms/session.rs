//! A session with kmsd, as the engine's [`KeyService`].

use super::mounting::{Ledgers, MountHandles, Mounting, Ring, Watcher, Watching};
use super::{connect, is_unknown_session, key_error, refusal_of_blob};
use crate::engine::{
    Anchor, Dependants, Domain, InodeLedger, IssuedKey, KeyContext, KeyError, KeyService, Position, Renewal,
};
use kms_client::{Client, ClientError, EncryptionContext, KeyState, Ledger, Session, Usage};
use kms_crypto::SecretKey;
use parking_lot::{Mutex, RwLock};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// How long the watcher waits before it tries again to watch.
const WATCH_PAUSE: Duration = Duration::from_millis(200);

/// Who holds keys.
#[derive(Debug, Clone)]
pub struct Holder {
    /// Of kmsd.
    pub socket: PathBuf,
    /// The volume's UUID.
    pub volume: [u8; 16],
    /// Its directory, for whoever asks kmsd what depends on a key.
    pub location: PathBuf,
    /// How long it may take to go dark.
    pub drain_max: Duration,
}

/// A session for one key domain, that is opened anew when kmsd was restarted. kmsd knows it by this process: it is opened after
/// the process has gone to the background.
pub struct SessionKeys {
    client: Client,
    holder: Holder,
    domain: Domain,
    cmk: String,
    /// None until it is first asked for something, and once it was given up.
    session: RwLock<Option<Arc<Session>>>,
    has_ended: AtomicBool,
    reopening: Mutex<()>,
    mounting: Arc<Mounting>,
    ledgers: Arc<Ledgers>,
    /// Of this session.
    ledger: Arc<Ledger>,
    /// The furthest that kmsd was seen to have come.
    seen: Mutex<Position>,
}

impl SessionKeys {
    /// Opens the session for the volume's own domain, whose keys `cmk`, an ARN, wraps.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn open(holder: Holder, cmk: &str) -> Result<Self, KeyError> {
        let ledgers = Arc::new(Ledgers::new().map_err(|error| no_ledger(&error))?);
        let keys = Self::of(
            holder,
            Domain::FIRST,
            cmk,
            Arc::default(),
            ledgers,
            Position::NONE,
        )?;
        keys.reopen(None)?;
        Ok(keys)
    }

    /// Those of a domain, whose session is opened when something is asked for. `seen`: how far kmsd has come in any case.
    fn of(
        holder: Holder,
        domain: Domain,
        cmk: &str,
        mounting: Arc<Mounting>,
        ledgers: Arc<Ledgers>,
        seen: Position,
    ) -> Result<Self, KeyError> {
        // One of its own: what is broken off for one domain goes on for others.
        let client = connect(&holder.socket)?;
        let ledger = ledgers.of(domain).map_err(|error| no_ledger(&error))?;
        Ok(Self {
            client,
            holder,
            domain,
            cmk: cmk.to_owned(),
            reopening: Mutex::new(()),
            mounting,
            ledgers,
            ledger,
            seen: Mutex::new(seen),
            session: RwLock::new(None),
            has_ended: AtomicBool::new(false),
        })
    }

    pub(super) fn domain(&self) -> Domain {
        self.domain
    }

    /// Where the inodes that the kernel knows are to be listed.
    #[must_use]
    pub fn ledgers(&self) -> Arc<dyn InodeLedger> {
        Arc::clone(&self.ledgers) as Arc<dyn InodeLedger>
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

    /// Hands over, with each session of the mount and each that follows one, what kmsd needs to revoke the mount without its help.
    /// To be called before the mount answers its first request.
    ///
    /// # Errors
    /// kmsd does not take it: it could not keep what it promises of this mount.
    pub fn attach(&self, handles: MountHandles) -> Result<(), KeyError> {
        self.mounting.handles.get_or_init(|| handles);
        self.hand_over()?;
        self.mounting.hand_over()
    }

    /// Hands it over with this session.
    pub(super) fn hand_over(&self) -> Result<(), KeyError> {
        let _no_session_is_opened = self.reopening.lock();
        match self.current() {
            Some(session) => self.hand_over_in(&session).map_err(|error| key_error(&error)),
            // It is handed over when there is one.
            None => Ok(()),
        }
    }

    fn current(&self) -> Option<Arc<Session>> {
        self.session.read().as_ref().map(Arc::clone)
    }

    fn hand_over_in(&self, session: &Session) -> Result<(), ClientError> {
        match self.mounting.handles.get() {
            Some(handles) => session.attach(&handles.descriptors(&self.ledger)),
            None => Ok(()),
        }
    }

    /// Calls `ring` whenever the state of a domain's key may have changed, as long as the answer is kept.
    ///
    /// # Errors
    /// No thread.
    pub fn watch(self: &Arc<Self>, ring: Ring) -> std::io::Result<Watching> {
        let watching = Watching(Arc::clone(self));
        self.mounting.watch(self, ring)?;
        Ok(watching)
    }

    pub(super) fn end_watching(&self) {
        self.mounting.stop_watching();
    }

    pub(super) fn stop_watching(&self) {
        self.client.stop_watching();
    }

    pub(super) fn watch_alone(self: &Arc<Self>, ring: Ring) -> std::io::Result<Watcher> {
        let keys = Arc::clone(self);
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || {
                let ring = || ring(keys.domain);
                // Until its other end is dropped.
                while stopped.recv_timeout(WATCH_PAUSE) == Err(RecvTimeoutError::Timeout) {
                    let session = keys.current();
                    if let Some(Ok(mut watch)) = session.map(|session| session.watch()) {
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

    /// Ends the sessions of every domain: nothing is held any more. The mount is gone by then.
    pub fn close(&self) {
        for other in self.mounting.take() {
            other.close_alone();
        }
        self.close_alone();
    }

    fn close_alone(&self) {
        self.has_ended.store(true, Ordering::Release);
        let _no_session_is_opened = self.reopening.lock();
        if let Some(session) = self.session.write().take()
            && let Err(error) = session.close()
        {
            // kmsd sees this process end.
            tracing::debug!(%error, "the session was not closed");
        }
    }

    /// Makes a call, in a new session if there is none, or kmsd no longer knows it.
    fn call<T>(&self, call: impl Fn(&Session) -> Result<T, ClientError>) -> Result<T, KeyError> {
        let session = match self.current() {
            Some(session) => session,
            None => self.reopen(None)?,
        };
        match call(&session) {
            Err(error) if is_unknown_session(&error) => {
                let session = self.reopen(Some(&session))?;
                call(&session)
            }
            other => other,
        }
        .map_err(|error| key_error(&error))
    }

    fn described_state(&self) -> Result<KeyState, KeyError> {
        let described = self.client.describe_key(&self.cmk);
        described
            .and_then(|key| KeyState::of(&key))
            .map_err(|error| key_error(&error))
    }

    /// The session that follows `lost`, opened by whoever comes first.
    fn reopen(&self, lost: Option<&Arc<Session>>) -> Result<Arc<Session>, KeyError> {
        let _one_at_a_time = self.reopening.lock();
        if self.has_ended.load(Ordering::Acquire) {
            return Err(KeyError::Other("the session was given up".to_owned()));
        }
        if let Some(current) = self.current()
            && lost.is_none_or(|lost| !Arc::ptr_eq(&current, lost))
        {
            return Ok(current);
        }
        let before = *self.seen.lock();
        let open = || {
            let Holder {
                volume, drain_max, ..
            } = self.holder;
            let session = self.client.open_session(volume, self.domain.0, drain_max)?;
            // Before anything is asked for in it.
            self.hand_over_in(&session)?;
            Ok(session)
        };
        let session = open().map_err(|error: ClientError| key_error(&error))?;
        self.note(&before, session.position())?;
        let session = Arc::new(session);
        *self.session.write() = Some(Arc::clone(&session));
        Ok(session)
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
            None => self.described_state()?,
        };
        // What is given up for that is gone for good: it is to be said of this very key.
        let state = match state {
            KeyState::Destroyed => self.described_state()?,
            state => state,
        };
        Ok(Renewal {
            lease: renewal.lease_ttl,
            epoch: renewal.revocation_epoch,
            state: match state {
                KeyState::Enabled => Ok(()),
                KeyState::Disabled | KeyState::PendingDeletion => Err(KeyError::Revoked),
                KeyState::PendingImport => Err(KeyError::Erased),
                KeyState::Destroyed => Err(KeyError::Destroyed),
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

    fn for_domain(&self, domain: Domain, cmk_arn: &str) -> Result<Arc<dyn KeyService>, KeyError> {
        let (mounting, ledgers) = (Arc::clone(&self.mounting), Arc::clone(&self.ledgers));
        let holder = self.holder.clone();
        let keys = Arc::new(Self::of(
            holder,
            domain,
            cmk_arn,
            mounting,
            ledgers,
            self.position(),
        )?);
        self.mounting.add(Arc::clone(&keys))?;
        Ok(keys)
    }

    fn end(&self) {
        self.mounting.remove(self.domain);
        self.close_alone();
    }

    fn report(&self, dependants: Dependants) -> Result<(), KeyError> {
        let usage = Usage {
            location: &self.holder.location,
            files: dependants.inodes,
            bytes: dependants.bytes,
        };
        self.call(|session| match dependants.is_removed {
            true => session.report_removed(&self.cmk),
            false => session.report_usage(&self.cmk, &usage),
        })
    }

    fn anchor(&self) -> Result<Option<Anchor>, KeyError> {
        let found = self.call(|session| session.anchor())?;
        Ok(found.map(|found| Anchor {
            commit_seq: found.commit_seq,
            mac: found.mac,
            ino_limit: found.ino_limit,
        }))
    }

    fn advance_anchor(&self, from: Option<Anchor>, to: Anchor) -> Result<(), KeyError> {
        let (from, to) = (from.map(anchor_for_kmsd), anchor_for_kmsd(to));
        self.call(|session| session.advance_anchor(from.as_ref(), &to))
    }

    fn accept_restore(&self, to: Anchor) -> Result<(), KeyError> {
        self.call(|session| session.accept_restore(&anchor_for_kmsd(to)))
    }

    fn refuse(&self, refusing: bool) {
        self.client.refuse(refusing);
    }
}

fn anchor_for_kmsd(anchor: Anchor) -> kms_client::Anchor {
    kms_client::Anchor {
        commit_seq: anchor.commit_seq,
        mac: anchor.mac,
        ino_limit: anchor.ino_limit,
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

fn no_ledger(error: &std::io::Error) -> KeyError {
    KeyError::Other(format!("no memory to list inodes in: {error}"))
}
