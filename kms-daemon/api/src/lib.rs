//! The KMS wire protocol, shared by daemon and client: generated types, error codes, encryption contexts, the
//! sealed answers of a filesystem session, and where the socket lies.
//!
//! This crate opens no socket and no file. The protocol itself is documented in proto/kms/v1/kms.proto.

mod code;
mod context;
pub mod ledger;
pub mod session;
pub mod side;
mod socket;

pub use code::{Code, KmsError};
pub use context::{CONTEXT_BYTES_MAX, EncryptionContext};
pub use socket::socket_path;

/// Generated from proto/kms/v1/kms.proto, where every message and field is documented.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("kms.v1");
}

/// Items in one batch, at most; what is longer is for the caller to split.
pub const BATCH_ITEMS_MAX: usize = 256;

/// Bytes of a volume's location in a report of what depends on a key, at most.
pub const LOCATION_BYTES_MAX: usize = 4096;
/// Length of what stands for a domain's root in its anchor, in bytes.
pub const ANCHOR_MAC_LEN: usize = 32;

/// Bytes of one message on the wire, at most, in both directions.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
