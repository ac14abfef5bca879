//! A filesystem session: data keys, issued and opened under a lease.

use crate::anchor::Anchor;
use crate::connection::{ClientError, Connection};
use kms_api::proto::{self, filesystem_keys_client::FilesystemKeysClient};
use kms_api::session::{Binding, KeyPair, Operation, REQUEST_RANDOM_LEN, Role, SessionError, SessionKey};
use kms_api::side::{Attach, side_channel_path};
use kms_api::{BATCH_ITEMS_MAX, EncryptionContext, KmsError, LOCATION_BYTES_MAX};
use kms_crypto::SecretKey;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tonic::Streaming;

/// Changes with every boot: a session of another boot holds nothing.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A data key, wrapped and in the clear.
pub struct IssuedKey {
    /// What is stored.
    pub wrapped: Vec<u8>,
    /// What encrypts.
    pub key: SecretKey,
}

/// What a key may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Everything.
    Enabled,
    /// Nothing, until it is enabled.
    Disabled,
    /// Nothing; its material will be destroyed unless that is cancelled.
    PendingDeletion,
    /// Nothing, until its material is imported.
    PendingImport,
    /// Its material is gone for ever, or this kmsd knows no such key.
    Destroyed,
}

impl KeyState {
    /// The state in a description of a key.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] for a state that this client does not know.
    pub fn of(metadata: &proto::KeyMetadata) -> Result<Self, ClientError> {
        key_state(metadata.key_state())
    }
}

/// A key that a session uses, and its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStatus {
    /// acs:kms:REGION:ACCOUNT:key/ID
    pub arn: String,
    /// Its state when the server answered.
    pub state: KeyState,
}

/// The answer to a renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    /// Counted from when [`Session::renew`] was called.
    pub lease_ttl: Duration,
    /// Moves with every revocation in the keystore.
    pub revocation_epoch: u64,
    /// Every key under which this session was given something.
    pub keys: Vec<KeyStatus>,
    /// How far the keystore had come.
    pub position: Position,
}

/// How far a keystore has come. None of its numbers ever falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// UUID.
    pub keystore_id: [u8; 16],
    /// The root epoch: moves when keys are destroyed.
    pub epoch: u64,
    /// Moves with every restrictive change.
    pub state_seq: u64,
    /// Records in the audit log.
    pub audit_records: u64,
    /// SHA-256 of the last frame of it.
    pub audit_head: [u8; 32],
}

impl Position {
    fn of(answer: Option<proto::KeystorePosition>) -> Result<Self, ClientError> {
        let answer = answer.ok_or_else(|| untrusted(SessionError::Malformed))?;
        Ok(Self {
            keystore_id: array(&answer.keystore_id)?,
            epoch: answer.epoch,
            state_seq: answer.state_seq,
            audit_records: answer.audit_records,
            audit_head: array(&answer.audit_head)?,
        })
    }
}

/// A session with one kmsd. Data keys come through it sealed to a key that this process alone has.
pub struct Session {
    connection: Arc<Connection>,
    key: SessionKey,
    position: Position,
    /// Up to which epoch kmsd was told that nothing is left.
    acknowledged: AtomicU64,
}

