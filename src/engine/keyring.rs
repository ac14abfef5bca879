//! The state of the CMK as the mount knows it, and every key that hangs from it: one state machine, one gate
//! through which each operation passes, one place where all keys are dropped.
//!
//! States: Live -> Draining -> dark (Revoked, Erased, Denied or Unreachable) -> Live. Operations hold the gate for
//! reading; a change of state takes it for writing, which is the barrier that ends all operations begun before.

use super::error::{Error, Result};
use super::keys::{DomainKeys, FileKey};
use super::keyservice::{KeyContext, KeyError, KeyService, Position, Renewal};
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard, before_call_to_kms, rank};
use super::types::{Domain, Ino};
use kms_crypto::SecretKey;
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

/// Most keys in one call to the KMS.
pub(crate) const KEYS_PER_CALL_MAX: usize = 256;
const CACHE_SHARDS: usize = 16;

/// Whether the volume's keys may be used.
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

/// The key of an operation that passed the gate; the state cannot change while one is held.
pub(crate) struct Admission<'k> {
    keys: Arc<DomainKeys>,
    draining: bool,
    /// None for the one operation that runs while the gate is shut.
    _gate: Option<RwLockReadGuard<'k, Gate>>,
}

impl Admission<'_> {
    pub(crate) fn keys(&self) -> &DomainKeys {
        &self.keys
    }

    /// Whether the keys are about to go.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining
    }
}

/// A DEK as it is stored, and the key derived from it.
pub(crate) type FreshKey = (Arc<[u8]>, Arc<FileKey>);

/// The keys of the volume.
pub(crate) struct Keyring {
    service: Arc<dyn KeyService>,
    volume: [u8; 16],
    superblock_hash: [u8; 32],
    wrapped_vk: Vec<u8>,
    gate: RwLock<Gate, rank::Gate>,
    /// Somebody waits for the operations under way to end.
    closing: AtomicBool,
    /// The time for what was accepted before is over.
    is_drain_over: AtomicBool,
    files: Vec<Mutex<LruCache<Ino, Arc<FileKey>>, rank::FileKeys>>,
    calls: AtomicU64,
}

impl Keyring {
    /// Opens the volume key. Files' keys are cached up to `files_max`.
    pub(crate) fn open(
        service: Arc<dyn KeyService>,
        volume: [u8; 16],
        superblock_hash: [u8; 32],
        wrapped_vk: Vec<u8>,
        files_max: usize,
    ) -> std::result::Result<Self, KeyError> {
        let per_shard = NonZeroUsize::new(files_max / CACHE_SHARDS).unwrap_or(NonZeroUsize::MIN);
        let ring = Self {
            service,
            volume,
            superblock_hash,
            wrapped_vk,
            gate: RwLock::new(Gate {
                state: KeyState::Revoked,
                keys: None,
            }),
            closing: AtomicBool::new(false),
            is_drain_over: AtomicBool::new(false),
            files: (0..CACHE_SHARDS)
                .map(|_| Mutex::new(LruCache::new(per_shard)))
                .collect(),
            calls: AtomicU64::new(0),
        };
        ring.relight()?;
        Ok(ring)
    }

    /// Passes the gate, or says why not.
    pub(crate) fn admit(&self, purpose: Purpose) -> Result<Admission<'_>> {
        let gate = self.gate.read();
        match (gate.state, purpose, &gate.keys) {
            (KeyState::Draining, ..) if self.is_drain_over() => Err(Error::KeyRevoked),
            (KeyState::Live, _, Some(keys)) | (KeyState::Draining, Purpose::Drain, Some(keys)) => {
                Ok(Admission {
                    keys: Arc::clone(keys),
                    draining: gate.state == KeyState::Draining,
                    _gate: Some(gate),
                })
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

    /// File keys in memory.
    pub(crate) fn cached_files(&self) -> usize {
        self.files.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Live -> Draining. Returns once every operation begun before has ended.
    pub(crate) fn begin_draining(&self) {
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
        self.closing.store(true, Ordering::Release);
        self.service.refuse(true);
        let gate = self.gate.write();
        self.service.refuse(false);
        self.closing.store(false, Ordering::Release);
        gate
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
        let mut gate = self.close();
        if let Some(keys) = gate.keys.take() {
            last(Admission {
                keys,
                draining: true,
                _gate: None,
            });
        }
        gate.state = state;
        for shard in &self.files {
            shard.lock().clear();
        }
    }

    /// Dark for another reason than before (disabled, then destroyed).
    pub(crate) fn restate(&self, state: KeyState) {
        self.gate.write().state = state;
    }

    /// Dark -> Live: asks for the volume key again.
    pub(crate) fn relight(&self) -> std::result::Result<(), KeyError> {
        let context = KeyContext::VolumeKey {
            volume: self.volume,
            domain: Domain::FIRST,
            superblock_hash: self.superblock_hash,
        };
        before_call_to_kms();
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut opened = self.service.open(&[(context, self.wrapped_vk.clone())])?;
        let vk = opened
            .pop()
            .unwrap_or(Err(KeyError::Other("no answer for the volume key".to_owned())))?;
        let keys = DomainKeys::new(&vk, self.volume, Domain::FIRST)
            .map_err(|error| KeyError::Other(error.to_string()))?;
        let mut gate = self.gate.write();
        gate.keys = Some(Arc::new(keys));
        gate.state = KeyState::Live;
        Ok(())
    }

    /// The key of a file, if it is in memory.
    pub(crate) fn cached_file_key(&self, ino: Ino) -> Option<Arc<FileKey>> {
        self.shard(ino)?.lock().get(&ino).map(Arc::clone)
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
        self.shard(ino).is_some_and(|shard| shard.lock().contains(&ino))
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
                volume: self.volume,
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
        if let Some(shard) = self.shard(ino) {
            shard.lock().put(ino, key);
        }
    }

    /// Drops the key of a deleted file.
    pub(crate) fn forget(&self, ino: Ino) {
        if let Some(shard) = self.shard(ino) {
            shard.lock().pop(&ino);
        }
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
                        volume: self.volume,
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
        Arc::new(FileKey::new(dek, self.volume, ino))
    }

    fn shard(&self, ino: Ino) -> Option<&Mutex<LruCache<Ino, Arc<FileKey>>, rank::FileKeys>> {
        self.files.get(usize::try_from(ino.0).unwrap_or(0) % CACHE_SHARDS)
    }
}

/// The state that an error of the KMS means for the mount; `None` for errors that change nothing.
pub(crate) fn state_after(error: &KeyError) -> Option<KeyState> {
    match error {
        KeyError::Revoked => Some(KeyState::Revoked),
        KeyError::Erased => Some(KeyState::Erased),
        KeyError::Denied | KeyError::RolledBack => Some(KeyState::Denied),
        KeyError::Unreachable(_) | KeyError::BadBlob | KeyError::Other(_) => None,
    }
}

fn refusal(state: KeyState) -> Error {
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
        KeyError::Erased => Error::KeyErased,
        KeyError::Denied | KeyError::RolledBack => Error::KeyDenied,
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
