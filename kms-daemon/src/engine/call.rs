//! Who calls what, and what the call leaves behind.

use crate::audit::{Item, Record, SUCCESS};
use crate::rows::KeyRow;
use kms_api::{Code, EncryptionContext, KmsError};
use parking_lot::{ArcRwLockReadGuard, RawRwLock};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Who is at the other end of the socket: the kernel's word, of when it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process; 0 if the kernel does not know.
    pub pid: i32,
    /// What the process runs. It may annotate, never grant.
    pub exe: String,
}

/// One call.
#[derive(Debug, Clone)]
pub struct Call {
    /// Names it in the answer and in the audit log.
    pub request_id: Uuid,
    /// Who calls.
    pub principal: Principal,
    /// CreateKey, Decrypt, ...
    pub operation: &'static str,
}

impl Call {
    /// A call with a fresh id.
    ///
    /// # Errors
    /// `InternalFailure` if the kernel gives no random bytes.
    pub fn new(principal: Principal, operation: &'static str) -> Result<Self, KmsError> {
        Ok(Self {
            request_id: super::fresh_uuid()?,
            principal,
            operation,
        })
    }

    pub(super) fn record(&self, time_ms: i64, trail: &Trail, code: Option<Code>) -> Record {
        Record {
            time_ms,
            request_id: self.request_id.as_bytes().to_vec(),
            uid: self.principal.uid,
            gid: self.principal.gid,
            pid: self.principal.pid,
            exe: self.principal.exe.clone(),
            operation: self.operation.to_owned(),
            code: code.map_or(SUCCESS, Code::as_str).to_owned(),
            items: trail.items.clone(),
            count: 1,
            revision: 0,
        }
    }
}

pub(super) type KeyGuard = ArcRwLockReadGuard<RawRwLock, KeyRow>;

/// What a call has touched: the items of its record, and the keys that nobody may change until it is written.
#[derive(Default)]
pub struct Trail {
    pub(super) items: Vec<Item>,
    pub(super) held: BTreeMap<Uuid, KeyGuard>,
    /// The record is durable already, in the batch of a change of state.
    pub(super) recorded: bool,
    /// The revocation epoch of the change of state that the call made.
    pub(super) epoch: Option<u64>,
}

impl Trail {
    /// Notes a key that the call names.
    pub(super) fn note(&mut self, key_arn: String) {
        self.items.push(Item {
            key_arn,
            ..Item::default()
        });
    }

    /// Notes one item of a call, and how it went.
    pub(super) fn note_item<T>(
        &mut self,
        key_arn: String,
        context: &EncryptionContext,
        outcome: &Result<T, KmsError>,
    ) {
        let code = outcome.as_ref().err().map(|error| error.code.as_str());
        self.items.push(Item {
            key_arn,
            context: context.entries().clone(),
            code: code.unwrap_or_default().to_owned(),
        });
    }
}
