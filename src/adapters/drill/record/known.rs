//! Everything that a record is made of: as it was asked and read, or as a record that is there has it.

use super::super::document::Kind;
use super::super::facts::{host, ms_of, now};
use super::super::markers::Nonce;
use super::super::verify::{list, number, string};
use super::audit::Log;
use super::home::Home;
use super::live::Tried;
use super::{EXTERNAL, kind_for};
use kms_client::proto::key_metadata::Version;
use kms_client::proto::{Dependant, GetKeystoreInfoResponse, KeyMetadata};
use serde_json::{Value, json};

/// Of a key whose material kmsd made.
const OWN: &str = "Aliyun_KMS";
/// The kinds of root slot that there are, and what destroying one is worth.
const SLOTS: [(&str, &str); 2] = [("file", "none"), ("passphrase", "none")];

/// See above.
pub(super) struct Known {
    pub(super) key: KeyMetadata,
    pub(super) keystore: GetKeystoreInfoResponse,
    pub(super) dependants: Vec<Dependant>,
    pub(super) log: Option<Log>,
    pub(super) home: Option<Home>,
    pub(super) tried: Tried,
    pub(super) nonce: Option<Nonce>,
    pub(super) operator: String,
    pub(super) witness: Option<String>,
    pub(super) known_copies: Vec<String>,
    pub(super) made: Made,
}

/// By what, where and when a record was made.
pub(super) struct Made {
    pub(super) recorded: String,
    pub(super) host: Value,
    pub(super) tool_version: String,
    pub(super) tool_digest: Value,
    /// What there is to say of the key that signs.
    pub(super) signing_key: Option<&'static str>,
}

/// Of a key that was made for one record.
const OWN_SIGNING_KEY: &str = "made for this record alone: it proves nothing about who made it";

impl Made {
    /// Here and now.
    pub(super) fn now(is_key_own: bool) -> Self {
        let own = std::env::current_exe();
        Self {
            recorded: now(),
            host: host(),
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            tool_digest: own.map_or(Value::Null, |path| {
                super::super::destruction::program_digest(&path)
            }),
            signing_key: is_key_own.then_some(OWN_SIGNING_KEY),
        }
    }

    fn of(record: &Value) -> Result<Self, String> {
        let (host, tool) = (part(record, "host")?, part(record, "tool")?);
        let recorded = string(part(record, "time")?, "recorded")?;
        let time = recorded.parse::<jiff::Timestamp>().ok();
        if time.map(|time| time.to_string()).as_deref() != Some(recorded) {
            return Err("it was recorded at no time".to_owned());
        }
        Ok(Self {
            recorded: recorded.to_owned(),
            host: json!({
                "name": text_or_null(host, "name")?,
                "kernel": text_or_null(host, "kernel")?,
                "boot_id": text_or_null(host, "boot_id")?,
            }),
            tool_version: string(tool, "version")?.to_owned(),
            tool_digest: json!(text_or_null(part(tool, "sha256")?, "cmkfs")?),
            signing_key: record.get("signing_key").map(|_| OWN_SIGNING_KEY),
        })
    }
}

impl Known {
    pub(super) fn is_external(&self) -> bool {
        self.key.origin == EXTERNAL
    }

    pub(super) fn kind(&self) -> Kind {
        kind_for(&self.key.origin)
    }

    /// What a record says is known. Whatever is not taken from it here follows from what is.
    ///
    /// # Errors
    /// Something is missing, or cannot be.
    pub(super) fn of(record: &Value) -> Result<Self, String> {
        let keystore = keystore(record)?;
        let key = key(record)?;
        let nonce = text_or_null(record, "nonce")?;
        let dependants = list(part(record, "dependants")?, "known")?;
        Ok(Self {
            dependants: dependants.iter().map(dependant).collect::<Result<_, String>>()?,
            log: Log::of(part(record, "audit")?, &keystore, &key.arn)?,
            home: Home::of(part(record, "home")?)?,
            tried: Tried::of(record, &key)?,
            nonce: nonce.as_deref().map(Nonce::parse).transpose()?,
            operator: string(record, "operator")?.to_owned(),
            witness: Some(string(record, "witness")?.to_owned()),
            known_copies: vec![string(part(record, "known_copies")?, "named")?.to_owned()],
            made: Made::of(record)?,
            key,
            keystore,
        })
    }

    /// Whether there is a record of such a key in such a keystore: none repeats words that mean nothing to this program.
    ///
    /// # Errors
    /// What there is none of.
    pub(super) fn must_be_recordable(&self) -> Result<(), String> {
        let (key, keystore) = (&self.key, &self.keystore);
        let slot = (keystore.root_slot.as_str(), keystore.erasure.as_str());
        if !SLOTS.contains(&slot) {
            return Err(format!(
                "there is no root slot '{}' with erasure '{}'",
                slot.0, slot.1
            ));
        }
        for (what, said, known) in [
            ("origin", &key.origin, &[OWN, EXTERNAL][..]),
            ("specification", &key.key_spec, &["Aliyun_AES_256"][..]),
            ("usage", &key.key_usage, &["ENCRYPT/DECRYPT"][..]),
            ("protection level", &key.protection_level, &["SOFTWARE"][..]),
        ] {
            if !known.contains(&said.as_str()) {
                return Err(format!("there is no {what} '{said}' of a key"));
            }
        }
        let arn = format!(
            "acs:kms:{}:{}:key/{}",
            keystore.region, keystore.account, key.key_id
        );
        if key.arn != arn {
            return Err(format!(
                "the key {} of this keystore is not {}",
                key.key_id, key.arn
            ));
        }
        if key.versions.is_empty() {
            return Err("the key has no version".to_owned());
        }
        self.must_have_had_material()
    }

