//! The engine's [`KeyService`](crate::engine::KeyService) over sessions with kmsd, one for each key domain, and what they need of
//! the mount.

mod mounting;
mod session;

pub use mounting::{Ledgers, MountHandles, Ring, Watching};
pub use session::{Holder, SessionKeys};

use crate::engine::KeyError;
use kms_client::{Client, ClientError, Code, KmsError};
use std::path::Path;
use std::time::Duration;

/// Longest wait for one call to kmsd: a FUSE request that waits longer is a stuck process.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to the kmsd at `socket`.
///
/// # Errors
/// If nothing answers there.
pub fn connect(socket: &Path) -> Result<Client, KeyError> {
    Client::connect(socket, CALL_TIMEOUT).map_err(|error| key_error(&error))
}

fn is_unknown_session(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Kms(KmsError {
            code: Code::SessionNotFound,
            ..
        })
    )
}

fn key_error(error: &ClientError) -> KeyError {
    match error {
        ClientError::Unreachable(message) => KeyError::Unreachable(message.clone()),
        ClientError::Kms(error) => refusal(error),
        other => KeyError::Other(other.to_string()),
    }
}

/// What it means that kmsd did not open a blob: as a parameter, the blob or its context is wrong.
fn refusal_of_blob(error: &KmsError) -> KeyError {
    if error.code == Code::InvalidParameter {
        KeyError::BadBlob
    } else {
        refusal(error)
    }
}

/// What an answer of kmsd means to the engine.
fn refusal(error: &KmsError) -> KeyError {
    match error.code {
        Code::Disabled | Code::PendingDeletion => KeyError::Revoked,
        Code::KeyNotFound | Code::PendingImport => KeyError::Erased,
        Code::NoPermission => KeyError::Denied,
        Code::AnchorConflict => KeyError::AnchorConflict,
        Code::ServiceUnavailable | Code::Throttling => KeyError::Unreachable(error.to_string()),
        _ => KeyError::Other(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_of_the_kms_has_its_meaning() {
        let meaning = |code| refusal(&KmsError::new(code, "why"));
        assert_eq!(meaning(Code::Disabled), KeyError::Revoked);
        assert_eq!(meaning(Code::PendingDeletion), KeyError::Revoked);
        assert_eq!(meaning(Code::KeyNotFound), KeyError::Erased);
        assert_eq!(meaning(Code::NoPermission), KeyError::Denied);
        assert!(matches!(
            meaning(Code::ServiceUnavailable),
            KeyError::Unreachable(_)
        ));
        assert!(matches!(meaning(Code::InvalidParameter), KeyError::Other(_)));
    }
}
