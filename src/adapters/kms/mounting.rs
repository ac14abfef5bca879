//! What the sessions of one mount share: what is handed to kmsd of it, the ledgers of the inodes that the kernel knows, and who
//! is told of changes.

use super::session::SessionKeys;
use crate::engine::{Domain, Ino, InodeLedger, KeyError};
use fuse_device::{AbortHandle, FuseDevice};
use kms_client::{Descriptors, Ledger};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

/// Told when the state of a domain's key may have changed.
pub type Ring = Arc<dyn Fn(Domain) + Send + Sync>;

/// What kmsd needs to drop what the kernel caches of a mount.
pub struct MountHandles {
    /// A clone of the FUSE device.
    pub device: FuseDevice,
    /// What ends the connection, where that could be had.
    pub abort: Option<AbortHandle>,
    /// Of the mount's anonymous device.
    pub device_minor: u32,
}

impl MountHandles {
    pub(super) fn descriptors<'a>(&'a self, ledger: &'a Ledger) -> Descriptors<'a> {
        Descriptors {
            device: self.device.as_fd(),
            ledger: ledger.as_fd(),
            abort: self.abort.as_ref().map(AsFd::as_fd),
            device_minor: self.device_minor,
        }
    }
}

/// The inodes that the kernel may cache, where kmsd can read them: for the volume's own domain all, since it darkens the whole
/// mount, for each other its own.
pub struct Ledgers {
    first: Arc<Ledger>,
    others: RwLock<BTreeMap<Domain, Arc<Ledger>>>,
}

impl Ledgers {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            first: Arc::new(Ledger::new()?),
            others: RwLock::default(),
        })
    }

    /// The ledger for a domain's session. A domain has it before the first of its inodes is found.
    pub(super) fn of(&self, domain: Domain) -> std::io::Result<Arc<Ledger>> {
        if domain == Domain::FIRST {
            return Ok(Arc::clone(&self.first));
        }
        let ledger = Arc::new(Ledger::new()?);
        self.others.write().insert(domain, Arc::clone(&ledger));
        Ok(ledger)
    }
}

impl InodeLedger for Ledgers {
    fn add(&self, ino: Ino) -> u64 {
        let others = self.others.read();
        let own = others.get(&ino.domain()).map_or(0, |ledger| ledger.add(ino.0));
        u64::from(self.first.add(ino.0)) << 32 | u64::from(own)
    }

    fn remove(&self, ino: Ino, place: u64) {
        self.first.remove((place >> 32) as u32);
        if let Some(ledger) = self.others.read().get(&ino.domain()) {
            ledger.remove(place as u32);
        }
    }
}

/// The sessions of one mount.
#[derive(Default)]
pub(super) struct Mounting {
    /// What is handed to kmsd with every session, once there is a mount.
    pub(super) handles: OnceLock<MountHandles>,
    ring: OnceLock<Ring>,
    /// Held while a session is added, and while all of them are given something.
    sessions: Mutex<Vec<Arc<SessionKeys>>>,
    watchers: Mutex<Vec<Watcher>>,
}

impl Mounting {
    /// Adds the session of another domain, and gives it what the others have.
    pub(super) fn add(&self, session: Arc<SessionKeys>) -> Result<(), KeyError> {
        let mut sessions = self.sessions.lock();
        if self.handles.get().is_some() {
            session.hand_over()?;
        }
        if let Some(ring) = self.ring.get() {
            self.watch_one(&session, ring)
                .map_err(|error| KeyError::Other(format!("no thread to watch the key with: {error}")))?;
        }
        sessions.push(session);
        Ok(())
    }

    /// Hands over the mount with every session but `first`'s, which did.
    pub(super) fn hand_over(&self) -> Result<(), KeyError> {
        self.sessions
            .lock()
            .iter()
            .try_for_each(|session| session.hand_over())
    }

    /// Watches every session, and those that are added.
    pub(super) fn watch(&self, first: &Arc<SessionKeys>, ring: Ring) -> std::io::Result<()> {
        let sessions = self.sessions.lock();
        let ring = self.ring.get_or_init(|| ring);
        let mut all = std::iter::once(first).chain(&*sessions);
        all.try_for_each(|session| self.watch_one(session, ring))
    }

    fn watch_one(&self, session: &Arc<SessionKeys>, ring: &Ring) -> std::io::Result<()> {
        let watcher = session.watch_alone(Arc::clone(ring))?;
        self.watchers.lock().push(watcher);
        Ok(())
    }

    /// Takes the session of a domain away, which is given up.
    pub(super) fn remove(&self, domain: Domain) {
        let is_it = |session: &Arc<SessionKeys>| session.domain() == domain;
        self.sessions.lock().retain(|session| !is_it(session));
        let gone: Vec<_> = self
            .watchers
            .lock()
            .extract_if(.., |watcher| is_it(&watcher.keys))
            .collect();
        // Each waits for its thread.
        drop(gone);
    }

    pub(super) fn stop_watching(&self) {
        let watchers = std::mem::take(&mut *self.watchers.lock());
        drop(watchers);
    }

    /// Gives up the sessions, each of which refers to this.
    pub(super) fn take(&self) -> Vec<Arc<SessionKeys>> {
        std::mem::take(&mut *self.sessions.lock())
    }
}

/// Watches one session until it is dropped.
pub(super) struct Watcher {
    pub(super) keys: Arc<SessionKeys>,
    pub(super) stop: Option<Sender<()>>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.keys.stop_watching();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watches the session panicked");
        }
    }
}

/// Watches every session of a mount until it is dropped.
pub struct Watching(pub(super) Arc<SessionKeys>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.end_watching();
    }
}
