//! From the command line to the API and back.

use crate::arguments::{
    AliasOperation, BatchOperation, CryptographyOperation, DataKey, KeyOperation, KeystoreOperation,
};
use crate::dependants;
use crate::json::{self, Item};
use kms_api::proto::{self, kms_client::KmsClient};
use kms_client::{Client, ClientError, Code};
use serde_json::{Value, json};
use tonic::transport::Channel;

/// What kmsd takes; it has the last word.
const PENDING_WINDOW_DAYS: std::ops::RangeInclusive<u32> = 7..=30;

/// Calls one method of the API.
macro_rules! call {
    ($client:expr, $method:ident, $request:expr) => {{
        let request = $request;
        $client
            .call(|mut kms: KmsClient<Channel>| async move { kms.$method(request).await })
            .map_err(|error: ClientError| describe(&error))
    }};
}

/// The JSON of a batch: for each item its result, or its error.
macro_rules! outcomes {
    ($answer:expr, $module:ident, $result:path) => {{
        use proto::$module::item::Outcome;
        let answer = $answer;
        let items = answer.items.iter().map(|item| match &item.outcome {
            Some(Outcome::Result(result)) => $result(result),
            Some(Outcome::Error(error)) => json::error(error),
            None => Value::Null,
        });
        json!({ "Items": items.collect::<Value>(), "RequestId": answer.request_id })
    }};
}

pub(crate) fn key(client: &Client, operation: KeyOperation) -> Result<Value, String> {
    match operation {
        KeyOperation::CreateKey {
            description,
            key_spec,
            key_usage,
            origin,
            protection_level,
        } => {
            let request = proto::CreateKeyRequest {
                description,
                key_spec,
                key_usage,
                origin,
                protection_level,
            };
            let answer = call!(client, create_key, request)?;
            Ok(metadata(answer.key_metadata.as_ref(), &answer.request_id))
        }
        KeyOperation::DescribeKey(named) => {
            let request = proto::DescribeKeyRequest { key_id: named.key_id };
            let answer = call!(client, describe_key, request)?;
            let mut described = metadata(answer.key_metadata.as_ref(), &answer.request_id);
            if let (Some(key), Some(fields)) = (&answer.key_metadata, described.as_object_mut()) {
                // kmsd knows a key's state when its store is closed after a failure, too.
                let dependants = client
                    .list_dependants(&key.key_id)
                    .inspect_err(|error| dependants::warn(&key.key_id, &describe(error)));
                let dependants = dependants.map_or(Value::Null, |known| json::dependants(&known));
                fields.insert("Dependants".to_owned(), dependants);
            }
            Ok(described)
        }
        KeyOperation::ListKeys(page) => {
            let request = proto::ListKeysRequest {
                page_number: page.page_number,
                page_size: page.page_size,
            };
            Ok(json::keys(&call!(client, list_keys, request)?))
        }
        KeyOperation::EnableKey(named) => {
            let request = proto::EnableKeyRequest { key_id: named.key_id };
            Ok(done(&call!(client, enable_key, request)?.request_id))
        }
        KeyOperation::DisableKey(named) => {
            let request = proto::DisableKeyRequest { key_id: named.key_id };
            Ok(done(&call!(client, disable_key, request)?.request_id))
        }
        KeyOperation::ScheduleKeyDeletion {
            key,
            pending_window_in_days,
            yes,
        } => schedule(client, &key.key_id, pending_window_in_days, yes),
        KeyOperation::GetParametersForImport {
            key,
            wrapping_algorithm,
            wrapping_key_spec,
        } => {
            let request = proto::GetParametersForImportRequest {
                key_id: key.key_id,
                wrapping_algorithm,
                wrapping_key_spec,
            };
            Ok(json::import(&call!(client, get_parameters_for_import, request)?))
        }
        KeyOperation::ImportKeyMaterial {
            key,
            encrypted_key_material,
            import_token,
            key_material_expire_unix,
        } => {
            let request = proto::ImportKeyMaterialRequest {
                key_id: key.key_id,
                encrypted_key_material: encrypted_key_material.0,
                import_token: import_token.0,
                key_material_expire_unix,
            };
            Ok(done(&call!(client, import_key_material, request)?.request_id))
        }
        KeyOperation::DeleteKeyMaterial(named) => {
            let request = proto::DeleteKeyMaterialRequest { key_id: named.key_id };
            Ok(done(&call!(client, delete_key_material, request)?.request_id))
        }
        KeyOperation::CancelKeyDeletion(named) => {
            let request = proto::CancelKeyDeletionRequest { key_id: named.key_id };
            Ok(done(&call!(client, cancel_key_deletion, request)?.request_id))
        }
    }
}

