//! Encrypt, Decrypt and data keys, one at a time or many.

use super::call::Trail;
use super::keys::{material_key, not_found};
use super::{Engine, failed, internal};
use crate::blob::{Blob, Header, seal};
use crate::store::{StoreError, Table};
use kms_api::{BATCH_ITEMS_MAX, Code, EncryptionContext, KmsError};
use kms_crypto::SecretKey;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use uuid::Uuid;
use zeroize::Zeroizing;

/// Bytes that Encrypt takes, at most.
const PLAINTEXT_BYTES_MAX: usize = 6 << 10;
/// Bytes of a data key, at most.
const DATA_KEY_BYTES_MAX: u32 = 1024;

/// What is done with one item.
#[derive(Clone, Copy)]
pub(crate) enum Action<'a> {
    /// Encrypts the bytes under the key of this name.
    Encrypt(&'a str, &'a [u8]),
    /// Makes a data key under the key of this name: of a KeySpec, or of so many bytes.
    Generate(&'a str, &'a str, Option<u32>),
    /// Decrypts the blob.
    Decrypt(&'a [u8]),
}

/// One item, and the context that it is bound to.
pub(crate) struct Request<'a> {
    pub(crate) action: Action<'a>,
    pub(crate) context: &'a BTreeMap<String, String>,
}

/// How a plaintext leaves kmsd, if it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Release {
    /// In the clear, in the answer. Nothing of a filesystem's goes, or comes, this way.
    Clear,
    /// Sealed to a session's key.
    Session,
    /// It does not.
    Withheld,
}

/// What became of one item.
pub(crate) struct Outcome {
    pub(crate) key_id: Uuid,
    pub(crate) version_id: Uuid,
    pub(crate) plaintext: Zeroizing<Vec<u8>>,
    pub(crate) blob: Vec<u8>,
}

