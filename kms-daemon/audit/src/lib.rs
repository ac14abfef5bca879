//! The audit log as it lies on the disk: what kmsd writes, and what whoever has the file can check of it.

pub mod frame;
mod record;
mod verify;

pub use frame::{Digest, Problem};
pub use record::{Item, Record, SUCCESS};
pub use verify::{Report, VerifyError, verify, walk};
