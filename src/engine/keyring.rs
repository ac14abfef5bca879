//! The state of a domain's CMK as the mount knows it, and every key that hangs from it: one state machine, one gate
//! through which each operation passes, one place where all keys are dropped.
//!
//! States: Live -> Draining -> dark (Revoked, Erased, Denied or Unreachable) -> Live. Operations hold the gate for
//! reading; a change of state takes it for writing, which is the barrier that ends all operations begun before.

use super::error::{Error, Result};
use super::filekeys::FileKeys;
use super::format::superblock::Version;
use super::keys::{DomainKeys, FileKey};
use super::keyservice::{KeyContext, KeyError, KeyService, Position, Renewal};
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard, before_call_to_kms, rank};
use super::types::{Domain, Ino};
use kms_crypto::SecretKey;
use std::sync::Arc;
use std::time::Duration;

/// Most keys in one call to the KMS.
pub(crate) const KEYS_PER_CALL_MAX: usize = 256;

/// Whether a domain's keys may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Keys are in memory and may be used.
    Live,
    /// Going dark: what the kernel still holds dirty is taken in; nothing else is served.
    Draining,
    /// The CMK is disabled or pending deletion.
    Revoked,
    /// The CMK or its material is destroyed.
    Erased,
    /// The KMS refuses this mount.
    Denied,
    /// The KMS has not been reached within its lease.
    Unreachable,
}

/// What an operation wants of the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Serve a program: only while Live.
    Serve,
    /// Take in what was accepted before: while Live or Draining.
    Drain,
}

struct Gate {
    state: KeyState,
    keys: Option<Arc<DomainKeys>>,
}

/// A gate that is held, in whatever state it is.
pub(crate) struct Hold<'k>(RwLockReadGuard<'k, Gate>);

/// See [`Keyring::break_off`].
pub(crate) struct BrokenOff<'k>(&'k Keyring);

impl Drop for BrokenOff<'_> {
    fn drop(&mut self) {
        let mut closers = self.0.closers.lock();
        *closers -= 1;
        if *closers == 0 {
            self.0.service.refuse(false);
            self.0.closing.store(false, Ordering::Release);
        }
    }
}

/// The key of an operation that passed the gate; the state cannot change while one is held.
pub(crate) struct Admission<'k> {
    keys: Arc<DomainKeys>,
    draining: bool,
    /// None for the one operation that runs while the gate is shut, and where somebody else holds it as long.
    _gate: Option<RwLockReadGuard<'k, Gate>>,
}

impl Admission<'_> {
    pub(crate) fn keys(&self) -> &Arc<DomainKeys> {
        &self.keys
    }

    /// The same, for as long as this one is held.
    pub(crate) fn share(&self) -> Admission<'_> {
        Admission {
            keys: Arc::clone(&self.keys),
            draining: self.draining,
            _gate: None,
        }
    }

    /// Admission to a domain that nobody else knows of yet.
    pub(crate) fn to_new(keys: Arc<DomainKeys>) -> Self {
        Self {
            keys,
            draining: false,
            _gate: None,
        }
    }

    /// Whether the keys are about to go.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining
    }
}

/// A DEK as it is stored, and the key derived from it.
pub(crate) type FreshKey = (Arc<[u8]>, Arc<FileKey>);

/// Whose volume key it is, and how it is stored.
#[derive(Debug, Clone)]
pub(crate) struct VolumeKey {
    pub(crate) volume: [u8; 16],
    pub(crate) version: Version,
    pub(crate) domain: Domain,
    pub(crate) superblock_hash: [u8; 32],
    pub(crate) wrapped: Vec<u8>,
}

impl VolumeKey {
    /// What it is bound to.
    pub(crate) fn context(&self) -> KeyContext {
        KeyContext::VolumeKey {
            volume: self.volume,
            domain: self.domain,
            superblock_hash: self.superblock_hash,
        }
    }
}

/// The keys of a domain.
pub(crate) struct Keyring {
    service: Arc<dyn KeyService>,
    volume_key: VolumeKey,
    gate: RwLock<Gate, rank::Gate>,
    /// It is going dark: nothing that begins is served, and none of it waits for the gate, which may be shut for as long as
    /// storing takes.
    is_leaving: AtomicBool,
    /// Somebody waits for the operations under way to end.
    closing: AtomicBool,
    /// How many do.
    closers: Mutex<usize, rank::Closing>,
    /// The time for what was accepted before is over.
    is_drain_over: AtomicBool,
    files: Arc<FileKeys>,
    calls: AtomicU64,
}

