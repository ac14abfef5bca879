//! The engine's [`KeyService`] over a session with kmsd.

use crate::engine::{IssuedKey, KeyContext, KeyError, KeyService};
use kms_client::{Client, ClientError, Code, EncryptionContext, KeyState, KmsError, Session};
use kms_crypto::SecretKey;
use parking_lot::{Mutex, RwLock};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for one call to kmsd: a FUSE request that waits longer is a stuck process.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A session that is opened anew when kmsd was restarted. kmsd knows it by this process: it is opened after the
/// process has gone to the background.
pub struct SessionKeys {
    client: Client,
    volume: [u8; 16],
    cmk: String,
    session: RwLock<Arc<Session>>,
    reopening: Mutex<()>,
}

/// Connects to the kmsd at `socket`.
///
/// # Errors
/// If nothing answers there.
pub fn connect(socket: &Path) -> Result<Client, KeyError> {
    Client::connect(socket, CALL_TIMEOUT).map_err(|error| key_error(&error))
}

impl SessionKeys {
    /// Opens a session for the volume whose keys `cmk`, an ARN, wraps.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn open(client: Client, volume: [u8; 16], cmk: &str) -> Result<Self, KeyError> {
        let session = client
            .open_session(volume, None)
            .map_err(|error| key_error(&error))?;
        Ok(Self {
            client,
            volume,
            cmk: cmk.to_owned(),
            session: RwLock::new(Arc::new(session)),
            reopening: Mutex::new(()),
        })
    }

    /// Makes a call, in a new session if kmsd no longer knows this one.
    fn call<T>(&self, call: impl Fn(&Session) -> Result<T, ClientError>) -> Result<T, KeyError> {
        let session = Arc::clone(&self.session.read());
        match call(&session) {
            Err(error) if is_unknown_session(&error) => {
                let session = self.reopen(&session)?;
                call(&session)
            }
            other => other,
        }
        .map_err(|error| key_error(&error))
    }

    fn described_state(&self) -> Result<KeyState, ClientError> {
        KeyState::of(&self.client.describe_key(&self.cmk)?)
    }

    /// The session that follows `lost`, opened by whoever comes first.
    fn reopen(&self, lost: &Arc<Session>) -> Result<Arc<Session>, KeyError> {
        let _one_at_a_time = self.reopening.lock();
        let current = Arc::clone(&self.session.read());
        if !Arc::ptr_eq(&current, lost) {
            return Ok(current);
        }
        let session = self
            .client
            .open_session(self.volume, None)
            .map_err(|error| key_error(&error))?;
        let session = Arc::new(session);
        *self.session.write() = Arc::clone(&session);
        Ok(session)
    }
}

impl KeyService for SessionKeys {
    fn issue(&self, contexts: &[KeyContext]) -> Result<Vec<IssuedKey>, KeyError> {
        let contexts: Vec<_> = contexts.iter().map(encryption_context).collect();
        let issued = self.call(|session| session.issue_data_keys(&self.cmk, &contexts))?;
        Ok(issued
            .into_iter()
            .map(|key| IssuedKey {
                wrapped: key.wrapped,
                key: key.key,
            })
            .collect())
    }

    fn open(&self, items: &[(KeyContext, Vec<u8>)]) -> Result<Vec<Result<SecretKey, KeyError>>, KeyError> {
        let items: Vec<_> = items
            .iter()
            .map(|(context, blob)| (encryption_context(context), blob.clone()))
            .collect();
        let opened = self.call(|session| session.open_data_keys(&items))?;
        Ok(opened
            .into_iter()
            .map(|key| key.map_err(|error| refusal_of_blob(&error)))
            .collect())
    }

    fn renew(&self) -> Result<Duration, KeyError> {
        let renewal = self.call(Session::renew)?;
        let listed = renewal
            .keys
            .iter()
            .find(|key| key.arn == self.cmk)
            .map(|key| key.state);
        let state = match listed {
            Some(state) => state,
            // A new session was given nothing yet, and is told of no key; ours may have been disabled meanwhile.
            None => self.described_state().map_err(|error| key_error(&error))?,
        };
        match state {
            KeyState::Enabled => Ok(renewal.lease_ttl),
            KeyState::Disabled | KeyState::PendingDeletion => Err(KeyError::Revoked),
            KeyState::PendingImport | KeyState::Destroyed => Err(KeyError::Erased),
        }
    }
}

fn encryption_context(context: &KeyContext) -> EncryptionContext {
    match context {
        KeyContext::VolumeKey {
            volume,
            domain,
            superblock_hash,
        } => EncryptionContext::volume_key(*volume, domain.0, *superblock_hash),
        KeyContext::Dek { volume, ino } => EncryptionContext::data_key(*volume, ino.domain().0, ino.0),
    }
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
