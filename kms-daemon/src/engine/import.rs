//! Material from outside: how it comes, how long it stays, and how it goes.

use super::call::{Call, Trail};
use super::keys::{material_key, not_from, refusal};
use super::{Effect, Engine, KeyEvent, internal};
use crate::rows::{EXTERNAL, KeyRow};
use crate::store::{Change, Table};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey};
use hmac::{Hmac, KeyInit, Mac};
use kms_api::proto::KeyState;
use kms_api::{Code, KmsError};
use kms_crypto::{KEY_LEN, SecretKey};
use parking_lot::Mutex;
use prost::Message;
use sha2::Sha256;
use std::collections::BTreeMap;
use uuid::Uuid;
use zeroize::Zeroizing;

const ALGORITHM: &str = "RSAES_OAEP_SHA_256";
const KEY_SPEC: &str = "RSA_2048";
/// How long a wrapping key lives, in milliseconds.
const OFFER_MS: u64 = 24 * 60 * 60 * 1000;
/// Wrapping keys that wait, at most.
const OFFERS_MAX: usize = 1024;
const TOKEN_LEN: usize = 32;
/// The end of the year 9999, in seconds since the Unix epoch.
const EXPIRE_UNIX_MAX: u64 = 253_402_300_799;

/// The wrapping keys that wait for material, one for each key. They live here alone, and each is used once.
#[derive(Default)]
pub(super) struct Imports(Mutex<BTreeMap<Uuid, Offer>>);

struct Offer {
    token: [u8; TOKEN_LEN],
    key: OaepPrivateDecryptingKey,
    expires_boot_ms: u64,
}

/// What GetParametersForImport answers.
pub(crate) struct Parameters {
    pub(crate) key_id: Uuid,
    /// SubjectPublicKeyInfo in DER (RFC 5280, section 4.1).
    pub(crate) public_key: Vec<u8>,
    pub(crate) token: Vec<u8>,
    /// Milliseconds since the Unix epoch.
    pub(crate) expires_ms: i64,
}

impl Engine {
    /// Makes a wrapping key for the material of a key. It replaces the one that waited for the same.
    ///
    /// # Errors
    /// `InvalidParameter`, also if the key's origin is not EXTERNAL; `Rejected.PendingDeletion`; `Rejected.LimitExceeded`.
    pub(crate) fn get_parameters_for_import(
        &self,
        trail: &mut Trail,
        key: &str,
        algorithm: &str,
        key_spec: &str,
    ) -> Result<Parameters, KmsError> {
        let only = |parameter: &str, given: &str, supported: &str| match given {
            given if given.is_empty() || given == supported => Ok(()),
            _ => Err(KmsError::invalid(parameter, &format!("must be {supported}"))),
        };
        only("WrappingAlgorithm", algorithm, ALGORITHM)?;
        only("WrappingKeySpec", key_spec, KEY_SPEC)?;
        let key_id = self.resolve(key)?;
        trail.note(self.arn(key_id));
        importable(&self.lock_of(key_id)?.read())?;
        let private = PrivateDecryptingKey::generate(KeySize::Rsa2048).map_err(|_| internal())?;
        let public: PublicKeyX509Der<'_> = private.public_key().as_der().map_err(|_| internal())?;
        let mut token = [0; TOKEN_LEN];
        getrandom::fill(&mut token).map_err(|_| internal())?;
        let boot_ms = self.clock.boot_ms();
        let offer = Offer {
            token,
            key: OaepPrivateDecryptingKey::new(private).map_err(|_| internal())?,
            expires_boot_ms: boot_ms.saturating_add(OFFER_MS),
        };
        let mut offers = self.imports.0.lock();
        offers.retain(|_, offer| boot_ms < offer.expires_boot_ms);
        if offers.len() >= OFFERS_MAX && !offers.contains_key(&key_id) {
            let message = format!("{OFFERS_MAX} wrapping keys wait for material, which is the limit");
            return Err(KmsError::new(Code::LimitExceeded, message));
        }
        offers.insert(key_id, offer);
        Ok(Parameters {
            key_id,
            public_key: public.as_ref().to_vec(),
            token: token.to_vec(),
            expires_ms: self.clock.now_ms().saturating_add_unsigned(OFFER_MS),
        })
    }

