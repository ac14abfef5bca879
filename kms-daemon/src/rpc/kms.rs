//! The `Kms` service.

use super::Gate;
use super::convert::{decrypted, dependant, encrypted, generated, keystore, metadata, page, wrapped};
use crate::engine::{Action, Call, Engine, NewKey, Outcome, Release, Request as Item, Trail};
use kms_api::KmsError;
use kms_api::proto::{self, kms_server::Kms};
use std::sync::Arc;
use tonic::{Request, Response, Status};

pub(crate) struct KmsService(pub(crate) Arc<Gate>);

type Answer<T> = Result<Response<T>, Status>;

/// Performs the one item of a call.
fn one(engine: &Engine, trail: &mut Trail, item: Item<'_>, release: Release) -> Result<Outcome, KmsError> {
    let outcomes = engine.perform(trail, &[item], release)?;
    outcomes
        .into_iter()
        .next()
        .unwrap_or_else(|| Err(KmsError::invalid("Items", "must be 1 to 256")))
}

/// Performs the items of a batch, with a result or an error for each, in order.
fn many<T>(
    engine: &Engine,
    call: &Call,
    trail: &mut Trail,
    items: Vec<Item<'_>>,
    release: Release,
    answer: impl Fn(Result<Outcome, proto::Error>, &str) -> T,
) -> Result<Vec<T>, KmsError> {
    let request_id = call.request_id.to_string();
    let outcomes = engine.perform(trail, &items, release)?;
    let answers = outcomes
        .into_iter()
        .map(|outcome| answer(outcome.map_err(|error| error.to_proto(&request_id)), &request_id));
    Ok(answers.collect())
}

fn list_aliases(
    engine: &Engine,
    call: &Call,
    trail: &mut Trail,
    key: Option<&str>,
    (number, size): (u32, u32),
) -> Result<proto::ListAliasesResponse, KmsError> {
    let page = page(engine.list_aliases(trail, key)?, number, size)?;
    let aliases = page.items.into_iter().map(|(alias_name, key_id)| proto::Alias {
        alias_arn: engine.alias_arn(&alias_name),
        alias_name,
        key_id: key_id.to_string(),
    });
    Ok(proto::ListAliasesResponse {
        aliases: aliases.collect(),
        page_number: page.number,
        page_size: page.size,
        total_count: page.total,
        request_id: call.request_id.to_string(),
    })
}

