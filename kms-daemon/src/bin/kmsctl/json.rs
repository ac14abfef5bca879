//! The API's messages as JSON, with the names that the cloud API gives them.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use kms_api::proto;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(crate) fn base64_decode(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
}

fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// RFC 3339, in UTC, to the second.
pub(crate) fn time(ms: i64) -> Value {
    match jiff::Timestamp::from_second(ms.div_euclid(1000)) {
        Ok(time) => json!(time.to_string()),
        Err(_) => json!(ms),
    }
}

pub(crate) fn key_metadata(key: &proto::KeyMetadata) -> Value {
    let state = match key.key_state() {
        proto::KeyState::Enabled => "Enabled",
        proto::KeyState::Disabled => "Disabled",
        proto::KeyState::PendingDeletion => "PendingDeletion",
        proto::KeyState::PendingImport => "PendingImport",
        proto::KeyState::Destroyed => "Destroyed",
        proto::KeyState::Unspecified => "Unknown",
    };
    let versions = key.versions.iter().map(|version| {
        json!({ "KeyVersionId": version.key_version_id, "CreationDate": time(version.creation_date_ms) })
    });
    let mut metadata = json!({
        "KeyId": key.key_id,
        "Arn": key.arn,
        "KeyState": state,
        "KeySpec": key.key_spec,
        "KeyUsage": key.key_usage,
        "Origin": key.origin,
        "ProtectionLevel": key.protection_level,
        "Description": key.description,
        "Creator": key.creator,
        "CreationDate": time(key.creation_date_ms),
        "DeleteDate": key.delete_date_ms.map_or_else(|| json!(""), time),
        "PrimaryKeyVersion": key.primary_key_version,
        "KeyVersions": versions.collect::<Value>(),
    });
    let more = [
        ("DeletionRequestDate", key.deletion_request_date_ms.map(time)),
        ("DeletionDueDate", key.deletion_due_date_ms.map(time)),
        ("DestructionDate", key.destruction_date_ms.map(time)),
        ("DestructionEpoch", key.destruction_epoch.map(Value::from)),
        ("MaterialExpireTime", key.material_expire_time_ms.map(time)),
    ];
    if let Some(fields) = metadata.as_object_mut() {
        fields.extend(
            more.into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?))),
        );
    }
    metadata
}

pub(crate) fn dependants(dependants: &[proto::Dependant]) -> Value {
    let each = dependants.iter().map(|dependant| {
        json!({
            "VolumeId": dependant.volume_id,
            "Domain": dependant.domain,
            "Location": dependant.location,
            "Files": dependant.files,
            "Bytes": dependant.bytes,
            "Mounted": dependant.mounted,
            "ReportTime": time(dependant.report_time_ms),
        })
    });
    each.collect()
}

pub(crate) fn import(answer: &proto::GetParametersForImportResponse) -> Value {
    json!({
        "KeyId": answer.key_id,
        "PublicKey": base64(&answer.public_key),
        "ImportToken": base64(&answer.import_token),
        "TokenExpireTime": time(answer.token_expire_time_ms),
        "RequestId": answer.request_id,
    })
}

pub(crate) fn keystore(answer: &proto::GetKeystoreInfoResponse) -> Value {
    json!({
        "KeystoreId": answer.keystore_id,
        "Region": answer.region,
        "Account": answer.account,
        "CreationDate": time(answer.creation_date_ms),
        "Epoch": answer.epoch,
        "StateSeq": answer.state_seq,
        "RevocationEpoch": answer.revocation_epoch,
        "RootSlot": answer.root_slot,
        "Erasure": answer.erasure,
        "Drill": answer.drill,
        "DestructionSuspended": answer.destruction_suspended,
        "ObservedMs": answer.observed_ms,
        "Now": time(answer.now_ms),
        "AuditRecords": answer.audit_records,
        "AuditHead": hex::encode(&answer.audit_head),
        "RequestId": answer.request_id,
    })
}

pub(crate) fn aliases(answer: &proto::ListAliasesResponse) -> Value {
    let aliases = answer.aliases.iter().map(|alias| {
        json!({
            "AliasName": alias.alias_name,
            "AliasArn": alias.alias_arn,
            "KeyId": alias.key_id,
        })
    });
    json!({
        "Aliases": { "Alias": aliases.collect::<Value>() },
        "PageNumber": answer.page_number,
        "PageSize": answer.page_size,
        "TotalCount": answer.total_count,
        "RequestId": answer.request_id,
    })
}

