//! What a mounted filesystem may ask for: a session, and data keys sealed to it.

use super::call::{Call, Trail};
use super::cryptography::{Action, Outcome, Release, Request, undecipherable};
use super::holders::boot_id;
use super::sessions::{
    DRAIN_DEFAULT_MS, DRAIN_MAX_MS, Exit, Facts, LEASE_TTL_MS, OpenedSession, Owner, Session,
};
use super::{Engine, KeyEvent, fresh_uuid, internal};
use crate::fence::Process;
use kms_api::proto::KeyState;
use kms_api::session::{Binding, KeyPair, Operation, PUBLIC_KEY_LEN, REQUEST_RANDOM_LEN, Role, SessionError};
use kms_api::{Code, KmsError};
use kms_crypto::{NONCE_LEN, SecretKey};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// What OpenSession is asked for.
pub(crate) struct Asked<'a> {
    /// X25519.
    pub(crate) client_public: &'a [u8],
    /// UUID.
    pub(crate) volume: &'a [u8],
    /// The volume's key domain.
    pub(crate) domain: u32,
    /// The caller's boot.
    pub(crate) boot_id: &'a str,
    /// How long the caller may take to go dark.
    pub(crate) drain_max_ms: Option<u32>,
}

/// One AEAD of keys, under a session's key.
pub(crate) struct SealedKeys {
    pub(crate) nonce: [u8; NONCE_LEN],
    pub(crate) sealed: Vec<u8>,
}

/// What RenewSession answers.
pub(crate) struct Renewed {
    pub(crate) lease_ttl_ms: u32,
    pub(crate) revocation_epoch: u64,
    pub(crate) keys: Vec<(Uuid, KeyState)>,
}

/// A session, as its watcher sees it.
pub(crate) struct Watched(Arc<Session>);

impl Watched {
    pub(crate) fn concerns(&self, event: &KeyEvent) -> bool {
        self.0.uses(event.key_id)
    }
}

impl Engine {
    /// Agrees on a session key with the caller's process, and says how to tell when that ends.
    ///
    /// # Errors
    /// `InvalidParameter`, `Rejected.LimitExceeded`.
    pub(crate) fn open_session(
        &self,
        call: &Call,
        process: Arc<Process>,
        asked: &Asked<'_>,
    ) -> Result<(OpenedSession, Exit), KmsError> {
        let wrong = |what| KmsError::invalid(what, "has a wrong length");
        let client_public: [u8; PUBLIC_KEY_LEN] = asked
            .client_public
            .try_into()
            .map_err(|_| wrong("ClientPublicKey"))?;
        let volume = Uuid::from_slice(asked.volume).map_err(|_| wrong("Volume"))?;
        let domain =
            u16::try_from(asked.domain).map_err(|_| KmsError::invalid("Domain", "must be 0 to 65535"))?;
        if asked.boot_id != boot_id()? {
            return Err(KmsError::invalid(
                "BootId",
                "is not that of this boot of this host",
            ));
        }
        let facts = Facts {
            owner: owner(call)?,
            started_ticks: process.started_ticks,
            volume,
            domain,
            drain_max_ms: asked.drain_max_ms.unwrap_or(DRAIN_DEFAULT_MS).min(DRAIN_MAX_MS),
        };
        let id = fresh_uuid()?.into_bytes();
        let pair = KeyPair::generate().map_err(|_| internal())?;
        let server_public = pair.public();
        let key = pair
            .agree(Role::Server, id, client_public)
            .map_err(|_| KmsError::invalid("ClientPublicKey", "gives no secret"))?;
        let boot_ms = self.clock.boot_ms();
        let session = Session::new(key, facts, process, boot_ms);
        let session = self.sessions.insert(session, boot_ms)?;
        // What is mounted is taken over with the mount's descriptors.
        let (manifest, row) = (self.manifest.lock(), session.row.lock());
        self.take_over(&session, None)?;
        drop((row, manifest));
        let opened = OpenedSession {
            id,
            server_public,
            lease_ttl_ms: LEASE_TTL_MS,
        };
        Ok((opened, session.exit()))
    }

    /// Makes a 32-byte data key for each context, all or none: the wrapped keys, and the keys sealed to the session.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`; the first error of any item.
    pub(crate) fn issue_data_keys(
        &self,
        call: &Call,
        trail: &mut Trail,
        session: &[u8],
        request_random: &[u8],
        key: &str,
        contexts: &[BTreeMap<String, String>],
    ) -> Result<(Vec<Vec<u8>>, SealedKeys), KmsError> {
        let session = self.session(call, session)?;
        let requests: Vec<_> = contexts
            .iter()
            .map(|context| Request {
                action: Action::Generate(key, "AES_256", None),
                context,
            })
            .collect();
        let outcomes = self.perform(trail, &requests, Release::Session)?;
        let outcomes = outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
        self.register(&session, &outcomes.iter().map(|outcome| outcome.key_id).collect())?;
        let keys = outcomes
            .iter()
            .map(|outcome| data_key(outcome).map(Some))
            .collect::<Result<Vec<_>, _>>()?;
        let wrapped: Vec<Vec<u8>> = outcomes.into_iter().map(|outcome| outcome.blob).collect();
        let blobs: Vec<&[u8]> = wrapped.iter().map(Vec::as_slice).collect();
        let sealed = self.seal_answer(&session, Operation::Issue, request_random, &blobs, &keys)?;
        Ok((wrapped, sealed))
    }

