//! What is tried: kmsd is asked to use the key, and volumes are asked for their keys.

use super::super::document::{Check, Outcome};
use super::super::verify::{list, string};
use super::{NamedVolume, check};
use crate::adapters::kms::{Holder, SessionKeys};
use crate::engine::{Domain, KeyContext, KeyError, KeyService};
use kms_client::proto::{self, Dependant, KeyMetadata};
use kms_client::{Client, ClientError, Code};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// For a session that is given nothing.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// Bytes of a blob behind its header: random, ciphertext and tag (docs/kms-format.md, "Ciphertext blob").
const BLOB_BODY_LEN: usize = 16 + 32 + 16;
/// What stands for a key that is gone, in each kind of answer.
const KEY_REFUSED: &str = "refused: Forbidden.KeyNotFound";
const VOLUME_REFUSED: &str = "kmsd refuses its volume key as one that it does not have; no mount was asked";
const DOMAIN_DARK: &str = "the mount says that its key is gone";

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// As it must for a key that is gone.
    Gone,
    /// With what may not be had any more.
    Given(String),
    /// Otherwise: nothing follows.
    Unclear(String),
}

impl Answer {
    fn seen(&self, gone: &str) -> (Outcome, String) {
        match self {
            Self::Gone => (Outcome::Pass, gone.to_owned()),
            Self::Given(what) => (Outcome::Fail, what.clone()),
            Self::Unclear(why) => (Outcome::NotTested, why.clone()),
        }
    }

    /// Of a check in a record.
    fn of(check: &Value) -> Result<Self, String> {
        let detail = string(check, "detail")?.to_owned();
        match Outcome::parse(string(check, "result")?) {
            Some(Outcome::Pass) => Ok(Self::Gone),
            Some(Outcome::Fail) => Ok(Self::Given(detail)),
            Some(Outcome::NotTested) => Ok(Self::Unclear(detail)),
            None => Err("a check has no result".to_owned()),
        }
    }
}

/// What kmsd did when it was asked to use the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uses {
    pub(super) encrypt: Answer,
    pub(super) generate: Answer,
    pub(super) wrap: Answer,
    /// Of each version, oldest first.
    pub(super) decrypt: Vec<Answer>,
}

/// What became of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TriedVolume {
    pub(super) id: String,
    pub(super) directory: String,
    /// It is all under the key; or something in it is.
    pub(super) is_whole: bool,
    pub(super) answer: Answer,
}

/// Everything that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tried {
    pub(super) uses: Uses,
    pub(super) volumes: Vec<TriedVolume>,
}

impl Uses {
    /// The checks that this comes to.
    #[must_use]
    pub fn checks(&self, key: &KeyMetadata) -> Vec<Check> {
        let refused = |id, claim: String, answer: &Answer| check(id, claim, answer.seen(KEY_REFUSED));
        let by_name = [
            ("refused-encrypt", "Encrypt", &self.encrypt),
            ("refused-generate", "GenerateDataKey", &self.generate),
            ("refused-generate", "GenerateDataKeyWithoutPlaintext", &self.wrap),
        ];
        let by_name = by_name.into_iter().map(|(id, operation, answer)| {
            refused(id, format!("kmsd refuses {operation} under the key"), answer)
        });
        let by_version = key.versions.iter().zip(&self.decrypt).map(|(version, answer)| {
            let claim = format!("kmsd refuses Decrypt under version {}", version.key_version_id);
            refused("refused-decrypt", claim, answer)
        });
        by_name.chain(by_version).collect()
    }
}

impl Tried {
    pub(super) fn checks(&self, key: &KeyMetadata) -> Vec<Check> {
        let mut checks = self.uses.checks(key);
        if self.volumes.is_empty() {
            let why = "no volume was named (--volume DIR)".to_owned();
            let claim = "volumes under the key do not open";
            checks.push(check("volume-refused", claim, (Outcome::NotTested, why)));
        }
        checks.extend(self.volumes.iter().map(|volume| {
            let (id, directory) = (&volume.id, &volume.directory);
            let (claim, gone) = match volume.is_whole {
                true => (
                    format!("kmsd does not open the volume {id} in {directory}"),
                    VOLUME_REFUSED,
                ),
                false => (
                    format!("what is under the key in the volume {id} in {directory} is dark"),
                    DOMAIN_DARK,
                ),
            };
            check("volume-refused", claim, volume.answer.seen(gone))
        }));
        checks
    }

    /// Which volumes were tried.
    pub(super) fn volumes(&self) -> Value {
        let each = self.volumes.iter().map(|volume| {
            json!({ "id": volume.id, "directory": volume.directory, "is_all_under_the_key": volume.is_whole })
        });
        each.collect()
    }

