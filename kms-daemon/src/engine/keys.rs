//! Keys: their making, their states, and how callers name them.

use super::call::{Call, KeyGuard, Trail};
use super::{Effect, Engine, KeyEvent, KeyLock, fresh_uuid, internal};
use crate::rows::{EXTERNAL, KeyRow, TIME_KEY, VersionRow};
use crate::store::{Change, Table};
use kms_api::proto::KeyState;
use kms_api::{Code, KmsError};
use kms_crypto::SecretKey;
use parking_lot::RwLock;
use prost::Message;
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

/// Keys in one keystore, at most.
const KEYS_MAX: usize = 10_000;
/// Bytes of a description, at most.
const DESCRIPTION_BYTES_MAX: usize = 8192;
pub(super) const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// Never less: the window is what a mistake can be seen in.
const PENDING_WINDOW_DAYS: std::ops::RangeInclusive<u32> = 7..=30;

/// What CreateKey is asked for; an empty string stands for the default.
#[derive(Debug, Clone, Default)]
pub struct NewKey {
    /// The user's words.
    pub description: String,
    /// Aliyun_AES_256
    pub key_spec: String,
    /// ENCRYPT/DECRYPT
    pub key_usage: String,
    /// Aliyun_KMS or EXTERNAL
    pub origin: String,
    /// SOFTWARE
    pub protection_level: String,
}