#[tonic::async_trait]
impl Kms for KmsService {
    async fn create_key(
        &self,
        request: Request<proto::CreateKeyRequest>,
    ) -> Answer<proto::CreateKeyResponse> {
        let handler = |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::CreateKeyRequest| {
            let new = NewKey {
                description: request.description,
                key_spec: request.key_spec,
                key_usage: request.key_usage,
                origin: request.origin,
                protection_level: request.protection_level,
            };
            let row = engine.create_key(call, trail, &new)?;
            Ok(proto::CreateKeyResponse {
                key_metadata: Some(metadata(engine, row)?),
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve("CreateKey", request, handler).await
    }

    async fn describe_key(
        &self,
        request: Request<proto::DescribeKeyRequest>,
    ) -> Answer<proto::DescribeKeyResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::DescribeKeyRequest| {
                let row = engine.describe_key(trail, &request.key_id)?;
                Ok(proto::DescribeKeyResponse {
                    key_metadata: Some(metadata(engine, row)?),
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("DescribeKey", request, handler).await
    }

    async fn list_dependants(
        &self,
        request: Request<proto::ListDependantsRequest>,
    ) -> Answer<proto::ListDependantsResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::ListDependantsRequest| {
                let all = engine.list_dependants(trail, &request.key_id)?;
                let page = page(all, request.page_number, request.page_size)?;
                Ok(proto::ListDependantsResponse {
                    dependants: page.items.into_iter().map(dependant).collect(),
                    page_number: page.number,
                    page_size: page.size,
                    total_count: page.total,
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("ListDependants", request, handler).await
    }

    async fn list_keys(&self, request: Request<proto::ListKeysRequest>) -> Answer<proto::ListKeysResponse> {
        let handler = |engine: &Engine, call: &Call, _: &mut Trail, request: proto::ListKeysRequest| {
            let page = page(engine.key_ids(), request.page_number, request.page_size)?;
            let keys = page.items.into_iter().map(|id| proto::ListedKey {
                key_id: id.to_string(),
                key_arn: engine.arn(id),
            });
            Ok(proto::ListKeysResponse {
                keys: keys.collect(),
                page_number: page.number,
                page_size: page.size,
                total_count: page.total,
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve("ListKeys", request, handler).await
    }

    async fn enable_key(
        &self,
        request: Request<proto::EnableKeyRequest>,
    ) -> Answer<proto::EnableKeyResponse> {
        let handler = |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::EnableKeyRequest| {
            engine.enable_key(call, trail, &request.key_id)?;
            Ok(proto::EnableKeyResponse {
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve_change("EnableKey", request, handler).await
    }

    async fn disable_key(
        &self,
        request: Request<proto::DisableKeyRequest>,
    ) -> Answer<proto::DisableKeyResponse> {
        let handler = |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::DisableKeyRequest| {
            engine.disable_key(call, trail, &request.key_id)?;
            Ok(proto::DisableKeyResponse {
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve_change("DisableKey", request, handler).await
    }

    async fn schedule_key_deletion(
        &self,
        request: Request<proto::ScheduleKeyDeletionRequest>,
    ) -> Answer<proto::ScheduleKeyDeletionResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::ScheduleKeyDeletionRequest| {
                let window = request.pending_window_in_days;
                Ok(proto::ScheduleKeyDeletionResponse {
                    delete_date_ms: engine.schedule_key_deletion(call, trail, &request.key_id, window)?,
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve_change("ScheduleKeyDeletion", request, handler).await
    }

    async fn cancel_key_deletion(
        &self,
        request: Request<proto::CancelKeyDeletionRequest>,
    ) -> Answer<proto::CancelKeyDeletionResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::CancelKeyDeletionRequest| {
                engine.cancel_key_deletion(call, trail, &request.key_id)?;
                Ok(proto::CancelKeyDeletionResponse {
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve_change("CancelKeyDeletion", request, handler).await
    }

    async fn get_parameters_for_import(
        &self,
        request: Request<proto::GetParametersForImportRequest>,
    ) -> Answer<proto::GetParametersForImportResponse> {
        let handler = |engine: &Engine,
                       call: &Call,
                       trail: &mut Trail,
                       request: proto::GetParametersForImportRequest| {
            let (algorithm, spec) = (&request.wrapping_algorithm, &request.wrapping_key_spec);
            let offered = engine.get_parameters_for_import(trail, &request.key_id, algorithm, spec)?;
            Ok(proto::GetParametersForImportResponse {
                key_id: offered.key_id.to_string(),
                public_key: offered.public_key,
                import_token: offered.token,
                token_expire_time_ms: offered.expires_ms,
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve("GetParametersForImport", request, handler).await
    }

    async fn import_key_material(
        &self,
        request: Request<proto::ImportKeyMaterialRequest>,
    ) -> Answer<proto::ImportKeyMaterialResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::ImportKeyMaterialRequest| {
                let sealed = (
                    request.encrypted_key_material.as_slice(),
                    request.import_token.as_slice(),
                );
                let expire_unix = request.key_material_expire_unix;
                engine.import_key_material(call, trail, &request.key_id, sealed, expire_unix)?;
                Ok(proto::ImportKeyMaterialResponse {
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("ImportKeyMaterial", request, handler).await
    }

    async fn delete_key_material(
        &self,
        request: Request<proto::DeleteKeyMaterialRequest>,
    ) -> Answer<proto::DeleteKeyMaterialResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::DeleteKeyMaterialRequest| {
            engine.delete_key_material(call, &request.key_id)?;
            Ok(proto::DeleteKeyMaterialResponse {
                request_id: call.request_id.to_string(),
            })
        };
        // It is never closed.
        let _turn = self.0.changes.acquire().await;
        self.0.serve_with("DeleteKeyMaterial", request, handler).await
    }

    async fn create_alias(
        &self,
        request: Request<proto::CreateAliasRequest>,
    ) -> Answer<proto::CreateAliasResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::CreateAliasRequest| {
                engine.create_alias(call, trail, &request.alias_name, &request.key_id)?;
                Ok(proto::CreateAliasResponse {
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("CreateAlias", request, handler).await
    }

    async fn update_alias(
        &self,
        request: Request<proto::UpdateAliasRequest>,
    ) -> Answer<proto::UpdateAliasResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::UpdateAliasRequest| {
                engine.update_alias(call, trail, &request.alias_name, &request.key_id)?;
                Ok(proto::UpdateAliasResponse {
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("UpdateAlias", request, handler).await
    }

    async fn delete_alias(
        &self,
        request: Request<proto::DeleteAliasRequest>,
    ) -> Answer<proto::DeleteAliasResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::DeleteAliasRequest| {
                engine.delete_alias(call, trail, &request.alias_name)?;
                Ok(proto::DeleteAliasResponse {
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("DeleteAlias", request, handler).await
    }

    async fn list_aliases(
        &self,
        request: Request<proto::ListAliasesRequest>,
    ) -> Answer<proto::ListAliasesResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::ListAliasesRequest| {
                list_aliases(
                    engine,
                    call,
                    trail,
                    None,
                    (request.page_number, request.page_size),
                )
            };
        self.0.serve("ListAliases", request, handler).await
    }

    async fn list_aliases_by_key_id(
        &self,
        request: Request<proto::ListAliasesByKeyIdRequest>,
    ) -> Answer<proto::ListAliasesResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::ListAliasesByKeyIdRequest| {
                let window = (request.page_number, request.page_size);
                list_aliases(engine, call, trail, Some(&request.key_id), window)
            };
        self.0.serve("ListAliasesByKeyId", request, handler).await
    }

    async fn encrypt(&self, request: Request<proto::EncryptRequest>) -> Answer<proto::EncryptResponse> {
        let handler = |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::EncryptRequest| {
            let outcome = one(engine, trail, encrypt_item(&request), Release::Clear)?;
            Ok(encrypted(outcome, &call.request_id.to_string()))
        };
        self.0.serve("Encrypt", request, handler).await
    }

    async fn decrypt(&self, request: Request<proto::DecryptRequest>) -> Answer<proto::DecryptResponse> {
        let handler = |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::DecryptRequest| {
            let outcome = one(engine, trail, decrypt_item(&request), Release::Clear)?;
            Ok(decrypted(outcome, &call.request_id.to_string()))
        };
        self.0.serve("Decrypt", request, handler).await
    }

    async fn generate_data_key(
        &self,
        request: Request<proto::GenerateDataKeyRequest>,
    ) -> Answer<proto::GenerateDataKeyResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::GenerateDataKeyRequest| {
                let outcome = one(engine, trail, generate_item(&request), Release::Clear)?;
                Ok(generated(outcome, &call.request_id.to_string()))
            };
        self.0.serve("GenerateDataKey", request, handler).await
    }

    async fn generate_data_key_without_plaintext(
        &self,
        request: Request<proto::GenerateDataKeyWithoutPlaintextRequest>,
    ) -> Answer<proto::GenerateDataKeyWithoutPlaintextResponse> {
        let handler = |engine: &Engine,
                       call: &Call,
                       trail: &mut Trail,
                       request: proto::GenerateDataKeyWithoutPlaintextRequest| {
            let outcome = one(engine, trail, wrap_item(&request), Release::Withheld)?;
            Ok(wrapped(outcome, &call.request_id.to_string()))
        };
        self.0
            .serve("GenerateDataKeyWithoutPlaintext", request, handler)
            .await
    }

    async fn batch_encrypt(
        &self,
        request: Request<proto::BatchEncryptRequest>,
    ) -> Answer<proto::BatchEncryptResponse> {
        use proto::batch_encrypt_response::{Item, item::Outcome as Either};
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::BatchEncryptRequest| {
                let items = request.items.iter().map(encrypt_item).collect();
                let items = many(engine, call, trail, items, Release::Clear, |outcome, id| Item {
                    outcome: Some(match outcome {
                        Ok(outcome) => Either::Result(encrypted(outcome, id)),
                        Err(error) => Either::Error(error),
                    }),
                })?;
                Ok(proto::BatchEncryptResponse {
                    items,
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("BatchEncrypt", request, handler).await
    }

    async fn batch_decrypt(
        &self,
        request: Request<proto::BatchDecryptRequest>,
    ) -> Answer<proto::BatchDecryptResponse> {
        use proto::batch_decrypt_response::{Item, item::Outcome as Either};
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::BatchDecryptRequest| {
                let items = request.items.iter().map(decrypt_item).collect();
                let items = many(engine, call, trail, items, Release::Clear, |outcome, id| Item {
                    outcome: Some(match outcome {
                        Ok(outcome) => Either::Result(decrypted(outcome, id)),
                        Err(error) => Either::Error(error),
                    }),
                })?;
                Ok(proto::BatchDecryptResponse {
                    items,
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("BatchDecrypt", request, handler).await
    }

    async fn batch_generate_data_key(
        &self,
        request: Request<proto::BatchGenerateDataKeyRequest>,
    ) -> Answer<proto::BatchGenerateDataKeyResponse> {
        use proto::batch_generate_data_key_response::{Item, item::Outcome as Either};
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::BatchGenerateDataKeyRequest| {
                let items = request.items.iter().map(generate_item).collect();
                let items = many(engine, call, trail, items, Release::Clear, |outcome, id| Item {
                    outcome: Some(match outcome {
                        Ok(outcome) => Either::Result(generated(outcome, id)),
                        Err(error) => Either::Error(error),
                    }),
                })?;
                Ok(proto::BatchGenerateDataKeyResponse {
                    items,
                    request_id: call.request_id.to_string(),
                })
            };
        self.0.serve("BatchGenerateDataKey", request, handler).await
    }

    async fn batch_generate_data_key_without_plaintext(
        &self,
        request: Request<proto::BatchGenerateDataKeyWithoutPlaintextRequest>,
    ) -> Answer<proto::BatchGenerateDataKeyWithoutPlaintextResponse> {
        use proto::batch_generate_data_key_without_plaintext_response::{Item, item::Outcome as Either};
        let handler = |engine: &Engine,
                       call: &Call,
                       trail: &mut Trail,
                       request: proto::BatchGenerateDataKeyWithoutPlaintextRequest| {
            let items = request.items.iter().map(wrap_item).collect();
            let items = many(engine, call, trail, items, Release::Withheld, |outcome, id| {
                Item {
                    outcome: Some(match outcome {
                        Ok(outcome) => Either::Result(wrapped(outcome, id)),
                        Err(error) => Either::Error(error),
                    }),
                }
            })?;
            Ok(proto::BatchGenerateDataKeyWithoutPlaintextResponse {
                items,
                request_id: call.request_id.to_string(),
            })
        };
        self.0
            .serve("BatchGenerateDataKeyWithoutPlaintext", request, handler)
            .await
    }

    async fn get_metrics(
        &self,
        request: Request<proto::GetMetricsRequest>,
    ) -> Answer<proto::GetMetricsResponse> {
        let handler = |engine: &Engine, call: &Call, _: &mut Trail, _: proto::GetMetricsRequest| {
            let counters = engine.counters();
            let operation = |(name, calls): (&str, crate::metrics::Calls)| proto::OperationMetrics {
                operation: name.to_owned(),
                calls: calls.answered,
                errors: calls.errors,
            };
            Ok(proto::GetMetricsResponse {
                operations: counters.operations.into_iter().map(operation).collect(),
                data_keys_issued: counters.issued,
                data_keys_opened: counters.opened,
                sessions_open: counters.sessions as u64,
                audit_records: counters.audit_records,
                uptime_ms: counters.uptime_ms,
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve("GetMetrics", request, handler).await
    }

    async fn get_keystore_info(
        &self,
        request: Request<proto::GetKeystoreInfoRequest>,
    ) -> Answer<proto::GetKeystoreInfoResponse> {
        let handler = |engine: &Engine, call: &Call, _: &mut Trail, _: proto::GetKeystoreInfoRequest| {
            Ok(keystore(engine, &call.request_id.to_string()))
        };
        self.0.serve("GetKeystoreInfo", request, handler).await
    }

    async fn confirm_clock(
        &self,
        request: Request<proto::ConfirmClockRequest>,
    ) -> Answer<proto::ConfirmClockResponse> {
        let handler = |engine: &Engine, call: &Call, trail: &mut Trail, _: proto::ConfirmClockRequest| {
            engine.confirm_clock(call, trail)?;
            Ok(proto::ConfirmClockResponse {
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve("ConfirmClock", request, handler).await
    }

    async fn advance_clock(
        &self,
        request: Request<proto::AdvanceClockRequest>,
    ) -> Answer<proto::AdvanceClockResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::AdvanceClockRequest| {
            let now_ms = engine.run(call, |trail| engine.advance_clock(call, trail, request.seconds))?;
            // Not within the call: what is destroyed has records of its own.
            let destroyed = engine.destroy_due()?;
            Ok(proto::AdvanceClockResponse {
                now_ms,
                destroyed_key_ids: destroyed.iter().map(ToString::to_string).collect(),
                request_id: call.request_id.to_string(),
            })
        };
        self.0.serve_with("AdvanceClock", request, handler).await
    }
}

fn encrypt_item(request: &proto::EncryptRequest) -> Item<'_> {
    Item {
        action: Action::Encrypt(&request.key_id, &request.plaintext),
        context: &request.encryption_context,
    }
}

fn decrypt_item(request: &proto::DecryptRequest) -> Item<'_> {
    Item {
        action: Action::Decrypt(&request.ciphertext_blob),
        context: &request.encryption_context,
    }
}

fn generate_item(request: &proto::GenerateDataKeyRequest) -> Item<'_> {
    Item {
        action: Action::Generate(&request.key_id, &request.key_spec, request.number_of_bytes),
        context: &request.encryption_context,
    }
}

fn wrap_item(request: &proto::GenerateDataKeyWithoutPlaintextRequest) -> Item<'_> {
    Item {
        action: Action::Generate(&request.key_id, &request.key_spec, request.number_of_bytes),
        context: &request.encryption_context,
    }
}