    /// Takes in material, 32 bytes under the wrapping key that `token` names: PendingImport -> Enabled. A key that has had
    /// material takes only the same again. `expire_unix` is in seconds since the Unix epoch; 0 stands for never.
    ///
    /// # Errors
    /// `InvalidParameter` names what is wrong; `Rejected.PendingDeletion`. The wrapping key is used up all the same.
    pub(crate) fn import_key_material(
        &self,
        call: &Call,
        trail: &mut Trail,
        key: &str,
        (encrypted, token): (&[u8], &[u8]),
        expire_unix: u64,
    ) -> Result<(), KmsError> {
        let key_id = self.resolve(key)?;
        trail.note(self.arn(key_id));
        let material = self.take_offer(key_id, token)?.open(encrypted)?;
        let expires_ms = self.expiry(expire_unix)?;
        let lock = self.lock_of(key_id)?;
        let mut row = lock.write();
        importable(&row)?;
        let mut next = row.clone();
        next.revision += 1;
        next.imported = true;
        next.material_expires_ms = expires_ms;
        if row.state() == KeyState::PendingImport {
            next.set_state(KeyState::Enabled);
        }
        if next.fingerprint.is_empty() {
            let mut fingerprint_key = [0; 32];
            getrandom::fill(&mut fingerprint_key).map_err(|_| internal())?;
            next.fingerprint_key = fingerprint_key.to_vec();
            next.fingerprint = fingerprint(&next)?
                .chain_update(material.expose())
                .finalize()
                .into_bytes()
                .to_vec();
        }
        fingerprint(&next)?
            .chain_update(material.expose())
            .verify_slice(&next.fingerprint)
            .map_err(|_| {
                KmsError::invalid(
                    "EncryptedKeyMaterial",
                    "is not the material that this key had before",
                )
            })?;
        let version_id = Uuid::from_slice(&next.primary_version).map_err(|_| internal())?;
        let build = |change: &mut Change<'_>| {
            change.put(Table::Keys, key_id.as_bytes(), &next.encode_to_vec())?;
            change.put(
                Table::Material,
                &material_key(key_id, version_id),
                material.expose(),
            )
        };
        self.commit(call, trail, Effect::Other, build, |revocation_epoch| {
            row.clone_from(&next);
            // Nobody may be watching.
            let _ = self.events.send(KeyEvent {
                key_id,
                state: next.state(),
                revocation_epoch,
            });
        })
    }

    /// Destroys imported material at once: the key is disabled, its holders are fenced, the keystore moves on without it;
    /// then it is PendingImport.
    ///
    /// # Errors
    /// `Rejected.PendingImport` if there is none; `RevocationIncomplete` if it is only Disabled so far: call again.
    pub(crate) fn delete_key_material(&self, call: &Call, key: &str) -> Result<(), KmsError> {
        let row = self.run(call, |trail| {
            self.revoke(call, trail, key, |row| {
                importable(row)?;
                match row.state() {
                    KeyState::Enabled => {
                        row.set_state(KeyState::Disabled);
                        Ok(true)
                    }
                    KeyState::Disabled => Ok(false),
                    state => Err(refusal(state)),
                }
            })
        })?;
        let id = Uuid::from_slice(&row.key_id).map_err(|_| internal())?;
        let only = self.candidates(|row| {
            let is_it = row.key_id == id.as_bytes() && row.state() == KeyState::Disabled;
            (is_it && row.destroying.is_none()).then_some(KeyState::PendingImport)
        });
        if self.destroy(only, &mut |_| Ok(()))?.contains(&id) {
            return Ok(());
        }
        Err(KmsError::new(
            Code::RevocationIncomplete,
            "the key is Disabled, and its material not deleted yet; call again",
        ))
    }

    /// Whether imported material has outlived its time.
    pub(super) fn is_expired(&self, row: &KeyRow) -> bool {
        row.destroying.is_none()
            && row
                .material_expires_ms
                .is_some_and(|expires| expires <= self.clock.now_ms())
    }

    /// Disables the keys whose material has expired. The next ratchet leaves it behind.
    pub(super) fn expire(&self) -> Result<(), KmsError> {
        let ids: Vec<Uuid> = self.ids_of(|row| row.state() == KeyState::Enabled && self.is_expired(row));
        for id in ids {
            let call = Self::own_call("ExpireKeyMaterial")?;
            self.run(&call, |trail| {
                self.revoke(&call, trail, &id.to_string(), |row| {
                    if row.state() != KeyState::Enabled || !self.is_expired(row) {
                        return Err(not_from(row.state()));
                    }
                    row.set_state(KeyState::Disabled);
                    Ok(true)
                })
            })?;
        }
        Ok(())
    }

    fn ids_of(&self, is_one: impl Fn(&KeyRow) -> bool) -> Vec<Uuid> {
        self.key_ids()
            .into_iter()
            .filter(|&id| self.lock_of(id).is_ok_and(|lock| is_one(&lock.read())))
            .collect()
    }

    fn take_offer(&self, key_id: Uuid, token: &[u8]) -> Result<Offer, KmsError> {
        let mut offers = self.imports.0.lock();
        let boot_ms = self.clock.boot_ms();
        offers.retain(|_, offer| boot_ms < offer.expires_boot_ms);
        match offers.remove(&key_id) {
            Some(offer) if offer.token == *token => Ok(offer),
            Some(offer) => {
                // Somebody else's, who may still use it.
                offers.insert(key_id, offer);
                Err(unknown_token())
            }
            None => Err(unknown_token()),
        }
    }

    fn expiry(&self, expire_unix: u64) -> Result<Option<i64>, KmsError> {
        let wrong = || KmsError::invalid("KeyMaterialExpireUnix", "must be in the future and before 10000");
        if expire_unix == 0 {
            return Ok(None);
        }
        let seconds = Some(expire_unix).filter(|seconds| *seconds <= EXPIRE_UNIX_MAX);
        let ms = seconds.and_then(|seconds| i64::try_from(seconds.saturating_mul(1000)).ok());
        ms.filter(|ms| *ms > self.clock.now_ms())
            .map(Some)
            .ok_or_else(wrong)
    }
}

