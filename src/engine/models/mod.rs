//! Models: small concurrent parts of the engine, whose threads shuttle runs in many interleavings. Each says what is to hold
//! in all of them. The parts are the engine's own but for RocksDB, in whose place is [`store`](super::store), a log in
//! memory.
//!
//! A failure prints its seed, which SHUTTLE_RANDOM_SEED repeats.

mod bell;
mod commit;
mod keyring;
mod slots;

use super::keyservice::{Anchor, Dependants, IssuedKey, KeyContext, KeyError, KeyService, Position, Renewal};
use super::types::Domain;
use kms_crypto::SecretKey;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{JoinHandle, spawn, yield_now};
use shuttle::{Config, FailurePersistence, Runner};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Preemptions at unlikely places that one interleaving has, when they are not drawn at each step.
const DEPTH: usize = 3;
/// Bytes of a thread's stack: blocks lie on it.
const STACK_BYTES: usize = 256 << 10;

/// Runs a model in `count` interleavings drawn at each step, and in as many with few preemptions.
fn explore(count: usize, model: impl Fn() + Send + Sync + Copy + 'static) {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    // The seed says it in fewer words than the schedule.
    config.failure_persistence = FailurePersistence::None;
    let seed = RandomState::new().hash_one(count);
    eprintln!("the seed of both runs is {seed}");
    let drawn = RandomScheduler::new_from_seed(seed, count);
    let runs = Runner::new(drawn, config.clone()).run(model);
    let few = PctScheduler::new_from_seed(seed, DEPTH, count);
    assert_eq!(runs + Runner::new(few, config).run(model), 2 * count);
}

/// Starts threads, and waits for all of them.
fn together(threads: impl IntoIterator<Item = Box<dyn FnOnce() + Send>>) {
    let threads: Vec<JoinHandle<()>> = threads.into_iter().map(spawn).collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// A KMS that wraps nothing. Its calls take time: other threads may come before and after what they do.
struct Kms {
    is_enabled: AtomicBool,
}

impl Kms {
    fn new() -> Self {
        Self {
            is_enabled: AtomicBool::new(true),
        }
    }

    fn enable(&self, whether: bool) {
        self.is_enabled.store(whether, Ordering::Relaxed);
    }

    fn call<T>(&self, answer: impl FnOnce() -> T) -> Result<T, KeyError> {
        yield_now();
        let answered = match self.is_enabled.load(Ordering::Relaxed) {
            true => Ok(answer()),
            false => Err(KeyError::Revoked),
        };
        yield_now();
        answered
    }
}

impl KeyService for Kms {
    fn issue(&self, contexts: &[KeyContext]) -> Result<Vec<IssuedKey>, KeyError> {
        let issue = |_| IssuedKey {
            wrapped: vec![7; 32],
            key: key_of(&[7; 32]),
        };
        self.call(|| contexts.iter().map(issue).collect())
    }

    fn open(&self, items: &[(KeyContext, Vec<u8>)]) -> Result<Vec<Result<SecretKey, KeyError>>, KeyError> {
        self.call(|| items.iter().map(|(_, wrapped)| Ok(key_of(wrapped))).collect())
    }

    fn renew(&self, _: Duration) -> Result<Renewal, KeyError> {
        self.call(|| Renewal {
            lease: Duration::from_secs(30),
            epoch: 0,
            state: Ok(()),
        })
    }

    fn acknowledge(&self, _: u64) -> Result<(), KeyError> {
        Ok(())
    }

    fn position(&self) -> Position {
        Position {
            keystore: [0; 16],
            epoch: 0,
            state_seq: 0,
            audit_records: 0,
            audit_head: [0; 32],
        }
    }

    fn expect(&self, _: Position) -> Result<(), KeyError> {
        Ok(())
    }

    fn for_domain(&self, _: Domain, _: &str) -> Result<Arc<dyn KeyService>, KeyError> {
        Err(KeyError::Other("no model has another domain".to_owned()))
    }

    fn report(&self, _: Dependants) -> Result<(), KeyError> {
        Ok(())
    }

    fn anchor(&self) -> Result<Option<Anchor>, KeyError> {
        Ok(None)
    }

    fn advance_anchor(&self, _: Option<Anchor>, _: Anchor) -> Result<(), KeyError> {
        Ok(())
    }

    fn accept_restore(&self, _: Anchor) -> Result<(), KeyError> {
        Ok(())
    }

    fn end(&self) {}

    fn refuse(&self, _: bool) {}
}

fn key_of(bytes: &[u8]) -> SecretKey {
    SecretKey::fill_with(|key| {
        key.copy_from_slice(bytes);
        Ok::<(), ()>(())
    })
    .unwrap()
}