impl Keyring {
    /// A keyring without a key, until it is lit. Files' keys are kept in `files`.
    pub(crate) fn dark(service: Arc<dyn KeyService>, volume_key: VolumeKey, files: Arc<FileKeys>) -> Self {
        let gate = Gate {
            state: KeyState::Revoked,
            keys: None,
        };
        Self::with_gate(service, volume_key, gate, files)
    }

    /// A keyring with keys that are there.
    pub(crate) fn lit(
        service: Arc<dyn KeyService>,
        volume_key: VolumeKey,
        keys: Arc<DomainKeys>,
        files: Arc<FileKeys>,
    ) -> Self {
        let gate = Gate {
            state: KeyState::Live,
            keys: Some(keys),
        };
        Self::with_gate(service, volume_key, gate, files)
    }

    fn with_gate(
        service: Arc<dyn KeyService>,
        volume_key: VolumeKey,
        gate: Gate,
        files: Arc<FileKeys>,
    ) -> Self {
        Self {
            service,
            gate: RwLock::numbered(volume_key.domain.0.into(), gate),
            volume_key,
            is_leaving: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            closers: Mutex::default(),
            is_drain_over: AtomicBool::new(false),
            files,
            calls: AtomicU64::new(0),
        }
    }

    /// Opens the volume key.
    pub(crate) fn open(
        service: Arc<dyn KeyService>,
        volume_key: VolumeKey,
        files: Arc<FileKeys>,
    ) -> std::result::Result<Self, KeyError> {
        let ring = Self::dark(service, volume_key, files);
        ring.relight()?;
        Ok(ring)
    }

    pub(crate) fn service(&self) -> &Arc<dyn KeyService> {
        &self.service
    }

    pub(crate) fn volume_key(&self) -> &VolumeKey {
        &self.volume_key
    }

