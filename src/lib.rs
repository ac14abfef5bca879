//! cmkfs: a filesystem whose files are encrypted under keys that a KMS can revoke and destroy.
//!
//! [`engine`] is the filesystem without FUSE; [`adapters`] connect it to the kernel, the KMS and the command line.

pub mod adapters;
pub mod engine;