impl Offer {
    /// The material, and the end of the wrapping key.
    fn open(self, encrypted: &[u8]) -> Result<SecretKey, KmsError> {
        // One answer for every way in which it can be wrong.
        let wrong = || {
            KmsError::invalid(
                "EncryptedKeyMaterial",
                "must be 32 bytes under the wrapping key, RSAES_OAEP_SHA_256",
            )
        };
        let mut out = Zeroizing::new(vec![0; self.key.min_output_size()]);
        let plain = self
            .key
            .decrypt(&OAEP_SHA256_MGF1SHA256, encrypted, &mut out, None)
            .map_err(|_| wrong())?;
        let plain: &[u8; KEY_LEN] = (&*plain).try_into().map_err(|_| wrong())?;
        SecretKey::fill_with(|out| {
            out.copy_from_slice(plain);
            Ok(())
        })
    }
}

/// Whether a key takes material.
fn importable(row: &KeyRow) -> Result<(), KmsError> {
    if row.origin != EXTERNAL {
        return Err(KmsError::invalid(
            "KeyId",
            "names a key whose Origin is not EXTERNAL",
        ));
    }
    match row.state() {
        state @ (KeyState::PendingDeletion | KeyState::Destroyed) => Err(refusal(state)),
        state if row.destroying.is_some() => Err(not_from(state)),
        _ => Ok(()),
    }
}

fn fingerprint(row: &KeyRow) -> Result<Hmac<Sha256>, KmsError> {
    let hmac = Hmac::<Sha256>::new_from_slice(&row.fingerprint_key).map_err(|_| internal())?;
    Ok(hmac.chain_update(&row.key_id).chain_update(&row.primary_version))
}

fn unknown_token() -> KmsError {
    KmsError::invalid(
        "ImportToken",
        "is of another key, was used, or has expired; call GetParametersForImport again",
    )
}
