//! What one audit record says.

use prost::Message;
use std::collections::BTreeMap;

/// The code of a call that succeeded.
pub const SUCCESS: &str = "Success";

/// One call, admitted or refused.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Record {
    /// When it ended, in milliseconds since the Unix epoch, UTC.
    #[prost(int64, tag = "1")]
    pub time_ms: i64,
    /// UUID; the answer carried the same.
    #[prost(bytes = "vec", tag = "2")]
    pub request_id: Vec<u8>,
    /// Who called, by the socket's credentials.
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    /// The caller's group.
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    /// The caller's process.
    #[prost(int32, tag = "5")]
    pub pid: i32,
    /// What the process ran; for people only, since a process can change it.
    #[prost(string, tag = "6")]
    pub exe: String,
    /// CreateKey, Decrypt, ...
    #[prost(string, tag = "7")]
    pub operation: String,
    /// `Success`, or the error's code.
    #[prost(string, tag = "8")]
    pub code: String,
    /// The keys that the call named; a batch lists its items, in order.
    #[prost(message, repeated, tag = "9")]
    pub items: Vec<Item>,
    /// How many calls this record stands for: above 1 only for refusals of strangers.
    #[prost(uint32, tag = "10")]
    pub count: u32,
    /// The manifest's revision after the change that the call made; 0 if it made none. A database whose manifest is behind
    /// its log was put back, or lost what was durable.
    #[prost(uint64, tag = "11")]
    pub revision: u64,
}

/// One key of a call, or one item of a batch.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Item {
    /// Empty if the caller named no key that exists.
    #[prost(string, tag = "1")]
    pub key_arn: String,
    /// The encryption context; of ReportUsage, which domain of which volume depends on the key.
    #[prost(btree_map = "string, string", tag = "2")]
    pub context: BTreeMap<String, String>,
    /// The item's own code, where it is not that of the call.
    #[prost(string, tag = "3")]
    pub code: String,
}