    /// What a record says that was tried.
    ///
    /// # Errors
    /// A check is missing.
    pub(super) fn of(record: &Value, key: &KeyMetadata) -> Result<Self, String> {
        let checks = list(record, "checks")?;
        let answer = |id: &str, number: usize| {
            let mut of = checks
                .iter()
                .filter(|check| check.get("id").and_then(Value::as_str) == Some(id));
            of.nth(number)
                .ok_or_else(|| format!("the check {id} is missing"))
                .and_then(Answer::of)
        };
        let decrypt = (0..key.versions.len()).map(|number| answer("refused-decrypt", number));
        let uses = Uses {
            encrypt: answer("refused-encrypt", 0)?,
            generate: answer("refused-generate", 0)?,
            wrap: answer("refused-generate", 1)?,
            decrypt: decrypt.collect::<Result<_, String>>()?,
        };
        let volumes = list(record, "volumes")?.iter().enumerate();
        let volumes = volumes.map(|(number, volume)| {
            Ok(TriedVolume {
                id: string(volume, "id")?.to_owned(),
                directory: string(volume, "directory")?.to_owned(),
                is_whole: volume.get("is_all_under_the_key") == Some(&Value::Bool(true)),
                answer: answer("volume-refused", number)?,
            })
        });
        Ok(Self {
            volumes: volumes.collect::<Result<_, String>>()?,
            uses,
        })
    }
}

/// Has kmsd asked to use the key in every way that there is. It is not asked whether it may: a key that is there is used.
pub fn uses(client: &Client, key: &KeyMetadata, region: &str) -> Uses {
    let key_id = || key.key_id.clone();
    let encrypt = proto::EncryptRequest {
        key_id: key_id(),
        plaintext: b"destruction record".to_vec(),
        encryption_context: BTreeMap::new(),
    };
    let generate = proto::GenerateDataKeyRequest {
        key_id: key_id(),
        ..proto::GenerateDataKeyRequest::default()
    };
    let wrap = proto::GenerateDataKeyWithoutPlaintextRequest {
        key_id: key_id(),
        ..proto::GenerateDataKeyWithoutPlaintextRequest::default()
    };
    let decrypt = |version: &proto::key_metadata::Version| {
        let Some(ciphertext_blob) = blob(region, &key.key_id, &version.key_version_id) else {
            return Answer::Unclear("kmsd names a version that cannot be".to_owned());
        };
        let request = proto::DecryptRequest {
            ciphertext_blob,
            encryption_context: BTreeMap::new(),
        };
        refused(&client.call(|mut kms| async move { kms.decrypt(request).await }))
    };
    Uses {
        encrypt: refused(&client.call(|mut kms| async move { kms.encrypt(encrypt).await })),
        generate: refused(&client.call(|mut kms| async move { kms.generate_data_key(generate).await })),
        wrap: refused(
            &client.call(|mut kms| async move { kms.generate_data_key_without_plaintext(wrap).await }),
        ),
        decrypt: key.versions.iter().map(decrypt).collect(),
    }
}

/// What could be a blob under this version. Of a key that is there kmsd says that such a one cannot be decrypted, and of one that
/// is not, that it is not.
fn blob(region: &str, key_id: &str, version_id: &str) -> Option<Vec<u8>> {
    let id = |text| uuid::Uuid::try_parse(text).ok();
    let mut blob = vec![1, u8::try_from(region.len()).ok()?];
    blob.extend_from_slice(region.as_bytes());
    blob.extend_from_slice(id(key_id)?.as_bytes());
    blob.extend_from_slice(id(version_id)?.as_bytes());
    blob.resize(blob.len() + BLOB_BODY_LEN, 0);
    Some(blob)
}

/// kmsd's words are not repeated: they are those for a key of any origin.
fn refused<T>(answer: &Result<T, ClientError>) -> Answer {
    match answer {
        Ok(_) => Answer::Given("kmsd did it".to_owned()),
        Err(ClientError::Kms(error)) if error.code == Code::KeyNotFound => Answer::Gone,
        Err(ClientError::Kms(error)) => {
            Answer::Unclear(format!("refused for another reason: {}", error.code))
        }
        Err(error) => Answer::Unclear(error.to_string()),
    }
}