impl Engine {
    /// Makes a key with one version: Enabled, or PendingImport if its origin is EXTERNAL.
    ///
    /// # Errors
    /// `InvalidParameter`, `Rejected.LimitExceeded`.
    pub fn create_key(&self, call: &Call, trail: &mut Trail, new: &NewKey) -> Result<KeyRow, KmsError> {
        if new.description.len() > DESCRIPTION_BYTES_MAX {
            return Err(KmsError::invalid("Description", "is longer than 8192 bytes"));
        }
        let only = |parameter: &str, given: &str, supported: &str| match given {
            "" => Ok(supported.to_owned()),
            given if given == supported => Ok(supported.to_owned()),
            _ => Err(KmsError::invalid(parameter, &format!("must be {supported}"))),
        };
        let is_external = new.origin == EXTERNAL;
        let (key_id, version_id) = (fresh_uuid()?, fresh_uuid()?);
        let now = self.clock.now_ms();
        let row = KeyRow {
            revision: 1,
            key_id: key_id.as_bytes().to_vec(),
            state: if is_external {
                KeyState::PendingImport.into()
            } else {
                KeyState::Enabled.into()
            },
            key_spec: only("KeySpec", &new.key_spec, "Aliyun_AES_256")?,
            key_usage: only("KeyUsage", &new.key_usage, "ENCRYPT/DECRYPT")?,
            origin: match new.origin.as_str() {
                "" | "Aliyun_KMS" => "Aliyun_KMS".to_owned(),
                EXTERNAL => EXTERNAL.to_owned(),
                _ => return Err(KmsError::invalid("Origin", "must be Aliyun_KMS or EXTERNAL")),
            },
            protection_level: only("ProtectionLevel", &new.protection_level, "SOFTWARE")?,
            description: new.description.clone(),
            creator_uid: call.principal.uid,
            created_ms: now,
            primary_version: version_id.as_bytes().to_vec(),
            versions: vec![VersionRow {
                version_id: version_id.as_bytes().to_vec(),
                created_ms: now,
            }],
            ..KeyRow::default()
        };
        if self.keys.read().len() >= KEYS_MAX {
            let message = format!("this keystore holds {KEYS_MAX} keys, which is its limit");
            return Err(KmsError::new(Code::LimitExceeded, message));
        }
        let material = SecretKey::generate().map_err(|_| internal())?;
        let build = |change: &mut Change<'_>| {
            change.put(Table::Keys, key_id.as_bytes(), &row.encode_to_vec())?;
            if is_external {
                return Ok(());
            }
            let name = material_key(key_id, version_id);
            change.put(Table::Material, &name, material.expose())
        };
        trail.note(self.arn(key_id));
        self.commit(call, trail, Effect::Other, build, |_| {
            let lock = Arc::new(RwLock::new(row.clone()));
            self.keys.write().insert(key_id, lock);
        })?;
        Ok(row)
    }

    /// A key in any state.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`
    pub fn describe_key(&self, trail: &mut Trail, key: &str) -> Result<KeyRow, KmsError> {
        let id = self.resolve(key)?;
        trail.note(self.arn(id));
        Ok(self.lock_of(id)?.read().clone())
    }

    /// The ids of all keys, in order.
    #[must_use]
    pub fn key_ids(&self) -> Vec<Uuid> {
        self.keys.read().keys().copied().collect()
    }

    /// What a key may do now; a key that is unknown here is destroyed to whoever asks.
    pub(crate) fn key_state(&self, id: Uuid) -> KeyState {
        self.lock_of(id)
            .map_or(KeyState::Destroyed, |lock| lock.read().state())
    }

    /// Disabled -> Enabled.
    ///
    /// # Errors
    /// `Rejected.StateModifiedFailed` while the key is pending.
    pub fn enable_key(&self, call: &Call, trail: &mut Trail, key: &str) -> Result<(), KmsError> {
        self.restore(call, trail, key, |row| match row.state() {
            KeyState::Enabled => Ok(false),
            KeyState::Disabled if self.is_expired(row) || row.destroying.is_some() => {
                Err(refusal(KeyState::PendingImport))
            }
            KeyState::Disabled => {
                row.set_state(KeyState::Enabled);
                Ok(true)
            }
            state => Err(not_from(state)),
        })
    }

    /// Enabled -> Disabled. Calls that use the key have ended when this returns, and none begins; and no mount can show
    /// anything that was encrypted under it. Disabling a disabled key waits for the same.
    ///
    /// # Errors
    /// `Rejected.StateModifiedFailed` while the key is pending; `RevocationIncomplete`, and the key is disabled all the same.
    pub fn disable_key(&self, call: &Call, trail: &mut Trail, key: &str) -> Result<(), KmsError> {
        self.revoke(call, trail, key, |row| match row.state() {
            KeyState::Disabled => Ok(false),
            KeyState::Enabled => {
                row.set_state(KeyState::Disabled);
                Ok(true)
            }
            state => Err(not_from(state)),
        })
        .map(drop)
    }

    /// Any state but PendingDeletion and Destroyed -> PendingDeletion. Answers when deletion is due by the wall clock; as
    /// much observed time must have passed, too.
    ///
    /// # Errors
    /// `InvalidParameter` for a window outside 7 to 30 days; `Rejected.PendingDeletion` if it is so already;
    /// `Forbidden.KeyNotFound` if it is destroyed; `RevocationIncomplete`, and the key is PendingDeletion all the same.
    pub fn schedule_key_deletion(
        &self,
        call: &Call,
        trail: &mut Trail,
        key: &str,
        window_days: u32,
    ) -> Result<i64, KmsError> {
        if !PENDING_WINDOW_DAYS.contains(&window_days) {
            return Err(KmsError::invalid("PendingWindowInDays", "must be 7 to 30"));
        }
        let row = self.revoke(call, trail, key, |row| match row.state() {
            state @ (KeyState::PendingDeletion | KeyState::Destroyed) => Err(refusal(state)),
            state if row.destroying.is_some() => Err(not_from(state)),
            _ => {
                let window_ms = i64::from(window_days) * DAY_MS;
                row.set_state(KeyState::PendingDeletion);
                let now_ms = self.clock.now_ms();
                row.scheduled_ms = Some(now_ms);
                row.delete_ms = Some(now_ms.saturating_add(window_ms));
                row.delete_observed_ms = Some(self.observed_ms().saturating_add(window_ms.unsigned_abs()));
                Ok(true)
            }
        })?;
        row.delete_ms.ok_or_else(internal)
    }

    /// PendingDeletion -> Enabled, as the cloud API has it; -> PendingImport if it has no material.
    ///
    /// # Errors
    /// `Rejected.StateModifiedFailed` in any other state, and once its material has been left behind.
    pub fn cancel_key_deletion(&self, call: &Call, trail: &mut Trail, key: &str) -> Result<(), KmsError> {
        self.restore(call, trail, key, |row| match row.state() {
            KeyState::PendingDeletion if row.destroying.is_none() => {
                row.set_state(if row.lacks_material() {
                    KeyState::PendingImport
                } else {
                    KeyState::Enabled
                });
                row.scheduled_ms = None;
                row.delete_ms = None;
                row.delete_observed_ms = None;
                Ok(true)
            }
            state => Err(not_from(state)),
        })
    }

    /// Holds the key's write lock over `step`, which says whether it changed the row, and over the commit. The row as it
    /// is then.
    pub(super) fn transition(
        &self,
        call: &Call,
        trail: &mut Trail,
        key: &str,
        effect: Effect,
        step: impl FnOnce(&mut KeyRow) -> Result<bool, KmsError>,
    ) -> Result<KeyRow, KmsError> {
        let id = self.resolve(key)?;
        trail.note(self.arn(id));
        let lock = self.lock_of(id)?;
        let mut row = lock.write();
        let mut next = row.clone();
        let put = |row: &KeyRow| {
            // A window begins in time that is stored, or a crash would take back what had passed before it.
            let time = row.delete_observed_ms.map(|_| self.time_row());
            let row = row.encode_to_vec();
            move |change: &mut Change<'_>| {
                if let Some(time) = &time {
                    change.put(Table::Manifest, TIME_KEY, time)?;
                }
                change.put(Table::Keys, id.as_bytes(), &row)
            }
        };
        let is_change = step(&mut next);
        // What was taken away before in memory alone is made to last before anybody is told that it is so already.
        let is_repeated = effect == Effect::Restrictive && is_change == Ok(false);
        if is_repeated || (is_change.is_err() && self.unstored.lock().contains(&id)) {
            self.commit(call, trail, Effect::Repeated, put(&row), |_| {})?;
            self.unstored.lock().remove(&id);
            // That was recorded; a refusal is still to be.
            trail.recorded &= is_change.is_ok();
        }
        if !is_change? {
            return Ok(next);
        }
        next.revision += 1;
        let state = next.state();
        let build = put(&next);
        // Until it is known to be stored: a batch that failed may have come back all the same.
        self.unstored.lock().insert(id);
        let mut epoch = None;
        self.commit(call, trail, effect, build, |revocation_epoch| {
            epoch = Some(revocation_epoch);
            *row = next;
            if state != KeyState::Enabled {
                self.drop_materials(id);
            }
            // Nobody may be watching.
            let _ = self.events.send(KeyEvent {
                key_id: id,
                state,
                revocation_epoch,
            });
        })?;
        self.unstored.lock().remove(&id);
        trail.epoch = epoch;
        Ok(row.clone())
    }

    /// A transition that takes something away, and is over when nobody can show it any more. One that took nothing away,
    /// since that was done before, waits for the same. The row as it was stored.
    pub(super) fn revoke(
        &self,
        call: &Call,
        trail: &mut Trail,
        key: &str,
        step: impl FnOnce(&mut KeyRow) -> Result<bool, KmsError>,
    ) -> Result<KeyRow, KmsError> {
        let id = self.resolve(key)?;
        let turn = self.turns.of(id);
        let _turn = turn.lock();
        let row = self.transition(call, trail, key, Effect::Restrictive, step)?;
        let epoch = trail.epoch.unwrap_or_else(|| {
            let epoch = self.revocation_epoch();
            self.tell_again(id, row.state(), epoch);
            epoch
        });
        self.clear_holders(id, epoch).inspect_err(|_| {
            // What was recorded is the change of state; how it went is still to be.
            trail.recorded = false;
        })?;
        Ok(row)
    }

    /// A transition that gives something back: not while a revocation of the key is waiting for its holders.
    fn restore(
        &self,
        call: &Call,
        trail: &mut Trail,
        key: &str,
        step: impl FnOnce(&mut KeyRow) -> Result<bool, KmsError>,
    ) -> Result<(), KmsError> {
        let turn = self.turns.of(self.resolve(key)?);
        let _turn = turn.lock();
        self.transition(call, trail, key, Effect::Other, step).map(drop)
    }

    /// The key that `key` names: its id, its ARN, or an alias of it.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`, or `InvalidParameter` if nothing is named.
    pub(super) fn resolve(&self, key: &str) -> Result<Uuid, KmsError> {
        if key.is_empty() {
            return Err(KmsError::invalid("KeyId", "is missing"));
        }
        let local = key.strip_prefix(&self.arn_prefix());
        if let Some(alias) = [Some(key), local]
            .into_iter()
            .flatten()
            .find(|name| name.starts_with("alias/"))
        {
            return self.alias_target(alias).ok_or_else(|| not_found(key));
        }
        self.resolve_id(key)
    }

    /// The key that `key` names, which may not be an alias.
    pub(super) fn resolve_id(&self, key: &str) -> Result<Uuid, KmsError> {
        let prefix = self.arn_prefix();
        let id = key
            .strip_prefix(&prefix)
            .and_then(|rest| rest.strip_prefix("key/"))
            .unwrap_or(key);
        // Of the forms that a UUID has, only the hyphenated one is a key id.
        let id = Uuid::try_parse(id).ok().filter(|_| id.len() == 36);
        id.filter(|id| self.keys.read().contains_key(id))
            .ok_or_else(|| not_found(key))
    }

    /// # Errors
    /// `Forbidden.KeyNotFound` if the key was destroyed.
    pub(super) fn must_live(&self, id: Uuid) -> Result<(), KmsError> {
        match self.lock_of(id)?.read().state() {
            KeyState::Destroyed => Err(refusal(KeyState::Destroyed)),
            _ => Ok(()),
        }
    }

    pub(super) fn lock_of(&self, id: Uuid) -> Result<KeyLock, KmsError> {
        let keys = self.keys.read();
        keys.get(&id).cloned().ok_or_else(|| not_found(&id.to_string()))
    }

    /// Takes the read locks of `ids` until the call has been recorded. In the order of the ids: two calls that took
    /// them in different orders could, with two writers between them, wait for each other for ever.
    pub(super) fn hold(&self, trail: &mut Trail, ids: &BTreeSet<Uuid>) {
        for &id in ids {
            if let Ok(lock) = self.lock_of(id) {
                trail.held.insert(id, lock.read_arc());
            }
        }
    }
}

