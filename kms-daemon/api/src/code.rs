//! Error codes, and how a gRPC status carries them.

use crate::proto;
use prost::Message;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal, $grpc:ident;)*) => {
        /// What went wrong, for programs. The strings and statuses are those of Alibaba Cloud KMS where it has them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            /// The string on the wire, in `kmsctl`'s errors and in the audit log.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The status over HTTP.
            #[must_use]
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            const fn grpc(self) -> tonic::Code {
                match self { $(Self::$name => tonic::Code::$grpc,)* }
            }

            fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$name),)* _ => None }
            }
        }

        #[cfg(test)]
        const ALL: &[Code] = &[$(Code::$name,)*];
    };
}

codes! {
    /// A parameter, which the message names, is missing, malformed or out of its range.
    InvalidParameter = "InvalidParameter", 400, InvalidArgument;
    /// The key is Disabled.
    Disabled = "Rejected.Disabled", 409, FailedPrecondition;
    /// The key is PendingDeletion.
    PendingDeletion = "Rejected.PendingDeletion", 409, FailedPrecondition;
    /// The key waits for its material.
    PendingImport = "Rejected.PendingImport", 409, FailedPrecondition;
    /// The key's state does not permit this change of state.
    StateModifiedFailed = "Rejected.StateModifiedFailed", 409, FailedPrecondition;
    /// No such key, or it was destroyed.
    KeyNotFound = "Forbidden.KeyNotFound", 404, NotFound;
    /// No such alias.
    AliasNotFound = "Forbidden.AliasNotFound", 404, NotFound;
    /// The alias names a key already.
    AliasExists = "Rejected.AliasExists", 409, AlreadyExists;
    /// The caller may not do this.
    NoPermission = "Forbidden.NoPermission", 403, PermissionDenied;
    /// Too many calls at once or in a row.
    Throttling = "Rejected.Throttling", 429, ResourceExhausted;
    /// A bound on how many there may be of something is reached.
    LimitExceeded = "Rejected.LimitExceeded", 409, ResourceExhausted;
    /// No such session of this caller: it was closed, it lapsed, or kmsd was started anew. Open another.
    SessionNotFound = "Rejected.SessionNotFound", 404, NotFound;
    /// The anchor of the volume's key domain is another than the caller knows.
    AnchorConflict = "Rejected.AnchorConflict", 409, Aborted;
    /// The key is revoked, but not every holder of its data keys is known to have dropped them.
    RevocationIncomplete = "RevocationIncomplete", 409, Aborted;
    /// The call could not be recorded durably, or the daemon is stopping: nothing was done.
    ServiceUnavailable = "ServiceUnavailable", 503, Unavailable;
    /// A fault of kmsd.
    InternalFailure = "InternalFailure", 500, Internal;
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A refusal or failure that the KMS answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct KmsError {
    /// For programs.
    pub code: Code,
    /// For people: names what is wrong; carries no secret.
    pub message: String,
}

impl KmsError {
    /// An error of `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// [`Code::InvalidParameter`]: the parameter's name as the API spells it, and what is wrong with it.
    #[must_use]
    pub fn invalid(parameter: &str, problem: &str) -> Self {
        Self::new(Code::InvalidParameter, format!("{parameter} {problem}"))
    }

    /// The error as an item of a batch or the details of a status.
    #[must_use]
    pub fn to_proto(&self, request_id: &str) -> proto::Error {
        proto::Error {
            code: self.code.as_str().to_owned(),
            http_status: u32::from(self.code.http_status()),
            request_id: request_id.to_owned(),
            message: self.message.clone(),
        }
    }

    /// The error of a batch's item; `None` if its code is none that this version knows.
    #[must_use]
    pub fn from_proto(error: &proto::Error) -> Option<Self> {
        Some(Self::new(Code::parse(&error.code)?, error.message.clone()))
    }

    /// The gRPC status that carries the error: message "Code: message", details one encoded [`proto::Error`].
    #[must_use]
    pub fn to_status(&self, request_id: &str) -> tonic::Status {
        let details = self.to_proto(request_id).encode_to_vec();
        tonic::Status::with_details(self.code.grpc(), self.to_string(), details.into())
    }

    /// The error that a status carries; `None` if the status is gRPC's own.
    #[must_use]
    pub fn from_status(status: &tonic::Status) -> Option<Self> {
        if status.details().is_empty() {
            return None;
        }
        Self::from_proto(&proto::Error::decode(status.details()).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_the_error_whole() {
        for &code in ALL {
            let error = KmsError::new(code, "why");
            let status = error.to_status("request");
            assert_eq!(status.message(), format!("{code}: why"));
            assert_eq!(KmsError::from_status(&status), Some(error));
        }
    }

    #[test]
    fn a_status_of_grpc_itself_is_not_ours() {
        assert_eq!(KmsError::from_status(&tonic::Status::unavailable("gone")), None);
    }
}
