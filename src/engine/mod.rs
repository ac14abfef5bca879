//! The filesystem without FUSE: [`Volume`](volume) takes inode numbers, names and buffers, and returns values and
//! errors. It knows no FUSE and no gRPC; keys come through [`KeyService`], time through [`Clock`].
//!
//! Layers, each using only those above it: `format` (bytes), `keys` (sealing), `store`, `slots` and `commit`
//! (storage), `keyring`, `node` and `runs` (state), then the operations.
#![expect(dead_code, reason = "the operations that use these layers are added next")]

mod clock;
mod commit;
mod error;
mod format;
mod keyring;
mod keys;
mod keyservice;
mod node;
mod runs;
mod slots;
mod store;
mod types;

pub use clock::{Clock, SystemClock};
pub use error::{Error, Result};
pub use format::superblock::Superblock;
pub use keyring::KeyState;
pub use keyservice::{CacheObserver, IssuedKey, KeyContext, KeyError, KeyService};
pub use types::{
    Attr, Cookie, DirEntry, Domain, Fallocate, FileKind, Ino, NewNode, RenameFlags, Seek, SetAttr, SetXattr,
    StatFs, Taken, Timestamp,
};