impl Trail {
    /// A key that was locked by [`Engine::hold`], if it is Enabled.
    pub(super) fn usable(&self, id: Uuid) -> Result<&KeyGuard, KmsError> {
        let guard = self.held.get(&id).ok_or_else(|| not_found(&id.to_string()))?;
        match guard.state() {
            KeyState::Enabled => Ok(guard),
            state => Err(refusal(state)),
        }
    }
}

pub(super) fn material_key(key_id: Uuid, version_id: Uuid) -> Vec<u8> {
    [key_id.as_bytes().as_slice(), version_id.as_bytes()].concat()
}

pub(super) fn not_found(key: &str) -> KmsError {
    // What a caller sent is repeated to that caller, within reason.
    let shown: String = key.chars().filter(|c| !c.is_control()).take(128).collect();
    KmsError::new(Code::KeyNotFound, format!("no key '{shown}' here"))
}

/// Why a key in `state` cannot be used.
pub(super) fn refusal(state: KeyState) -> KmsError {
    let (code, message) = match state {
        KeyState::Disabled => (Code::Disabled, "the key is Disabled"),
        KeyState::PendingDeletion => (Code::PendingDeletion, "the key is PendingDeletion"),
        KeyState::PendingImport => (Code::PendingImport, "the key is PendingImport"),
        KeyState::Destroyed => (Code::KeyNotFound, "the key was destroyed"),
        KeyState::Enabled | KeyState::Unspecified => return internal(),
    };
    KmsError::new(code, message)
}

/// Why a key in `state` cannot go where it was told to.
pub(super) fn not_from(state: KeyState) -> KmsError {
    let name = match state {
        KeyState::Enabled => "Enabled",
        KeyState::Disabled => "Disabled",
        KeyState::PendingDeletion => "PendingDeletion",
        KeyState::PendingImport => "PendingImport",
        KeyState::Destroyed => return refusal(state),
        KeyState::Unspecified => return internal(),
    };
    KmsError::new(Code::StateModifiedFailed, format!("the key is {name}"))
}
