//! The kernel's side: a thin translation of FUSE requests into calls of the engine.

mod convert;
mod filesystem;
mod invalidate;
mod mount;
mod mountinfo;
mod negotiate;
mod reply;
mod residue;
mod session;

pub use mount::{MountFlags, unmount};
pub use mountinfo::{Device, Mount, find, find_around, find_other};
pub use session::{CacheMode, Mounted, Unmounter};