    /// A key that never had material has none that could be gone.
    fn must_have_had_material(&self) -> Result<(), String> {
        let was_imported = self.log.as_ref().is_some_and(Log::has_import);
        match (self.is_external(), was_imported, self.key.destruction_epoch) {
            (false, true, _) => Err(format!(
                "the audit log has an import into a key of the origin {}",
                self.key.origin
            )),
            (true, false, None) => Err(format!(
                "there is nothing to record: kmsd knows of no material that the key {} ever had; if it had some before kmsd kept the \
                 epoch with the key, its import is in the audit log (--kms-home DIR, or --audit-log FILE)",
                self.key.key_id
            )),
            _ => Ok(()),
        }
    }
}

pub(super) fn part<'v>(of: &'v Value, name: &str) -> Result<&'v Value, String> {
    of.get(name)
        .filter(|value| value.is_object())
        .ok_or_else(|| format!("it has no '{name}'"))
}

fn text_or_null(of: &Value, name: &str) -> Result<Option<String>, String> {
    match of.get(name) {
        Some(Value::Null) => Ok(None),
        _ => string(of, name).map(|text| Some(text.to_owned())),
    }
}

fn ms_or_null(of: &Value, name: &str) -> Result<Option<i64>, String> {
    let text = text_or_null(of, name)?;
    text.map(|text| ms_of(&text).ok_or_else(|| format!("its '{name}' is no time")))
        .transpose()
}

fn ms(of: &Value, name: &str) -> Result<i64, String> {
    ms_or_null(of, name)?.ok_or_else(|| format!("it has no '{name}'"))
}

fn keystore(record: &Value) -> Result<GetKeystoreInfoResponse, String> {
    let keystore = part(record, "keystore")?;
    let text = |name| string(keystore, name).map(str::to_owned);
    let drill = keystore.get("is_for_drills").and_then(Value::as_bool);
    let head = hex::decode(string(keystore, "audit_head")?);
    Ok(GetKeystoreInfoResponse {
        keystore_id: text("id")?,
        region: text("region")?,
        account: text("account")?,
        creation_date_ms: ms(keystore, "created")?,
        epoch: number(keystore, "epoch")?,
        state_seq: number(keystore, "state_seq")?,
        audit_records: number(keystore, "audit_records")?,
        audit_head: head.map_err(|_| "its audit head is no digest".to_owned())?,
        drill: drill.ok_or("it does not say whether its keystore is one for drills")?,
        root_slot: string(record, "root_slot")?.to_owned(),
        erasure: string(record, "erasure")?.to_owned(),
        now_ms: ms(part(record, "time")?, "by_kmsd")?,
        ..GetKeystoreInfoResponse::default()
    })
}

fn key(record: &Value) -> Result<KeyMetadata, String> {
    let key = part(record, "key")?;
    let text = |name| string(key, name).map(str::to_owned);
    let versions = list(key, "versions")?.iter().map(|version| {
        Ok(Version {
            key_version_id: string(version, "id")?.to_owned(),
            creation_date_ms: ms(version, "created")?,
        })
    });
    let left = part(record, "method")?.get("epoch_before");
    Ok(KeyMetadata {
        key_id: text("id")?,
        arn: text("arn")?,
        origin: text("origin")?,
        key_spec: text("spec")?,
        key_usage: text("usage")?,
        protection_level: text("protection_level")?,
        description: text("description")?,
        creator: text("creator_uid")?,
        versions: versions.collect::<Result<_, String>>()?,
        creation_date_ms: ms(key, "created")?,
        deletion_request_date_ms: ms_or_null(key, "deletion_asked_for")?,
        deletion_due_date_ms: ms_or_null(key, "deletion_due")?,
        destruction_date_ms: ms_or_null(key, "ended")?,
        destruction_epoch: left.and_then(Value::as_u64),
        ..KeyMetadata::default()
    })
}

fn dependant(of: &Value) -> Result<Dependant, String> {
    let domain =
        u32::try_from(number(of, "domain")?).map_err(|_| "there is no such key domain".to_owned())?;
    let mounted = of.get("is_mounted").and_then(Value::as_bool);
    Ok(Dependant {
        volume_id: string(of, "volume")?.to_owned(),
        domain,
        location: string(of, "location")?.to_owned(),
        files: number(of, "files")?,
        bytes: number(of, "bytes")?,
        mounted: mounted.ok_or("a volume is neither mounted nor not")?,
        report_time_ms: ms(of, "reported")?,
    })
}