fn schedule(client: &Client, key: &str, pending_window_in_days: u32, yes: bool) -> Result<Value, String> {
    let key_id = match dependants::of(client, key) {
        Ok(known) => {
            // What kmsd refuses whatever is answered is not asked about.
            if PENDING_WINDOW_DAYS.contains(&pending_window_in_days) && !known.is_destroyed {
                dependants::confirm(&known, pending_window_in_days, yes)?;
            }
            // By its id from here on: an alias may come to name another key while somebody thinks about it.
            known.key_id
        }
        // Without an audit log kmsd answers nothing, but takes away what it is told to.
        Err(error) if yes => {
            dependants::warn(key, &describe(&error));
            key.to_owned()
        }
        Err(error) if is_kmsd_at_fault(&error) => {
            return Err(format!(
                "{}; what depends on the key cannot be told: repeat with --yes",
                describe(&error)
            ));
        }
        Err(error) => return Err(describe(&error)),
    };
    let request = proto::ScheduleKeyDeletionRequest {
        key_id,
        pending_window_in_days,
    };
    let answer = call!(client, schedule_key_deletion, request)?;
    Ok(json!({ "DeleteDate": json::time(answer.delete_date_ms), "RequestId": answer.request_id }))
}

/// It answered that it cannot answer.
fn is_kmsd_at_fault(error: &ClientError) -> bool {
    matches!(error, ClientError::Kms(error) if matches!(error.code, Code::ServiceUnavailable | Code::InternalFailure))
}

pub(crate) fn keystore(client: &Client, operation: KeystoreOperation) -> Result<Value, String> {
    match operation {
        KeystoreOperation::GetMetrics => {
            let answer = call!(client, get_metrics, proto::GetMetricsRequest {})?;
            Ok(json::metrics(&answer))
        }
        KeystoreOperation::GetKeystoreInfo => {
            let answer = call!(client, get_keystore_info, proto::GetKeystoreInfoRequest {})?;
            Ok(json::keystore(&answer))
        }
        KeystoreOperation::ConfirmClock => {
            let answer = call!(client, confirm_clock, proto::ConfirmClockRequest {})?;
            Ok(done(&answer.request_id))
        }
        KeystoreOperation::AdvanceClock { seconds } => {
            let answer = call!(client, advance_clock, proto::AdvanceClockRequest { seconds })?;
            Ok(json!({
                "Now": json::time(answer.now_ms),
                "DestroyedKeyIds": answer.destroyed_key_ids,
                "RequestId": answer.request_id,
            }))
        }
    }
}

pub(crate) fn alias(client: &Client, operation: AliasOperation) -> Result<Value, String> {
    match operation {
        AliasOperation::CreateAlias(alias) => {
            let request = proto::CreateAliasRequest {
                alias_name: alias.alias_name,
                key_id: alias.key_id,
            };
            Ok(done(&call!(client, create_alias, request)?.request_id))
        }
        AliasOperation::UpdateAlias(alias) => {
            let request = proto::UpdateAliasRequest {
                alias_name: alias.alias_name,
                key_id: alias.key_id,
            };
            Ok(done(&call!(client, update_alias, request)?.request_id))
        }
        AliasOperation::DeleteAlias { alias_name } => {
            let request = proto::DeleteAliasRequest { alias_name };
            Ok(done(&call!(client, delete_alias, request)?.request_id))
        }
        AliasOperation::ListAliasesByKeyId { key, page } => {
            let request = proto::ListAliasesByKeyIdRequest {
                key_id: key.key_id,
                page_number: page.page_number,
                page_size: page.page_size,
            };
            Ok(json::aliases(&call!(client, list_aliases_by_key_id, request)?))
        }
        AliasOperation::ListAliases(page) => {
            let request = proto::ListAliasesRequest {
                page_number: page.page_number,
                page_size: page.page_size,
            };
            Ok(json::aliases(&call!(client, list_aliases, request)?))
        }
    }
}

pub(crate) fn cryptography(client: &Client, operation: CryptographyOperation) -> Result<Value, String> {
    match operation {
        CryptographyOperation::Encrypt {
            key,
            plaintext,
            context,
        } => {
            let request = proto::EncryptRequest {
                key_id: key.key_id,
                plaintext: plaintext.0,
                encryption_context: context.encryption_context.0,
            };
            Ok(json::encrypted(&call!(client, encrypt, request)?))
        }
        CryptographyOperation::Decrypt {
            ciphertext_blob,
            context,
        } => {
            let request = proto::DecryptRequest {
                ciphertext_blob: ciphertext_blob.0,
                encryption_context: context.encryption_context.0,
            };
            Ok(json::decrypted(&call!(client, decrypt, request)?))
        }
        CryptographyOperation::GenerateDataKey(asked) => {
            let request = generate_request(asked);
            Ok(json::generated(&call!(client, generate_data_key, request)?))
        }
        CryptographyOperation::GenerateDataKeyWithoutPlaintext(asked) => {
            let request = without_plaintext(generate_request(asked));
            Ok(json::wrapped(&call!(
                client,
                generate_data_key_without_plaintext,
                request
            )?))
        }
    }
}

