//! The audit log: append-only, hash-chained, durable before the answer leaves, verifiable offline. Its format is a crate of its
//! own, for those who read it without a daemon.

mod log;

pub use kms_audit::{Digest, Item, Problem, Record, Report, SUCCESS, VerifyError, verify};
pub use log::{Audit, AuditError, Tail};