    /// Unwraps 32-byte data keys: how each item went, and the keys sealed to the session.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`, `InvalidParameter`; those of the items are beside them.
    pub(crate) fn open_data_keys(
        &self,
        call: &Call,
        trail: &mut Trail,
        session: &[u8],
        request_random: &[u8],
        items: &[(BTreeMap<String, String>, Vec<u8>)],
    ) -> Result<(Vec<Result<(), KmsError>>, SealedKeys), KmsError> {
        let session = self.session(call, session)?;
        let requests: Vec<_> = items
            .iter()
            .map(|(context, wrapped)| Request {
                action: Action::Decrypt(wrapped),
                context,
            })
            .collect();
        let outcomes = self.perform(trail, &requests, Release::Session)?;
        let opened = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok());
        self.register(&session, &opened.map(|outcome| outcome.key_id).collect())?;
        let mut results = Vec::with_capacity(outcomes.len());
        let mut keys = Vec::with_capacity(outcomes.len());
        for (outcome, (context, _)) in outcomes.into_iter().zip(items) {
            if let Ok(outcome) = &outcome {
                session.note_volume_key(context, outcome.key_id);
            }
            // A blob whose plaintext is no 256-bit key was made for something else.
            let opened = outcome.and_then(|outcome| data_key(&outcome).map_err(|_| undecipherable()));
            results.push(opened.as_ref().map(|_| ()).map_err(Clone::clone));
            keys.push(opened.ok());
        }
        let blobs: Vec<&[u8]> = items.iter().map(|(_, wrapped)| wrapped.as_slice()).collect();
        let sealed = self.seal_answer(&session, Operation::Open, request_random, &blobs, &keys)?;
        Ok((results, sealed))
    }

    /// Extends the lease. Not audited: it gives nothing away, and comes every few seconds.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`
    pub(crate) fn renew_session(&self, call: &Call, session: &[u8]) -> Result<Renewed, KmsError> {
        let session = self.session(call, session)?;
        // The epoch first: a state that is read after it is at least as new, so nothing is acknowledged unseen.
        let revocation_epoch = self.revocation_epoch();
        let keys = session.used().into_iter().map(|id| (id, self.key_state(id)));
        Ok(Renewed {
            lease_ttl_ms: LEASE_TTL_MS,
            revocation_epoch,
            keys: keys.collect(),
        })
    }

    /// Counts an unaudited call.
    pub(crate) fn count_unaudited(&self, call: &Call, ok: bool) {
        self.metrics.count(call.operation, ok);
    }

    /// # Errors
    /// `Rejected.SessionNotFound`
    pub(crate) fn watch_session(&self, call: &Call, session: &[u8]) -> Result<Watched, KmsError> {
        self.session(call, session).map(Watched)
    }

    /// # Errors
    /// `Rejected.SessionNotFound`; `InvalidParameter` for an epoch that has not come.
    pub(crate) fn acknowledge_revocation(
        &self,
        call: &Call,
        session: &[u8],
        epoch: u64,
    ) -> Result<(), KmsError> {
        let session = self.session(call, session)?;
        if epoch > self.revocation_epoch() {
            return Err(KmsError::invalid("RevocationEpoch", "has not come yet"));
        }
        self.sessions.acknowledge(&session, epoch);
        Ok(())
    }

    /// # Errors
    /// `Rejected.SessionNotFound`
    pub(crate) fn close_session(&self, call: &Call, session: &[u8]) -> Result<(), KmsError> {
        let session = self.session(call, session)?;
        self.closed(&session);
        Ok(())
    }

    pub(super) fn session(&self, call: &Call, id: &[u8]) -> Result<Arc<Session>, KmsError> {
        self.sessions.get(id, owner(call)?, self.clock.boot_ms())
    }

    fn seal_answer(
        &self,
        session: &Session,
        operation: Operation,
        request_random: &[u8],
        blobs: &[&[u8]],
        keys: &[Option<SecretKey>],
    ) -> Result<SealedKeys, KmsError> {
        let request_random: [u8; REQUEST_RANDOM_LEN] = request_random
            .try_into()
            .map_err(|_| KmsError::invalid("RequestRandom", "must be 16 bytes"))?;
        let binding = Binding {
            operation,
            request_random,
            blobs,
        };
        let (nonce, sealed) = session
            .key()?
            .seal(&self.session_nonces, &binding, keys)
            .map_err(|_: SessionError| internal())?;
        Ok(SealedKeys { nonce, sealed })
    }
}

/// A process that the kernel cannot name could be anybody's, and has no session.
fn owner(call: &Call) -> Result<Owner, KmsError> {
    let (uid, pid) = (call.principal.uid, call.principal.pid);
    if pid <= 0 {
        return Err(KmsError::new(
            Code::NoPermission,
            "a session needs a process that this host can name",
        ));
    }
    Ok(Owner { uid, pid })
}

fn data_key(outcome: &Outcome) -> Result<SecretKey, KmsError> {
    SecretKey::fill_with(|out| {
        let bytes: &[u8; 32] = outcome.plaintext.as_slice().try_into().map_err(|_| internal())?;
        out.copy_from_slice(bytes);
        Ok(())
    })
}