impl Session {
    /// How far the keystore had come when the session was opened.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    pub(crate) fn open(
        connection: Arc<Connection>,
        volume: [u8; 16],
        domain: u16,
        drain_max: Duration,
    ) -> Result<Self, ClientError> {
        let boot_id = std::fs::read_to_string(BOOT_ID)
            .map_err(|error| ClientError::Protocol(format!("{BOOT_ID}: {error}")))?;
        let pair = KeyPair::generate().map_err(untrusted)?;
        let public = pair.public();
        let drain_max_ms = u32::try_from(drain_max.as_millis()).unwrap_or(u32::MAX);
        let answer = connection.call_repeatably(|channel| {
            let request = proto::OpenSessionRequest {
                client_public_key: public.to_vec(),
                volume: volume.to_vec(),
                boot_id: boot_id.trim().to_owned(),
                drain_max_ms: Some(drain_max_ms),
                domain: domain.into(),
            };
            async move { FilesystemKeysClient::new(channel).open_session(request).await }
        })?;
        let id = array(&answer.session_id)?;
        let key = pair
            .agree(Role::Client, id, array(&answer.server_public_key)?)
            .map_err(untrusted)?;
        Ok(Self {
            connection,
            key,
            position: Position::of(answer.position)?,
            acknowledged: AtomicU64::new(0),
        })
    }

    /// Makes a 32-byte data key for each context, wrapped under `key` (id, ARN or alias/NAME), all or none of them.
    ///
    /// # Errors
    /// The key's state, as [`ClientError::Kms`]; [`ClientError::Protocol`] if the answer is not to this request.
    pub fn issue_data_keys(
        &self,
        key: &str,
        contexts: &[EncryptionContext],
    ) -> Result<Vec<IssuedKey>, ClientError> {
        let mut issued = Vec::with_capacity(contexts.len());
        for batch in contexts.chunks(BATCH_ITEMS_MAX) {
            issued.append(&mut self.issue_batch(key, batch)?);
        }
        Ok(issued)
    }

    /// Unwraps data keys, with an error for each that may not be.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, as [`ClientError::Kms`]; [`ClientError::Protocol`] if the answer is not to this
    /// request.
    pub fn open_data_keys(
        &self,
        items: &[(EncryptionContext, Vec<u8>)],
    ) -> Result<Vec<Result<SecretKey, KmsError>>, ClientError> {
        let mut opened = Vec::with_capacity(items.len());
        for batch in items.chunks(BATCH_ITEMS_MAX) {
            opened.append(&mut self.open_batch(batch)?);
        }
        Ok(opened)
    }

    /// Extends the lease, and learns the state of every key that this session uses, within `limit` and the client's own.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, as [`ClientError::Kms`].
    pub fn renew(&self, limit: Duration) -> Result<Renewal, ClientError> {
        let answer = self.connection.call_repeatably_within(limit, |channel| {
            let request = proto::RenewSessionRequest {
                session_id: self.key.id().to_vec(),
            };
            async move { FilesystemKeysClient::new(channel).renew_session(request).await }
        })?;
        let keys = answer.keys.into_iter().map(|status| {
            Ok(KeyStatus {
                state: key_state(status.state())?,
                arn: status.arn,
            })
        });
        Ok(Renewal {
            lease_ttl: Duration::from_millis(answer.lease_ttl_ms.into()),
            revocation_epoch: answer.revocation_epoch,
            keys: keys.collect::<Result<_, ClientError>>()?,
            position: Position::of(answer.position)?,
        })
    }

    /// Hands kmsd what it needs to drop what the kernel caches of this session's mount, should the mount not do it. To be
    /// done before the mount answers its first request.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] if kmsd refuses them.
    pub fn attach(&self, descriptors: &Descriptors<'_>) -> Result<(), ClientError> {
        let all = [
            Some(descriptors.device),
            Some(descriptors.ledger),
            descriptors.abort,
        ];
        let all: Vec<_> = all.into_iter().flatten().collect();
        let attach = Attach {
            session: self.key.id(),
            device_minor: descriptors.device_minor,
        };
        let path = side_channel_path(self.connection.socket());
        crate::side::attach(&path, &attach, &all, self.connection.timeout())
    }

    /// Watches for revocations of keys that this session uses.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, as [`ClientError::Kms`].
    pub fn watch(&self) -> Result<Watch, ClientError> {
        let stream = self.connection.call(|channel| {
            let request = proto::WatchSessionRequest {
                session_id: self.key.id().to_vec(),
            };
            async move { FilesystemKeysClient::new(channel).watch_session(request).await }
        })?;
        Ok(Watch {
            connection: Arc::clone(&self.connection),
            stream,
        })
    }

    /// Says that nothing is left here of what was revoked up to `epoch`, in the kernel's caches neither. Calls nobody if that
    /// was said in this session before.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, as [`ClientError::Kms`].
    pub fn acknowledge(&self, epoch: u64) -> Result<(), ClientError> {
        if self.acknowledged.load(Ordering::Acquire) >= epoch {
            return Ok(());
        }
        self.connection.call_repeatably(|channel| {
            let request = proto::AcknowledgeRevocationRequest {
                session_id: self.key.id().to_vec(),
                revocation_epoch: epoch,
            };
            async move {
                FilesystemKeysClient::new(channel)
                    .acknowledge_revocation(request)
                    .await
            }
        })?;
        self.acknowledged.fetch_max(epoch, Ordering::AcqRel);
        Ok(())
    }

    /// Says what this session's domain of its volume keeps under `key`, an id or an ARN, for whoever is about to take the key
    /// away. To be called now and then; kmsd keeps what it was told last.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, the key's state, `Rejected.LimitExceeded`, as [`ClientError::Kms`].
    pub fn report_usage(&self, key: &str, usage: &Usage<'_>) -> Result<(), ClientError> {
        self.report(proto::ReportUsageRequest {
            location: location(usage.location),
            files: usage.files,
            bytes: usage.bytes,
            ..self.report_on(key)
        })
    }

    /// Says that nothing of the domain is under `key` any more.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, the key's state, as [`ClientError::Kms`].
    pub fn report_removed(&self, key: &str) -> Result<(), ClientError> {
        self.report(proto::ReportUsageRequest {
            removed: true,
            ..self.report_on(key)
        })
    }

    fn report_on(&self, key: &str) -> proto::ReportUsageRequest {
        proto::ReportUsageRequest {
            session_id: self.key.id().to_vec(),
            key_id: key.to_owned(),
            ..proto::ReportUsageRequest::default()
        }
    }

    fn report(&self, request: proto::ReportUsageRequest) -> Result<(), ClientError> {
        self.connection.call_repeatably(|channel| {
            let request = request.clone();
            async move { FilesystemKeysClient::new(channel).report_usage(request).await }
        })?;
        Ok(())
    }

    /// How far this session's domain of its volume is known to have come; none if that was never told.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, `Forbidden.NoPermission` before the domain's volume key was asked for, as [`ClientError::Kms`].
    pub fn anchor(&self) -> Result<Option<Anchor>, ClientError> {
        let answer = self.connection.call_repeatably(|channel| {
            let request = proto::GetAnchorRequest {
                session_id: self.key.id().to_vec(),
            };
            async move { FilesystemKeysClient::new(channel).get_anchor(request).await }
        })?;
        answer.anchor.map(Anchor::of_message).transpose()
    }

    /// Tells how far it has come since it was `from`. Repeated, it changes nothing.
    ///
    /// # Errors
    /// `Rejected.AnchorConflict` if kmsd knows another than `from`; those of [`Self::anchor`].
    pub fn advance_anchor(&self, from: Option<&Anchor>, to: &Anchor) -> Result<(), ClientError> {
        self.connection.call_repeatably(|channel| {
            let request = proto::AdvanceAnchorRequest {
                session_id: self.key.id().to_vec(),
                from: from.map(|from| from.to_message()),
                to: Some(to.to_message()),
            };
            async move { FilesystemKeysClient::new(channel).advance_anchor(request).await }
        })?;
        Ok(())
    }

    /// Has a volume taken in that was put back on purpose: from now on it has come as far as `to`.
    ///
    /// # Errors
    /// Those of [`Self::anchor`].
    pub fn accept_restore(&self, to: &Anchor) -> Result<(), ClientError> {
        self.connection.call_repeatably(|channel| {
            let request = proto::AcceptRestoreRequest {
                session_id: self.key.id().to_vec(),
                to: Some(to.to_message()),
            };
            async move { FilesystemKeysClient::new(channel).accept_restore(request).await }
        })?;
        Ok(())
    }

    /// Ends the session.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, as [`ClientError::Kms`], if it had ended before.
    pub fn close(&self) -> Result<(), ClientError> {
        let request = proto::CloseSessionRequest {
            session_id: self.key.id().to_vec(),
        };
        self.connection
            .call(|channel| async move { FilesystemKeysClient::new(channel).close_session(request).await })?;
        Ok(())
    }

    fn issue_batch(&self, key: &str, contexts: &[EncryptionContext]) -> Result<Vec<IssuedKey>, ClientError> {
        let request_random = request_random()?;
        let answer = self.connection.call_repeatably(|channel| {
            let context = |context: &EncryptionContext| proto::issue_data_keys_request::Context {
                entries: context.entries().clone(),
            };
            let request = proto::IssueDataKeysRequest {
                session_id: self.key.id().to_vec(),
                request_random: request_random.to_vec(),
                key_id: key.to_owned(),
                contexts: contexts.iter().map(context).collect(),
            };
            async move { FilesystemKeysClient::new(channel).issue_data_keys(request).await }
        })?;
        if answer.wrapped.len() != contexts.len() {
            return Err(untrusted(SessionError::Malformed));
        }
        let blobs: Vec<&[u8]> = answer.wrapped.iter().map(Vec::as_slice).collect();
        let binding = Binding {
            operation: Operation::Issue,
            request_random,
            blobs: &blobs,
        };
        let keys = self
            .key
            .open(
                &answer.nonce,
                &binding,
                &vec![true; blobs.len()],
                &answer.sealed_keys,
            )
            .map_err(untrusted)?;
        answer
            .wrapped
            .into_iter()
            .zip(keys)
            .map(|(wrapped, key)| {
                let key = key.ok_or_else(|| untrusted(SessionError::Malformed))?;
                Ok(IssuedKey { wrapped, key })
            })
            .collect()
    }

    fn open_batch(
        &self,
        items: &[(EncryptionContext, Vec<u8>)],
    ) -> Result<Vec<Result<SecretKey, KmsError>>, ClientError> {
        let request_random = request_random()?;
        let answer = self.connection.call_repeatably(|channel| {
            let item =
                |(context, wrapped): &(EncryptionContext, Vec<u8>)| proto::open_data_keys_request::Item {
                    encryption_context: context.entries().clone(),
                    wrapped: wrapped.clone(),
                };
            let request = proto::OpenDataKeysRequest {
                session_id: self.key.id().to_vec(),
                request_random: request_random.to_vec(),
                items: items.iter().map(item).collect(),
            };
            async move { FilesystemKeysClient::new(channel).open_data_keys(request).await }
        })?;
        if answer.errors.len() != items.len() {
            return Err(untrusted(SessionError::Malformed));
        }
        let blobs: Vec<&[u8]> = items.iter().map(|(_, wrapped)| wrapped.as_slice()).collect();
        let flags: Vec<bool> = answer.errors.iter().map(|error| error.code.is_empty()).collect();
        let binding = Binding {
            operation: Operation::Open,
            request_random,
            blobs: &blobs,
        };
        let keys = self
            .key
            .open(&answer.nonce, &binding, &flags, &answer.sealed_keys)
            .map_err(untrusted)?;
        keys.into_iter()
            .zip(&answer.errors)
            .map(|(key, error)| match key {
                Some(key) => Ok(Ok(key)),
                None => KmsError::from_proto(error)
                    .map(Err)
                    .ok_or_else(|| ClientError::Protocol(format!("unknown error code {:?}", error.code))),
            })
            .collect()
    }
}