/// Whether volumes that were named are given their keys.
///
/// # Errors
/// One of them is not under the key.
pub(super) fn volumes(
    volumes: &[NamedVolume],
    key: &KeyMetadata,
    dependants: &[Dependant],
    socket: &Path,
) -> Result<Vec<TriedVolume>, String> {
    let each = volumes.iter().map(|volume| {
        let id = uuid::Uuid::from_bytes(volume.superblock.volume()).to_string();
        let is_whole = volume.superblock.cmk_arn() == key.arn;
        let states = domain_states(volume.state.as_ref(), &key.arn);
        let is_reported = dependants.iter().any(|dependant| dependant.volume_id == id);
        if !is_whole && !is_reported && states.is_empty() {
            return Err(format!(
                "volume {} is under {}, and nothing of it was reported to be under {}",
                volume.path.display(),
                volume.superblock.cmk_arn(),
                key.arn
            ));
        }
        Ok(TriedVolume {
            id,
            directory: volume.path.to_string_lossy().into_owned(),
            is_whole,
            answer: match is_whole {
                true => of_volume_key(volume, socket),
                false => of_domains(&states),
            },
        })
    });
    each.collect()
}

/// A volume whose own key is gone: kmsd is asked for its volume key, as its mount would.
fn of_volume_key(volume: &NamedVolume, socket: &Path) -> Answer {
    let superblock = &volume.superblock;
    let holder = Holder {
        socket: socket.to_owned(),
        volume: superblock.volume(),
        location: volume.path.clone(),
        drain_max: DRAIN_MAX,
    };
    let context = KeyContext::VolumeKey {
        volume: superblock.volume(),
        domain: Domain::FIRST,
        superblock_hash: superblock.hash(),
    };
    let asked = SessionKeys::open(holder, superblock.cmk_arn())
        .and_then(|keys| keys.open(&[(context, superblock.wrapped_vk().to_vec())]));
    match asked.map(|mut keys| keys.pop()) {
        Ok(Some(Ok(_))) => Answer::Given("kmsd gave its volume key".to_owned()),
        Ok(Some(Err(KeyError::Erased | KeyError::Destroyed))) => Answer::Gone,
        Ok(Some(Err(error))) | Err(error) => {
            Answer::Unclear(format!("it is refused for another reason: {error}"))
        }
        Ok(None) => Answer::Unclear("kmsd gave no answer".to_owned()),
    }
}

/// What the mount of a volume says of the directories that are under the key.
fn domain_states<'s>(state: Option<&'s Value>, arn: &str) -> Vec<&'s str> {
    let domains = state
        .and_then(|state| state.get("domains"))
        .and_then(Value::as_array);
    domains
        .into_iter()
        .flatten()
        .filter(|domain| domain.get("cmk_arn").and_then(Value::as_str) == Some(arn))
        .filter_map(|domain| domain.get("key_state").and_then(Value::as_str))
        .collect()
}

/// A volume of which a directory was under the key: its mount knows.
fn of_domains(states: &[&str]) -> Answer {
    if states.is_empty() {
        let why = "which keys of a domain a volume has is known while it is mounted alone, and until the domain is removed";
        return Answer::Unclear(why.to_owned());
    }
    match states.iter().all(|&state| state == "erased") {
        true => Answer::Gone,
        false => Answer::Given(format!("the mount says: {}", states.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kms_client::KmsError;

    #[test]
    fn a_use_is_refused_only_if_kmsd_has_no_such_key() {
        let answer = |code| {
            let error = KmsError::new(code, "in kmsd's words");
            refused::<()>(&Err(ClientError::Kms(error)))
        };
        assert_eq!(answer(Code::KeyNotFound), Answer::Gone);
        for code in [
            Code::Disabled,
            Code::PendingImport,
            Code::InvalidParameter,
            Code::NoPermission,
        ] {
            let Answer::Unclear(why) = answer(code) else {
                panic!("{code}")
            };
            assert!(why.contains(code.as_str()) && !why.contains("words"), "{why}");
        }
        let unreachable = ClientError::Unreachable("gone".to_owned());
        assert!(matches!(refused::<()>(&Err(unreachable)), Answer::Unclear(_)));
        assert_eq!(refused(&Ok(())), Answer::Given("kmsd did it".to_owned()));
        assert_eq!(refused(&Ok(())).seen(KEY_REFUSED).0, Outcome::Fail);
    }

    #[test]
    fn what_is_under_a_key_in_a_volume_is_dark_only_if_its_mount_says_so_of_all() {
        assert!(matches!(of_domains(&[]), Answer::Unclear(_)));
        assert_eq!(of_domains(&["erased", "erased"]), Answer::Gone);
        for states in [&["live"][..], &["erased", "live"], &["revoked"]] {
            let (outcome, detail) = of_domains(states).seen(DOMAIN_DARK);
            assert!(outcome == Outcome::Fail && detail.contains(states[states.len() - 1]));
        }
        let status = json!({ "domains": [
            { "cmk_arn": "one", "key_state": "live" },
            { "cmk_arn": "two", "key_state": "erased" },
        ]});
        assert_eq!(domain_states(Some(&status), "one"), ["live"]);
        assert_eq!(domain_states(Some(&status), "three"), [""; 0]);
        assert_eq!(domain_states(None, "one"), [""; 0]);
    }
}