    /// Keeps the state as it is, whatever that is.
    pub(crate) fn hold(&self) -> Hold<'_> {
        Hold(self.gate.read())
    }

    /// Passes the gate, or says why not.
    pub(crate) fn admit(&self, purpose: Purpose) -> Result<Admission<'_>> {
        if purpose == Purpose::Serve && self.is_leaving.load(Ordering::Acquire) {
            return Err(refusal(KeyState::Draining));
        }
        let gate = self.gate.read();
        let (keys, draining) = self.keys_for(&gate, purpose)?;
        Ok(Admission {
            keys,
            draining,
            _gate: Some(gate),
        })
    }

    /// The same by the gate that is held.
    pub(crate) fn admit_held<'k>(&self, hold: &'k Hold<'_>, purpose: Purpose) -> Result<Admission<'k>> {
        let (keys, draining) = self.keys_for(&hold.0, purpose)?;
        Ok(Admission {
            keys,
            draining,
            _gate: None,
        })
    }

    fn keys_for(&self, gate: &Gate, purpose: Purpose) -> Result<(Arc<DomainKeys>, bool)> {
        match (gate.state, purpose, &gate.keys) {
            (KeyState::Draining, ..) if self.is_drain_over() => Err(Error::KeyRevoked),
            (KeyState::Live, _, Some(keys)) | (KeyState::Draining, Purpose::Drain, Some(keys)) => {
                Ok((Arc::clone(keys), gate.state == KeyState::Draining))
            }
            (state, ..) => Err(refusal(state)),
        }
    }

    pub(crate) fn state(&self) -> KeyState {
        self.gate.read().state
    }

    /// Calls made to the KMS so far, renewals aside.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Live -> Draining. Returns once every operation begun before has ended.
    pub(crate) fn begin_draining(&self) {
        self.is_leaving.store(true, Ordering::Release);
        let mut gate = self.close();
        self.is_drain_over.store(false, Ordering::Release);
        gate.state = KeyState::Draining;
    }

    /// From now on, until it is live again, nothing more is taken in.
    pub(crate) fn end_draining(&self) {
        self.is_drain_over.store(true, Ordering::Release);
    }

    /// Whether the time for what was accepted before is over.
    pub(crate) fn is_drain_over(&self) -> bool {
        self.is_drain_over.load(Ordering::Acquire)
    }

    /// The gate, once every operation begun before has ended. Long ones are asked to break off, and none waits for the KMS.
    fn close(&self) -> RwLockWriteGuard<'_, Gate> {
        let _broken_off = self.break_off();
        self.gate.write()
    }

    /// Has operations broken off that take long or wait for the KMS, until the guard is dropped: a gate that they hold, this one
    /// or the first, is to be shut.
    pub(crate) fn break_off(&self) -> BrokenOff<'_> {
        let mut closers = self.closers.lock();
        *closers += 1;
        self.closing.store(true, Ordering::Release);
        self.service.refuse(true);
        BrokenOff(self)
    }

    /// To be asked now and then by an operation that may take long.
    ///
    /// # Errors
    /// That the keys are going, and the operation is to end.
    pub(crate) fn go_on(&self) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            Err(Error::KeyRevoked)
        } else {
            Ok(())
        }
    }

    /// -> dark: waits until every operation has ended, lets `last` use the keys alone, and wipes them.
    pub(crate) fn go_dark(&self, state: KeyState, last: impl FnOnce(Admission<'_>)) {
        self.is_leaving.store(true, Ordering::Release);
        let mut gate = self.close();
        if let Some(keys) = gate.keys.take() {
            last(Admission {
                keys,
                draining: true,
                _gate: None,
            });
        }
        gate.state = state;
        self.files.clear(self.volume_key.domain);
        // From here on the state says why not.
        self.is_leaving.store(false, Ordering::Release);
    }

    /// Dark for another reason than before (disabled, then destroyed).
    pub(crate) fn restate(&self, state: KeyState) {
        self.gate.write().state = state;
    }

    /// Dark -> Live: asks for the volume key again.
    pub(crate) fn relight(&self) -> std::result::Result<(), KeyError> {
        let VolumeKey {
            volume,
            version,
            domain,
            ..
        } = self.volume_key;
        before_call_to_kms();
        self.calls.fetch_add(1, Ordering::Relaxed);
        let wrapped = self.volume_key.wrapped.clone();
        let mut opened = self.service.open(&[(self.volume_key.context(), wrapped)])?;
        let vk = opened
            .pop()
            .unwrap_or(Err(KeyError::Other("no answer for the volume key".to_owned())))?;
        let keys = DomainKeys::new(&vk, volume, version, domain)
            .map_err(|error| KeyError::Other(error.to_string()))?;
        let mut gate = self.gate.write();
        gate.keys = Some(Arc::new(keys));
        gate.state = KeyState::Live;
        Ok(())
    }

    /// The key of a file, if it is in memory.
    pub(crate) fn cached_file_key(&self, ino: Ino) -> Option<Arc<FileKey>> {
        self.files.get(ino)
    }

    /// Asks the KMS for the key of a file, and for others in the same call, whose failures show when they are used.
    pub(crate) fn fetch_file_key(
        &self,
        ino: Ino,
        wrapped: &[u8],
        others: Vec<(Ino, Vec<u8>)>,
    ) -> Result<Arc<FileKey>> {
        let mut wanted = vec![(ino, wrapped.to_vec())];
        wanted.extend(others);
        let opened = self
            .unwrap_deks(&wanted)
            .map_err(|error| self.failure(ino, &error))?;
        let mut opened = wanted.iter().zip(opened);
        let first = opened.next().map(|(_, dek)| dek);
        for ((other, _), dek) in opened {
            if let Ok(dek) = dek {
                self.remember(*other, self.file_key_of(*other, &dek));
            }
        }
        let dek = first.unwrap_or(Err(KeyError::Other("no answer for a data key".to_owned())));
        let key = self.file_key_of(ino, &dek.map_err(|error| key_failure(ino, &error))?);
        self.remember(ino, Arc::clone(&key));
        Ok(key)
    }

    /// Asks the KMS for something that it does for whoever was given the volume key; and, where a session of this mount was opened
    /// anew, for that key before.
    pub(crate) fn with_volume_key<T>(
        &self,
        ask: impl Fn(&dyn KeyService) -> std::result::Result<T, KeyError>,
    ) -> std::result::Result<T, KeyError> {
        before_call_to_kms();
        match ask(&*self.service) {
            Err(KeyError::Denied) => {}
            answered => return answered,
        }
        let item = (self.volume_key.context(), self.volume_key.wrapped.clone());
        self.service.open(&[item])?;
        ask(&*self.service)
    }

    /// Renews the lease.
    pub(crate) fn renew(&self, limit: Duration) -> std::result::Result<Renewal, KeyError> {
        before_call_to_kms();
        self.service.renew(limit)
    }

    /// How far the KMS had come when it answered last.
    pub(crate) fn position(&self) -> Position {
        self.service.position()
    }

    /// Has the KMS refused from now on if it knows less than this.
    pub(crate) fn expect(&self, seen: Position) -> std::result::Result<(), KeyError> {
        self.service.expect(seen)
    }

    /// Says that nothing is left of what was revoked up to `epoch`.
    pub(crate) fn acknowledge(&self, epoch: u64) -> std::result::Result<(), KeyError> {
        before_call_to_kms();
        self.service.acknowledge(epoch)
    }

    /// Whether the key of a file is in memory.
    pub(crate) fn has_file_key(&self, ino: Ino) -> bool {
        self.files.has(ino)
    }

    /// Fetches the keys of several files. Failures show when a key is used.
    pub(crate) fn prefetch_files(&self, wanted: &[(Ino, Vec<u8>)]) {
        for group in wanted.chunks(KEYS_PER_CALL_MAX) {
            let Ok(opened) = self.unwrap_deks(group) else {
                return;
            };
            for ((ino, _), dek) in group.iter().zip(opened) {
                if let Ok(dek) = dek {
                    self.remember(*ino, self.file_key_of(*ino, &dek));
                }
            }
        }
    }

    /// Fresh DEKs for inodes not yet born.
    pub(crate) fn issue(&self, inodes: &[Ino]) -> Result<Vec<FreshKey>> {
        let contexts: Vec<_> = inodes
            .iter()
            .map(|&ino| KeyContext::Dek {
                volume: self.volume_key.volume,
                ino,
            })
            .collect();
        before_call_to_kms();
        self.calls.fetch_add(1, Ordering::Relaxed);
        let issued = self
            .service
            .issue(&contexts)
            .map_err(|error| self.failure(Ino::ROOT, &error))?;
        if issued.len() != inodes.len() {
            return Err(key_failure(
                Ino::ROOT,
                &KeyError::Other("fewer keys than asked for".to_owned()),
            ));
        }
        let with_keys = inodes.iter().zip(issued);
        Ok(with_keys
            .map(|(&ino, key)| (key.wrapped.into(), self.file_key_of(ino, &key.key)))
            .collect())
    }

    /// Puts a file's key where later operations find it.
    pub(crate) fn remember(&self, ino: Ino, key: Arc<FileKey>) {
        self.files.put(ino, key);
    }

    /// Drops the key of a deleted file.
    pub(crate) fn forget(&self, ino: Ino) {
        self.files.remove(ino);
    }

    fn unwrap_deks(
        &self,
        items: &[(Ino, Vec<u8>)],
    ) -> std::result::Result<Vec<std::result::Result<SecretKey, KeyError>>, KeyError> {
        let items: Vec<_> = items
            .iter()
            .map(|(ino, wrapped)| {
                (
                    KeyContext::Dek {
                        volume: self.volume_key.volume,
                        ino: *ino,
                    },
                    wrapped.clone(),
                )
            })
            .collect();
        before_call_to_kms();
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.service.open(&items)
    }

    /// What the failure of a whole call means to an operation. One that was broken off so that the gate may close was not
    /// for want of a KMS.
    fn failure(&self, ino: Ino, error: &KeyError) -> Error {
        match error {
            KeyError::Unreachable(_) if self.closing.load(Ordering::Acquire) => Error::KeyRevoked,
            error => key_failure(ino, error),
        }
    }

    fn file_key_of(&self, ino: Ino, dek: &SecretKey) -> Arc<FileKey> {
        Arc::new(FileKey::new(dek, self.volume_key.volume, ino))
    }
}