pub(crate) fn batch(client: &Client, operation: &BatchOperation) -> Result<Value, String> {
    match operation {
        BatchOperation::Encrypt(items) => batch_encrypt(client, &items.items),
        BatchOperation::Decrypt(items) => batch_decrypt(client, &items.items),
        BatchOperation::GenerateDataKey(items) => batch_generate(client, &items.items),
        BatchOperation::GenerateDataKeyWithoutPlaintext(items) => batch_wrap(client, &items.items),
    }
}

fn batch_encrypt(client: &Client, items: &Value) -> Result<Value, String> {
    let each = json::batch(items)?.into_iter().map(|item| {
        Ok(proto::EncryptRequest {
            key_id: item.text("KeyId")?,
            plaintext: item.bytes("Plaintext")?,
            encryption_context: item.context()?,
        })
    });
    let items = each.collect::<Result<_, String>>()?;
    let answer = call!(client, batch_encrypt, proto::BatchEncryptRequest { items })?;
    Ok(outcomes!(answer, batch_encrypt_response, json::encrypted))
}

fn batch_decrypt(client: &Client, items: &Value) -> Result<Value, String> {
    let each = json::batch(items)?.into_iter().map(|item| {
        Ok(proto::DecryptRequest {
            ciphertext_blob: item.bytes("CiphertextBlob")?,
            encryption_context: item.context()?,
        })
    });
    let items = each.collect::<Result<_, String>>()?;
    let answer = call!(client, batch_decrypt, proto::BatchDecryptRequest { items })?;
    Ok(outcomes!(answer, batch_decrypt_response, json::decrypted))
}

fn batch_generate(client: &Client, items: &Value) -> Result<Value, String> {
    let items = json::batch(items)?
        .iter()
        .map(generate_item)
        .collect::<Result<_, _>>()?;
    let answer = call!(
        client,
        batch_generate_data_key,
        proto::BatchGenerateDataKeyRequest { items }
    )?;
    Ok(outcomes!(
        answer,
        batch_generate_data_key_response,
        json::generated
    ))
}

fn batch_wrap(client: &Client, items: &Value) -> Result<Value, String> {
    let items = json::batch(items)?;
    let items = items
        .iter()
        .map(|item| generate_item(item).map(without_plaintext));
    let request = proto::BatchGenerateDataKeyWithoutPlaintextRequest {
        items: items.collect::<Result<_, _>>()?,
    };
    let answer = call!(client, batch_generate_data_key_without_plaintext, request)?;
    Ok(outcomes!(
        answer,
        batch_generate_data_key_without_plaintext_response,
        json::wrapped
    ))
}

fn generate_item(item: &Item<'_>) -> Result<proto::GenerateDataKeyRequest, String> {
    Ok(proto::GenerateDataKeyRequest {
        key_id: item.text("KeyId")?,
        key_spec: item.text("KeySpec")?,
        number_of_bytes: item.number("NumberOfBytes")?,
        encryption_context: item.context()?,
    })
}

fn generate_request(asked: DataKey) -> proto::GenerateDataKeyRequest {
    proto::GenerateDataKeyRequest {
        key_id: asked.key.key_id,
        key_spec: asked.key_spec.unwrap_or_default(),
        number_of_bytes: asked.number_of_bytes,
        encryption_context: asked.context.encryption_context.0,
    }
}

fn without_plaintext(
    request: proto::GenerateDataKeyRequest,
) -> proto::GenerateDataKeyWithoutPlaintextRequest {
    proto::GenerateDataKeyWithoutPlaintextRequest {
        key_id: request.key_id,
        key_spec: request.key_spec,
        number_of_bytes: request.number_of_bytes,
        encryption_context: request.encryption_context,
    }
}

fn metadata(key: Option<&proto::KeyMetadata>, request_id: &str) -> Value {
    json!({ "KeyMetadata": key.map(json::key_metadata), "RequestId": request_id })
}

fn done(request_id: &str) -> Value {
    json!({ "RequestId": request_id })
}

/// Every error in one form: 'Code: message'.
pub(crate) fn describe(error: &ClientError) -> String {
    match error {
        ClientError::Kms(error) => error.to_string(),
        ClientError::Unreachable(_) => format!("ServiceUnavailable: {error}"),
        _ => format!("InternalFailure: {error}"),
    }
}