/// What a key domain of a volume keeps under a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage<'a> {
    /// The directory of the volume on its host. What is no UTF-8 in it is replaced, and what is past 4096 bytes is cut.
    pub location: &'a Path,
    /// Files of the domain.
    pub files: u64,
    /// Bytes of their content.
    pub bytes: u64,
}

/// What a mount hands over. kmsd keeps its own descriptors of the same things.
pub struct Descriptors<'a> {
    /// A clone of the mount's FUSE device.
    pub device: BorrowedFd<'a>,
    /// The memfd of its [`crate::Ledger`].
    pub ledger: BorrowedFd<'a>,
    /// fusectl's `abort` file of its connection, where it could be opened.
    pub abort: Option<BorrowedFd<'a>>,
    /// The minor number of its anonymous device.
    pub device_minor: u32,
}

/// Tells of changes of state of the keys that a session uses, as they happen.
pub struct Watch {
    connection: Arc<Connection>,
    stream: Streaming<proto::KeyStateEvent>,
}

impl Watch {
    /// Waits, however long, for the next change. False if some may have been missed: [`Session::renew`] tells the state.
    pub fn wait(&mut self) -> bool {
        matches!(self.connection.next_of(&mut self.stream), Ok(Some(_)))
    }
}

fn location(path: &Path) -> String {
    let mut text = path.to_string_lossy().into_owned();
    // Replacing what is no UTF-8 makes it longer.
    let mut end = text.len().min(LOCATION_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

fn request_random() -> Result<[u8; REQUEST_RANDOM_LEN], ClientError> {
    let mut random = [0; REQUEST_RANDOM_LEN];
    getrandom::fill(&mut random).map_err(|_| untrusted(SessionError::Randomness))?;
    Ok(random)
}

fn key_state(state: proto::KeyState) -> Result<KeyState, ClientError> {
    Ok(match state {
        proto::KeyState::Enabled => KeyState::Enabled,
        proto::KeyState::Disabled => KeyState::Disabled,
        proto::KeyState::PendingDeletion => KeyState::PendingDeletion,
        proto::KeyState::PendingImport => KeyState::PendingImport,
        proto::KeyState::Destroyed => KeyState::Destroyed,
        // An unknown state is no reason to go on reading.
        proto::KeyState::Unspecified => {
            return Err(ClientError::Protocol(
                "a key has a state that this client does not know".to_owned(),
            ));
        }
    })
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], ClientError> {
    bytes.try_into().map_err(|_| untrusted(SessionError::Malformed))
}

fn untrusted(error: SessionError) -> ClientError {
    ClientError::Protocol(error.to_string())
}
