//! Primitives that the KMS and the filesystem share: locked memory for secrets, wiped on drop, key derivation with a
//! closed registry of labels, nonces that no crash, fork or restored backup repeats, and authenticated sealing.
//!
//! This crate does no I/O besides getrandom(2) and the mapping of memory, and knows no file, socket, key store or filesystem.

mod arena;
mod kdf;
mod nonce;
mod prf;
mod seal;
mod secret;
mod wiping;

pub use arena::{
    ARENA_BYTES_MAX, Secret, arena_bytes, is_memory_protected, on_unprotected_memory, wipe_stack,
};
pub use kdf::{KeySalt, Label, derive};
pub use nonce::{NONCE_LEN, Nonce, NonceSource};
pub use prf::{PRF_LEN, Prf};
pub use seal::{Batch, Sealer, TAG_LEN, Tag};
pub use secret::{KEY_LEN, SecretKey};
pub use wiping::WipingAllocator;

/// Why a primitive failed. No variant carries key material, plaintext or the position of a mismatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CryptoError {
    /// The ciphertext, its tag, its nonce or its associated data is not what was sealed, or the key is another.
    #[error("authentication failed")]
    Authentication,
    /// getrandom(2) gave no bytes.
    #[error("the kernel gave no random bytes")]
    Randomness,
    /// The input is longer than RFC 8452 (section 6) allows: 2^36 bytes.
    #[error("input too long to seal")]
    TooLong,
}
