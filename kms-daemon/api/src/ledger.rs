//! The ledger: the inodes of which the kernel may cache something, in memory that a mount shares with kmsd.
//!
//! A memfd, in the machine's byte order:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `kmsledg` and the version, 1 |
//! | 8 | how many places were ever used; the least significant byte first |
//! | 8 | 1 if an inode found no place: the list is incomplete |
//! | 40 | zero |
//! | 8 each | the places: an inode's number, or 0 |
//!
//! A mount writes an inode's number before the reply through which the kernel learns of it, and takes it away once the kernel
//! has forgotten it. So the list is true at every moment, also when the mount is stopped or killed in the midst of things.

/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"kmsledg\x01";
/// Offset of the number of places used.
pub const USED_OFFSET: usize = 8;
/// Offset of the mark that the list is incomplete.
pub const OVERFLOW_OFFSET: usize = 16;
/// Offset of the first place.
pub const PLACES_OFFSET: usize = 64;
/// Places, at most: the memfd is sparse, 8 bytes for each that was used.
pub const PLACES_MAX: usize = 1 << 26;
