//! The kernel's side: a thin translation of FUSE requests into calls of the engine.

mod convert;
mod filesystem;
mod invalidate;
mod mount;
mod negotiate;
mod reply;
mod session;

pub use mount::{FILESYSTEM_TYPE, MountFlags, unmount};
pub use session::{CacheMode, Mounted};
