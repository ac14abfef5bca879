//! The filesystem without FUSE: [`Volume`] takes inode numbers, names and buffers, and returns values and
//! errors. It knows no FUSE and no gRPC; keys come through [`KeyService`], time through [`Clock`].
//!
//! Layers, each using only those above it: `format` (bytes), `keys` (sealing), `store`, `slots` and `commit`
//! (storage), `keyring`, `node` and `runs` (state), then the operations.

mod acl;
mod active;
mod anchor;
mod attributes;
mod batch;
mod bell;
mod check;
mod chunkcache;
mod clock;
mod commit;
mod content;
mod core;
mod dek;
mod directory;
mod domain;
mod domains;
mod drain;
mod error;
mod filekeys;
mod format;
mod keyring;
mod keys;
mod keyservice;
mod layout;
#[cfg(feature = "shuttle")]
#[cfg(test)]
mod models;
mod namespace;
mod node;
mod nursery;
mod open;
mod orphan;
mod publish;
mod runs;
mod scan;
mod seal;
mod slots;
mod space;
mod staged;
#[cfg(not(feature = "shuttle"))]
mod store;
#[cfg(feature = "shuttle")]
#[path = "models/store.rs"]
mod store;
mod sweep;
mod sync;
mod table;
mod types;
mod upkeep;
mod verification;
mod volume;
mod watch;

pub use check::{CheckOptions, CheckedDomain, Counts, Event, Fault, Problem, Report};
pub use clock::{Clock, SystemClock};
pub use domain::DomainStatus;
pub use error::{Error, Result};
pub use format::superblock::Superblock;
pub use keyring::KeyState;
pub use keyservice::{
    Anchor, CacheObserver, Dependants, InodeLedger, IssuedKey, KeyContext, KeyError, KeyService, Position,
    Renewal,
};
pub use types::{
    Attr, Cookie, DirEntry, Domain, Fallocate, FileKind, Ino, Kill, NewNode, Owner, RenameFlags, Seek,
    SetAttr, SetXattr, StatFs, Taken, Timestamp,
};
pub use verification::{Verification, Verify};
pub use volume::{CreateParams, OpenError, Opening, Options, Status, Volume};
