//! The bytes of docs/format.md: encoders and decoders, pure functions that do no I/O and hold no key.

pub(crate) mod chunk;
pub(crate) mod codec;
pub(crate) mod dirent;
pub(crate) mod domain;
pub(crate) mod inode;
pub(crate) mod root;
pub(crate) mod rowkey;
pub(crate) mod rowsum;
pub(crate) mod seal;
pub(crate) mod superblock;
