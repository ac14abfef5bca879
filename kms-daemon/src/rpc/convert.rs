//! From the engine's types to the protocol's.

use crate::engine::{Dependant, Engine, Outcome};
use crate::rows::KeyRow;
use kms_api::proto::{self, KeyState};
use kms_api::{Code, KmsError};
use uuid::Uuid;

const PAGE_SIZE_DEFAULT: u32 = 20;
const PAGE_SIZE_MAX: u32 = 100;

pub(super) fn metadata(engine: &Engine, row: KeyRow) -> Result<proto::KeyMetadata, KmsError> {
    let id = Uuid::from_slice(&row.key_id).map_err(|_| damaged())?;
    let primary = Uuid::from_slice(&row.primary_version).map_err(|_| damaged())?;
    let is_destroyed = row.state() == KeyState::Destroyed;
    let versions = row.versions.iter().map(|version| {
        Ok(proto::key_metadata::Version {
            key_version_id: Uuid::from_slice(&version.version_id)
                .map_err(|_| damaged())?
                .to_string(),
            creation_date_ms: version.created_ms,
        })
    });
    Ok(proto::KeyMetadata {
        key_id: id.to_string(),
        arn: engine.arn(id),
        key_state: row.state,
        key_spec: row.key_spec,
        key_usage: row.key_usage,
        origin: row.origin,
        protection_level: row.protection_level,
        description: row.description,
        creator: row.creator_uid.to_string(),
        creation_date_ms: row.created_ms,
        delete_date_ms: row.delete_ms.filter(|_| !is_destroyed),
        primary_key_version: primary.to_string(),
        destruction_date_ms: row.destroyed_ms.filter(|_| is_destroyed),
        material_expire_time_ms: row.material_expires_ms,
        deletion_request_date_ms: row.scheduled_ms.filter(|_| is_destroyed),
        deletion_due_date_ms: row.delete_ms.filter(|_| is_destroyed),
        destruction_epoch: row.left_epoch.filter(|_| is_destroyed),
        versions: versions.collect::<Result<_, KmsError>>()?,
    })
}

pub(super) fn dependant(dependant: Dependant) -> proto::Dependant {
    proto::Dependant {
        volume_id: dependant.volume.to_string(),
        domain: dependant.domain.into(),
        location: dependant.row.location,
        files: dependant.row.files,
        bytes: dependant.row.bytes,
        mounted: dependant.is_mounted,
        report_time_ms: dependant.row.reported_ms,
    }
}

pub(super) fn keystore(engine: &Engine, request_id: &str) -> proto::GetKeystoreInfoResponse {
    let info = engine.info();
    proto::GetKeystoreInfoResponse {
        keystore_id: info.keystore_id.to_string(),
        region: info.manifest.region,
        account: info.manifest.account,
        creation_date_ms: info.manifest.created_ms,
        epoch: info.manifest.epoch,
        state_seq: info.manifest.state_seq,
        revocation_epoch: info.manifest.revocation_epoch,
        root_slot: info.kind.name().to_owned(),
        erasure: info.kind.erasure().name().to_owned(),
        drill: info.manifest.test_clock,
        destruction_suspended: info.is_suspended,
        observed_ms: info.observed_ms,
        now_ms: info.now_ms,
        audit_records: info.audit.records,
        audit_head: info.audit.head,
        request_id: request_id.to_owned(),
    }
}

pub(super) fn encrypted(outcome: Outcome, request_id: &str) -> proto::EncryptResponse {
    proto::EncryptResponse {
        key_id: outcome.key_id.to_string(),
        key_version_id: outcome.version_id.to_string(),
        ciphertext_blob: outcome.blob,
        request_id: request_id.to_owned(),
    }
}

pub(super) fn decrypted(mut outcome: Outcome, request_id: &str) -> proto::DecryptResponse {
    proto::DecryptResponse {
        key_id: outcome.key_id.to_string(),
        key_version_id: outcome.version_id.to_string(),
        plaintext: std::mem::take(&mut *outcome.plaintext),
        request_id: request_id.to_owned(),
    }
}

pub(super) fn generated(mut outcome: Outcome, request_id: &str) -> proto::GenerateDataKeyResponse {
    proto::GenerateDataKeyResponse {
        key_id: outcome.key_id.to_string(),
        key_version_id: outcome.version_id.to_string(),
        plaintext: std::mem::take(&mut *outcome.plaintext),
        ciphertext_blob: outcome.blob,
        request_id: request_id.to_owned(),
    }
}

pub(super) fn wrapped(outcome: Outcome, request_id: &str) -> proto::GenerateDataKeyWithoutPlaintextResponse {
    proto::GenerateDataKeyWithoutPlaintextResponse {
        key_id: outcome.key_id.to_string(),
        key_version_id: outcome.version_id.to_string(),
        ciphertext_blob: outcome.blob,
        request_id: request_id.to_owned(),
    }
}

/// One page of a list, and the numbers that the answer repeats.
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    pub(super) number: u32,
    pub(super) size: u32,
    pub(super) total: u32,
}

pub(super) fn page<T>(all: Vec<T>, number: u32, size: u32) -> Result<Page<T>, KmsError> {
    let number = number.max(1);
    let size = if size == 0 { PAGE_SIZE_DEFAULT } else { size };
    if size > PAGE_SIZE_MAX {
        return Err(KmsError::invalid("PageSize", "must be 1 to 100"));
    }
    let total = u32::try_from(all.len()).unwrap_or(u32::MAX);
    let skip = u64::from(number - 1) * u64::from(size);
    let skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let take = usize::try_from(size).unwrap_or_default();
    Ok(Page {
        items: all.into_iter().skip(skip).take(take).collect(),
        number,
        size,
        total,
    })
}

fn damaged() -> KmsError {
    KmsError::new(Code::InternalFailure, "a row of the key store is damaged")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_cut_and_bounded() {
        let cut = |number, size| page((0..45).collect(), number, size).map(|page| page.items);
        assert_eq!(cut(0, 0).unwrap(), (0..20).collect::<Vec<_>>());
        assert_eq!(cut(3, 20).unwrap(), (40..45).collect::<Vec<_>>());
        assert_eq!(cut(u32::MAX, 100).unwrap(), []);
        assert_eq!(cut(1, 101).unwrap_err().code, Code::InvalidParameter);
    }
}
