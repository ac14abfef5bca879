//! cmkfs: a filesystem whose files are encrypted under keys that a KMS can revoke and destroy.
//!
//! [`engine`] is the filesystem without FUSE.

pub mod engine;