/// The state that an error of the KMS means for the mount; `None` for errors that change nothing.
pub(crate) fn state_after(error: &KeyError) -> Option<KeyState> {
    match error {
        KeyError::Revoked => Some(KeyState::Revoked),
        KeyError::Erased | KeyError::Destroyed => Some(KeyState::Erased),
        KeyError::Denied | KeyError::RolledBack => Some(KeyState::Denied),
        KeyError::Unreachable(_) | KeyError::AnchorConflict | KeyError::BadBlob | KeyError::Other(_) => None,
    }
}

pub(crate) fn refusal(state: KeyState) -> Error {
    match state {
        KeyState::Live | KeyState::Draining | KeyState::Revoked => Error::KeyRevoked,
        KeyState::Erased => Error::KeyErased,
        KeyState::Denied => Error::KeyDenied,
        KeyState::Unreachable => Error::KeyUnavailable,
    }
}

pub(crate) fn key_failure(ino: Ino, error: &KeyError) -> Error {
    match error {
        KeyError::Revoked => Error::KeyRevoked,
        KeyError::Erased | KeyError::Destroyed => Error::KeyErased,
        KeyError::Denied | KeyError::RolledBack | KeyError::AnchorConflict => Error::KeyDenied,
        KeyError::Unreachable(_) => Error::KeyUnavailable,
        KeyError::BadBlob => Error::Corrupt {
            what: format!("wrapped data key of inode {}", ino.0),
        },
        KeyError::Other(message) => Error::Storage {
            errno: libc::EIO,
            message: format!("KMS: {message}"),
        },
    }
}