pub(crate) fn keys(answer: &proto::ListKeysResponse) -> Value {
    let keys = answer.keys.iter();
    let keys = keys.map(|key| json!({ "KeyId": key.key_id, "KeyArn": key.key_arn }));
    json!({
        "Keys": { "Key": keys.collect::<Value>() },
        "PageNumber": answer.page_number,
        "PageSize": answer.page_size,
        "TotalCount": answer.total_count,
        "RequestId": answer.request_id,
    })
}

pub(crate) fn encrypted(answer: &proto::EncryptResponse) -> Value {
    json!({
        "KeyId": answer.key_id,
        "KeyVersionId": answer.key_version_id,
        "CiphertextBlob": base64(&answer.ciphertext_blob),
        "RequestId": answer.request_id,
    })
}

pub(crate) fn decrypted(answer: &proto::DecryptResponse) -> Value {
    json!({
        "KeyId": answer.key_id,
        "KeyVersionId": answer.key_version_id,
        "Plaintext": base64(&answer.plaintext),
        "RequestId": answer.request_id,
    })
}

pub(crate) fn generated(answer: &proto::GenerateDataKeyResponse) -> Value {
    json!({
        "KeyId": answer.key_id,
        "KeyVersionId": answer.key_version_id,
        "Plaintext": base64(&answer.plaintext),
        "CiphertextBlob": base64(&answer.ciphertext_blob),
        "RequestId": answer.request_id,
    })
}

pub(crate) fn wrapped(answer: &proto::GenerateDataKeyWithoutPlaintextResponse) -> Value {
    json!({
        "KeyId": answer.key_id,
        "KeyVersionId": answer.key_version_id,
        "CiphertextBlob": base64(&answer.ciphertext_blob),
        "RequestId": answer.request_id,
    })
}

pub(crate) fn metrics(answer: &proto::GetMetricsResponse) -> Value {
    let operations: Map<String, Value> = answer
        .operations
        .iter()
        .map(|one| {
            (
                one.operation.clone(),
                json!({ "Calls": one.calls, "Errors": one.errors }),
            )
        })
        .collect();
    json!({
        "Operations": operations,
        "DataKeysIssued": answer.data_keys_issued,
        "DataKeysOpened": answer.data_keys_opened,
        "SessionsOpen": answer.sessions_open,
        "AuditRecords": answer.audit_records,
        "UptimeMs": answer.uptime_ms,
        "RequestId": answer.request_id,
    })
}

pub(crate) fn error(error: &proto::Error) -> Value {
    json!({ "Error": {
        "Code": error.code,
        "Message": error.message,
        "HttpStatus": error.http_status,
    }})
}

/// One item of a batch on the command line.
pub(crate) struct Item<'a> {
    number: usize,
    fields: &'a Map<String, Value>,
}

/// The items of a batch on the command line.
pub(crate) fn batch(items: &Value) -> Result<Vec<Item<'_>>, String> {
    let items = items
        .as_array()
        .ok_or("InvalidParameter: Items must be a JSON array")?;
    let each = items.iter().enumerate().map(|(at, item)| {
        let fields = item.as_object();
        let fields =
            fields.ok_or_else(|| format!("InvalidParameter: item {} must be a JSON object", at + 1))?;
        Ok(Item {
            number: at + 1,
            fields,
        })
    });
    each.collect()
}

impl Item<'_> {
    fn wrong(&self, field: &str, what: &str) -> String {
        format!("InvalidParameter: {field} of item {} must be {what}", self.number)
    }

    /// A string, empty if it is left out.
    pub(crate) fn text(&self, field: &str) -> Result<String, String> {
        match self.fields.get(field) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(self.wrong(field, "a string")),
        }
    }

    pub(crate) fn bytes(&self, field: &str) -> Result<Vec<u8>, String> {
        base64_decode(&self.text(field)?).ok_or_else(|| self.wrong(field, "base64"))
    }

    /// A number, if it is there.
    pub(crate) fn number(&self, field: &str) -> Result<Option<u32>, String> {
        let Some(value) = self.fields.get(field) else {
            return Ok(None);
        };
        let number = value.as_u64().and_then(|number| number.try_into().ok());
        number.map(Some).ok_or_else(|| self.wrong(field, "a number"))
    }

    pub(crate) fn context(&self) -> Result<BTreeMap<String, String>, String> {
        let Some(value) = self.fields.get("EncryptionContext") else {
            return Ok(BTreeMap::new());
        };
        let entries = value.as_object().and_then(|entries| {
            let pairs = entries.iter();
            pairs
                .map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
                .collect()
        });
        entries.ok_or_else(|| self.wrong("EncryptionContext", "an object of strings"))
    }
}
