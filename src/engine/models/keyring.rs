//! The gate and the cache of files' keys, while the key is revoked and given back: once [`Keyring::go_dark`] has returned no
//! operation runs and no key is left, whatever was being looked up or fetched.

use super::{Kms, explore, together};
use crate::engine::error::Error;
use crate::engine::filekeys::FileKeys;
use crate::engine::format::superblock::Version;
use crate::engine::keyring::{KeyState, Keyring, Purpose, VolumeKey};
use crate::engine::keys::FileKey;
use crate::engine::keyservice::KeyService;
use crate::engine::types::{Domain, Ino};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::yield_now;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// What the thread that revokes has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Live,
    Draining,
    Dark,
}

/// Kept by the threads as they go; none of it is a point where another thread comes in.
struct Watch {
    phase: Mutex<Phase>,
    under_way: AtomicUsize,
    keys: Mutex<Vec<Weak<FileKey>>>,
    files: Arc<FileKeys>,
}

impl Watch {
    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap()
    }

    fn enter(&self, phase: Phase) {
        *self.phase.lock().unwrap() = phase;
    }

    /// Checks, now and later, that nothing runs and that no key is left.
    fn check_dark(&self) {
        for _ in 0..3 {
            yield_now();
            assert_eq!(
                self.under_way.load(Ordering::SeqCst),
                0,
                "an operation runs in the dark"
            );
            assert_eq!(self.files.len(), 0);
            let keys = self.keys.lock().unwrap();
            assert!(
                keys.iter().all(|key| key.strong_count() == 0),
                "a key outlives the dark"
            );
        }
    }

    /// Checks that an operation may use its keys.
    fn check_admitted(&self, purpose: Purpose) {
        yield_now();
        let last = match purpose {
            Purpose::Serve => Phase::Live,
            Purpose::Drain => Phase::Draining,
        };
        let phase = self.phase();
        assert!(phase <= last, "{purpose:?} goes on while {phase:?}");
    }
}

/// One operation, which looks up, fetches and issues keys.
fn operate(ring: &Keyring, watch: &Watch, purpose: Purpose) {
    let Ok(admission) = ring.admit(purpose) else {
        return;
    };
    watch.under_way.fetch_add(1, Ordering::SeqCst);
    watch.check_admitted(purpose);
    let wrapped = vec![7; 32];
    let key = ring.cached_file_key(Ino(2)).map_or_else(
        || ring.fetch_file_key(Ino(2), &wrapped, vec![(Ino(3), wrapped.clone())]),
        Ok,
    );
    if let Ok(key) = key {
        watch.keys.lock().unwrap().push(Arc::downgrade(&key));
        watch.check_admitted(purpose);
    }
    if purpose == Purpose::Serve {
        ring.prefetch_files(&[(Ino(4), wrapped)]);
        for (_, key) in ring.issue(&[Ino(5)]).unwrap_or_default() {
            watch.keys.lock().unwrap().push(Arc::downgrade(&key));
            ring.remember(Ino(5), key);
        }
    }
    assert_eq!(admission.keys().domain(), Domain::FIRST);
    watch.check_admitted(purpose);
    watch.under_way.fetch_sub(1, Ordering::SeqCst);
}

/// The life of the key: given up, destroyed as it seems, and given back. The KMS may answer until the end, as it does when
/// it was out of reach alone; and there may be no time to drain.
fn revoke_and_relight(ring: &Keyring, watch: &Watch, kms: &Kms) {
    kms.enable(thread_rng().r#gen());
    if thread_rng().r#gen() {
        ring.begin_draining();
        watch.enter(Phase::Draining);
        assert!(ring.admit(Purpose::Serve).is_err());
    }
    let mut was_last = false;
    ring.go_dark(KeyState::Unreachable, |last| {
        was_last = true;
        yield_now();
        assert_eq!(watch.under_way.load(Ordering::SeqCst), 0, "the last is not alone");
        assert!(last.is_draining());
    });
    watch.enter(Phase::Dark);
    assert!(was_last);
    watch.check_dark();
    kms.enable(false);
    assert!(ring.relight().is_err());
    ring.restate(KeyState::Erased);
    watch.check_dark();
    assert_eq!(ring.admit(Purpose::Drain).err(), Some(Error::KeyErased));
    kms.enable(true);
    watch.enter(Phase::Live);
    ring.relight().unwrap();
    assert_eq!(ring.state(), KeyState::Live);
    assert!(ring.go_on().is_ok());
}

#[test]
fn in_the_dark_nothing_runs_and_no_key_is_left() {
    explore(5000, || {
        let kms = Arc::new(Kms::new());
        let service = Arc::clone(&kms) as Arc<dyn KeyService>;
        let files = Arc::new(FileKeys::new(64));
        let volume_key = VolumeKey {
            volume: [1; 16],
            version: Version::LATEST,
            domain: Domain::FIRST,
            superblock_hash: [2; 32],
            wrapped: vec![7; 32],
        };
        let ring = Arc::new(Keyring::open(service, volume_key, Arc::clone(&files)).unwrap());
        let watch = Arc::new(Watch {
            phase: Mutex::new(Phase::Live),
            under_way: AtomicUsize::new(0),
            keys: Mutex::default(),
            files,
        });
        let operator = |purpose| -> Box<dyn FnOnce() + Send> {
            let (ring, watch) = (Arc::clone(&ring), Arc::clone(&watch));
            Box::new(move || {
                for _ in 0..2 {
                    operate(&ring, &watch, purpose);
                }
            })
        };
        let revoker = {
            let (ring, watch) = (Arc::clone(&ring), Arc::clone(&watch));
            Box::new(move || revoke_and_relight(&ring, &watch, &kms))
        };
        together([
            operator(Purpose::Serve),
            operator(Purpose::Serve),
            operator(Purpose::Drain),
            revoker,
        ]);
        assert!(ring.admit(Purpose::Serve).is_ok());
    });
}
