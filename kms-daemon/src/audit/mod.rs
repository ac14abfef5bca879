//! The audit log: append-only, hash-chained, durable before the answer leaves, verifiable offline.

mod frame;
mod log;
mod record;
mod verify;

pub use frame::{Digest, Problem};
pub use log::{Audit, AuditError, Tail};
pub use record::{Item, Record, SUCCESS};
pub use verify::{Report, VerifyError, verify};