impl Engine {
    /// Performs each request, and notes it in the trail. The keys stay locked until the call has been recorded.
    ///
    /// # Errors
    /// `InvalidParameter` if there are none, or more than 256.
    pub(crate) fn perform(
        &self,
        trail: &mut Trail,
        requests: &[Request<'_>],
        release: Release,
    ) -> Result<Vec<Result<Outcome, KmsError>>, KmsError> {
        if requests.is_empty() || requests.len() > BATCH_ITEMS_MAX {
            return Err(KmsError::invalid("Items", "must be 1 to 256"));
        }
        if self.store.is_closed() {
            // What is in memory may no longer be what was stored.
            return Err(failed(StoreError::Closed));
        }
        let ids: Vec<_> = requests
            .iter()
            .map(|request| self.subject(request.action))
            .collect();
        let named: BTreeSet<Uuid> = ids.iter().filter_map(|id| id.as_ref().ok().copied()).collect();
        self.hold(trail, &named);
        let each = requests.iter().zip(ids).map(|(request, id)| {
            let context = EncryptionContext::new(request.context.clone());
            let arn = id.as_ref().map_or_else(|_| String::new(), |&id| self.arn(id));
            let outcome = match (&context, id) {
                (Ok(context), Ok(id)) => self.perform_one(trail, request.action, id, context, release),
                (Err(error), _) => Err(error.clone()),
                (_, Err(error)) => Err(error),
            };
            // A context that is too long is not copied into the log.
            trail.note_item(arn, &context.unwrap_or_default(), &outcome);
            outcome
        });
        let outcomes: Vec<_> = each.collect();
        let done = || outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        match requests.first().map(|request| request.action) {
            Some(Action::Generate(..)) => self.metrics.issued(done()),
            Some(Action::Decrypt(_)) => self.metrics.opened(done()),
            Some(Action::Encrypt(..)) | None => {}
        }
        Ok(outcomes)
    }

    /// The key that an item is about. A blob of another region is refused before any key is looked up.
    fn subject(&self, action: Action<'_>) -> Result<Uuid, KmsError> {
        let bytes = match action {
            Action::Encrypt(key, _) | Action::Generate(key, ..) => return self.resolve(key),
            Action::Decrypt(bytes) => bytes,
        };
        let header = Blob::parse(bytes).ok_or_else(undecipherable)?.header;
        if header.region != self.node.region {
            let message = format!(
                "the blob's key is of another region; this kmsd serves {}",
                self.node.region
            );
            return Err(KmsError::new(Code::KeyNotFound, message));
        }
        let known = self.keys.read().contains_key(&header.key_id);
        known
            .then_some(header.key_id)
            .ok_or_else(|| not_found(&header.key_id.to_string()))
    }

    fn perform_one(
        &self,
        trail: &Trail,
        action: Action<'_>,
        key_id: Uuid,
        context: &EncryptionContext,
        release: Release,
    ) -> Result<Outcome, KmsError> {
        if release == Release::Clear && context.is_filesystem() {
            return Err(KmsError::new(
                Code::NoPermission,
                "the context's purpose is a filesystem's, whose keys are released inside its session only",
            ));
        }
        let row = trail.usable(key_id)?;
        let primary = || Uuid::from_slice(&row.primary_version).map_err(|_| internal());
        match action {
            Action::Decrypt(bytes) => {
                let blob = Blob::parse(bytes).ok_or_else(undecipherable)?;
                let version_id = blob.header.version_id;
                let known = row
                    .versions
                    .iter()
                    .any(|version| version.version_id == version_id.as_bytes());
                if !known {
                    return Err(undecipherable());
                }
                let plaintext = blob
                    .open(&*self.material(key_id, version_id)?, context)
                    .map_err(|_| undecipherable())?;
                Ok(Outcome {
                    key_id,
                    version_id,
                    plaintext,
                    blob: Vec::new(),
                })
            }
            Action::Encrypt(_, plain) => {
                if plain.is_empty() || plain.len() > PLAINTEXT_BYTES_MAX {
                    return Err(KmsError::invalid("Plaintext", "must be 1 to 6144 bytes"));
                }
                self.seal(key_id, primary()?, context, Zeroizing::new(plain.to_vec()))
            }
            Action::Generate(_, key_spec, number_of_bytes) => {
                let mut plain = Zeroizing::new(vec![0; data_key_bytes(key_spec, number_of_bytes)?]);
                getrandom::fill(&mut plain).map_err(|_| internal())?;
                self.seal(key_id, primary()?, context, plain)
            }
        }
    }

    fn seal(
        &self,
        key_id: Uuid,
        version_id: Uuid,
        context: &EncryptionContext,
        plaintext: Zeroizing<Vec<u8>>,
    ) -> Result<Outcome, KmsError> {
        let header = Header {
            region: &self.node.region,
            key_id,
            version_id,
        };
        let material = self.material(key_id, version_id)?;
        let blob = seal(&material, &header, context, &plaintext).map_err(|_| internal())?;
        Ok(Outcome {
            key_id,
            version_id,
            plaintext,
            blob,
        })
    }

    /// The material of a version. The caller holds the key's lock and has seen that it is Enabled, so that nothing of a
    /// disabled key comes back into the cache.
    pub(super) fn material(&self, key_id: Uuid, version_id: Uuid) -> Result<Arc<SecretKey>, KmsError> {
        let name = (key_id, version_id);
        if let Some(material) = self.materials.lock().get(&name) {
            return Ok(Arc::clone(material));
        }
        let damaged = || failed(StoreError::Damaged("material"));
        let plain = self
            .store
            .get(Table::Material, &material_key(key_id, version_id))
            .map_err(failed)?
            .ok_or_else(damaged)?;
        let material = SecretKey::fill_with(|out| {
            let bytes: &[u8; 32] = plain.as_slice().try_into().map_err(|_| damaged())?;
            out.copy_from_slice(bytes);
            Ok::<(), KmsError>(())
        })?;
        let material = Arc::new(material);
        self.materials.lock().put(name, Arc::clone(&material));
        Ok(material)
    }

    /// Wipes what is cached of a key.
    pub(super) fn drop_materials(&self, key_id: Uuid) {
        let mut materials = self.materials.lock();
        let cached: Vec<_> = materials
            .iter()
            .map(|(&name, _)| name)
            .filter(|(key, _)| *key == key_id)
            .collect();
        for name in cached {
            materials.pop(&name);
        }
    }
}

/// How many bytes a data key is to have.
fn data_key_bytes(key_spec: &str, number_of_bytes: Option<u32>) -> Result<usize, KmsError> {
    match (key_spec, number_of_bytes) {
        ("" | "AES_256", None) => Ok(32),
        ("AES_128", None) => Ok(16),
        (_, None) => Err(KmsError::invalid("KeySpec", "must be AES_256 or AES_128")),
        ("", Some(bytes @ 1..=DATA_KEY_BYTES_MAX)) => Ok(usize::try_from(bytes).unwrap_or_default()),
        ("", Some(_)) => Err(KmsError::invalid("NumberOfBytes", "must be 1 to 1024")),
        _ => Err(KmsError::invalid(
            "NumberOfBytes",
            "cannot be given together with KeySpec",
        )),
    }
}

/// One answer for every way in which a blob can be wrong, so that none can be told from another.
pub(super) fn undecipherable() -> KmsError {
    KmsError::invalid(
        "CiphertextBlob",
        "cannot be decrypted with this EncryptionContext",
    )
}
