//! What as many keys as a mount caches take of the memory that an ordinary user may lock.

#![allow(clippy::unwrap_used)]

use kms_crypto::{Sealer, SecretKey, arena_bytes, is_memory_protected};

/// Cached by a mount, at most (src/engine/volume.rs).
const FILE_KEYS_MAX: usize = 32_768;
/// RLIMIT_MEMLOCK, where nobody has set it (Linux 5.16).
const LOCKED_BYTES: usize = 8 << 20;

#[test]
fn the_file_keys_of_a_mount_fit_into_an_ordinary_limit() {
    let before = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    let keys: Vec<Sealer> = (0..FILE_KEYS_MAX)
        .map(|_| Sealer::new(SecretKey::generate().unwrap()))
        .collect();
    assert_eq!(arena_bytes(), FILE_KEYS_MAX * 32);
    assert!(arena_bytes() * 2 < LOCKED_BYTES);
    // Whoever runs this under the usual limit sees them locked.
    let enough = before.maximum.is_none_or(|bytes| bytes >= LOCKED_BYTES as u64);
    assert!(!enough || is_memory_protected());
    drop(keys);
    assert_eq!(arena_bytes(), FILE_KEYS_MAX * 32, "it is kept for the next ones");
}
