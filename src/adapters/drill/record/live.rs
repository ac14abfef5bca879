//! What is tried: kmsd is asked to use the key, volumes are asked for their keys, and the keystore's files are looked at.

use super::super::document::{Check, Outcome};
use super::{Files, NamedVolume, check};
use crate::adapters::kms::{Holder, SessionKeys};
use crate::engine::{Domain, KeyContext, KeyError, KeyService};
use kms_client::proto::{self, Dependant, KeyMetadata};
use kms_client::{Client, ClientError, Code};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// For a session that is given nothing.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// Bytes of a blob behind its header: random, ciphertext and tag (docs/kms-format.md, "Ciphertext blob").
const BLOB_BODY_LEN: usize = 16 + 32 + 16;

/// Whether kmsd does anything under the key.
pub(super) fn uses(client: &Client, key: &KeyMetadata, region: &str) -> Vec<Check> {
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
    let wrapped = proto::GenerateDataKeyWithoutPlaintextRequest {
        key_id: key_id(),
        ..proto::GenerateDataKeyWithoutPlaintextRequest::default()
    };
    let mut checks = vec![
        refused(
            "refused-encrypt",
            "kmsd refuses Encrypt under the key",
            client.call(|mut kms| async move { kms.encrypt(encrypt).await }),
        ),
        refused(
            "refused-generate",
            "kmsd refuses GenerateDataKey under the key",
            client.call(|mut kms| async move { kms.generate_data_key(generate).await }),
        ),
        refused(
            "refused-generate",
            "kmsd refuses GenerateDataKeyWithoutPlaintext under the key",
            client.call(|mut kms| async move { kms.generate_data_key_without_plaintext(wrapped).await }),
        ),
    ];
    for version in &key.versions {
        let claim = format!("kmsd refuses Decrypt under version {}", version.key_version_id);
        let Some(ciphertext_blob) = blob(region, &key.key_id, &version.key_version_id) else {
            let why = "kmsd names a version that cannot be".to_owned();
            checks.push(check("refused-decrypt", claim, (Outcome::NotTested, why)));
            continue;
        };
        let request = proto::DecryptRequest {
            ciphertext_blob,
            encryption_context: BTreeMap::new(),
        };
        checks.push(refused(
            "refused-decrypt",
            claim,
            client.call(|mut kms| async move { kms.decrypt(request).await }),
        ));
    }
    checks
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
fn refused<T>(id: &'static str, claim: impl Into<String>, answer: Result<T, ClientError>) -> Check {
    let seen = match answer {
        Ok(_) => (Outcome::Fail, "kmsd did it".to_owned()),
        Err(ClientError::Kms(error)) if error.code == Code::KeyNotFound => {
            (Outcome::Pass, format!("refused: {}", error.code))
        }
        Err(ClientError::Kms(error)) => (
            Outcome::NotTested,
            format!("refused for another reason: {}", error.code),
        ),
        Err(error) => (Outcome::NotTested, error.to_string()),
    };
    check(id, claim, seen)
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
) -> Result<Vec<Check>, String> {
    if volumes.is_empty() {
        let why = "no volume was named (--volume DIR)".to_owned();
        let claim = "volumes under the key do not open";
        return Ok(vec![check("volume-refused", claim, (Outcome::NotTested, why))]);
    }
    let each = volumes.iter().map(|volume| {
        let shown = volume.path.display();
        let id = uuid::Uuid::from_bytes(volume.superblock.volume()).to_string();
        if volume.superblock.cmk_arn() == key.arn {
            let claim = format!("the volume {id} in {shown} does not open");
            return Ok(check("volume-refused", claim, of_volume_key(volume, socket)));
        }
        let is_reported = dependants.iter().any(|dependant| dependant.volume_id == id);
        let states = domain_states(volume.state.as_ref(), &key.arn);
        if !is_reported && states.is_empty() {
            return Err(format!(
                "volume {shown} is under {}, and nothing of it was reported to be under {}",
                volume.superblock.cmk_arn(),
                key.arn
            ));
        }
        let claim = format!("what is under the key in the volume {id} in {shown} is dark");
        let seen = of_domains(&states);
        Ok(check("volume-refused", claim, seen))
    });
    each.collect()
}

/// A volume whose own key is gone: kmsd is asked for its volume key, as its mount would.
fn of_volume_key(volume: &NamedVolume, socket: &Path) -> (Outcome, String) {
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
        Ok(Some(Ok(_))) => (Outcome::Fail, "kmsd gave its volume key".to_owned()),
        Ok(Some(Err(KeyError::Erased | KeyError::Destroyed))) => (
            Outcome::Pass,
            "kmsd refuses its volume key as one that it does not have; a mount answers ENOKEY".to_owned(),
        ),
        Ok(Some(Err(error))) | Err(error) => (
            Outcome::NotTested,
            format!("it is refused for another reason: {error}"),
        ),
        Ok(None) => (Outcome::NotTested, "kmsd gave no answer".to_owned()),
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
fn of_domains(states: &[&str]) -> (Outcome, String) {
    if states.is_empty() {
        let why = "which keys of a domain a volume has is known while it is mounted alone, and until the domain is removed";
        return (Outcome::NotTested, why.to_owned());
    }
    match states.iter().all(|&state| state == "erased") {
        true => (Outcome::Pass, "the mount says that its key is gone".to_owned()),
        false => (Outcome::Fail, format!("the mount says: {}", states.join(", "))),
    }
}

/// Whether the slot that opened the key's material, and what it opened, lie in the keystore's home still.
///
/// # Errors
/// The home cannot be read.
pub(super) fn slot(files: &Files, key: &KeyMetadata) -> Result<Check, String> {
    let claim =
        "the home of the keystore has no slot and no root of the epoch that was left, nor of one before it";
    let Files::Home(home) = files else {
        let why = "kmsd's home was not named (--kms-home DIR)".to_owned();
        return Ok(check("slot-gone", claim, (Outcome::NotTested, why)));
    };
    let Some(left) = key.destruction_epoch else {
        let why = "kmsd does not know which epoch that was".to_owned();
        return Ok(check("slot-gone", claim, (Outcome::NotTested, why)));
    };
    let failed = |error: std::io::Error| format!("kmsd's home {}: {error}", home.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(home).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let epoch = ["slot-", "root-"]
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix))
            .and_then(|rest| rest.trim_end_matches(".staged").parse::<u64>().ok());
        if epoch.is_some_and(|epoch| epoch <= left) {
            found.push(name);
        }
    }
    let seen = match found.is_empty() {
        true => (
            Outcome::Pass,
            format!(
                "neither slot-{left} nor root-{left} has its name there; what that is worth, erasure says"
            ),
        ),
        false => (Outcome::Fail, format!("there is {}", found.join(", "))),
    };
    Ok(check("slot-gone", claim, seen))
}
