//! Records as they are made, shown and verified, of keys that no test could wait for.

mod audit;
mod forged;
mod made;

use super::super::document::{Kind, Outcome, sign};
use super::super::sign::SigningKey;
use super::super::verify::{Verified, verify};
use super::contents::write;
use super::home::tests::{slot, write_present};
use super::live::{Answer, TriedVolume};
use super::*;
use kms_audit::frame;
use kms_audit::{Item, Record as AuditRecord, SUCCESS};
use kms_client::proto::key_metadata::Version;
use kms_client::proto::{Dependant, GetKeystoreInfoResponse};
use prost::Message;
use std::path::Path;

const ARN: &str = "acs:kms:local:0:key/17";
const OTHER_ARN: &str = "acs:kms:local:0:key/18";
const DAY_MS: i64 = 86_400_000;
const MADE_MS: i64 = 1_600_000_000_000;
const ASKED_MS: i64 = 1_700_000_000_000;
const DUE_MS: i64 = ASKED_MS + 7 * DAY_MS;
const GONE_MS: i64 = DUE_MS + 60_000;
const LEFT: u64 = 5;
const KEYSTORE: uuid::Uuid = uuid::Uuid::from_bytes([9; 16]);

fn item(arn: &str, code: &str) -> Item {
    Item {
        key_arn: arn.to_owned(),
        code: code.to_owned(),
        ..Item::default()
    }
}

fn call(operation: &str, time_ms: i64) -> AuditRecord {
    AuditRecord {
        time_ms,
        request_id: vec![7; 16],
        operation: operation.to_owned(),
        code: SUCCESS.to_owned(),
        items: vec![item(ARN, "")],
        count: 1,
        ..AuditRecord::default()
    }
}

fn refused_call(operation: &str, time_ms: i64) -> AuditRecord {
    AuditRecord {
        code: "Rejected.StateModifiedFailed".to_owned(),
        ..call(operation, time_ms)
    }
}

/// The log of a key that was made, used, scheduled and destroyed.
fn life() -> Vec<AuditRecord> {
    vec![
        call("CreateKey", MADE_MS),
        call("Encrypt", MADE_MS),
        call("ScheduleKeyDeletion", ASKED_MS + 3),
        call("BeginKeyDestruction", GONE_MS - 40),
        call("DestroyKeyMaterial", GONE_MS + 2),
        AuditRecord {
            items: vec![item(OTHER_ARN, "")],
            ..call("Encrypt", GONE_MS + 5)
        },
    ]
}

/// Writes a log of these calls; how many there are, and the head.
fn write_log(path: &Path, keystore: uuid::Uuid, calls: &[AuditRecord]) -> (u64, Vec<u8>) {
    let header = frame::header(keystore);
    let mut bytes = header.to_vec();
    let mut head = frame::genesis(&header);
    for record in calls {
        head = frame::push(&mut bytes, &head, &record.encode_to_vec()).unwrap();
    }
    std::fs::write(path, bytes).unwrap();
    (calls.len() as u64, head.to_vec())
}

fn key() -> KeyMetadata {
    KeyMetadata {
        key_id: "17".to_owned(),
        arn: ARN.to_owned(),
        key_state: KeyState::Destroyed.into(),
        key_spec: "Aliyun_AES_256".to_owned(),
        key_usage: "ENCRYPT/DECRYPT".to_owned(),
        protection_level: "SOFTWARE".to_owned(),
        origin: "Aliyun_KMS".to_owned(),
        creator: "1000".to_owned(),
        creation_date_ms: MADE_MS,
        deletion_request_date_ms: Some(ASKED_MS),
        deletion_due_date_ms: Some(DUE_MS),
        destruction_date_ms: Some(GONE_MS),
        destruction_epoch: Some(LEFT),
        versions: vec![Version {
            key_version_id: "v1".to_owned(),
            creation_date_ms: MADE_MS,
        }],
        ..KeyMetadata::default()
    }
}

/// Of a keystore that is not for drills.
fn keystore() -> GetKeystoreInfoResponse {
    GetKeystoreInfoResponse {
        keystore_id: KEYSTORE.to_string(),
        region: "local".to_owned(),
        account: "0".to_owned(),
        epoch: LEFT + 1,
        state_seq: 40,
        root_slot: "file".to_owned(),
        erasure: "none".to_owned(),
        now_ms: GONE_MS + DAY_MS,
        ..GetKeystoreInfoResponse::default()
    }
}

/// Everything was tried, and is gone.
fn tried() -> Tried {
    Tried {
        uses: Uses {
            encrypt: Answer::Gone,
            generate: Answer::Gone,
            wrap: Answer::Gone,
            decrypt: vec![Answer::Gone],
        },
        volumes: vec![TriedVolume {
            id: "volume".to_owned(),
            directory: "/srv/<vault>".to_owned(),
            is_whole: true,
            answer: Answer::Gone,
        }],
    }
}

/// What is known of a key with a log of these calls.
fn known_with(calls: &[AuditRecord]) -> Known {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("audit.log");
    let (audit_records, audit_head) = write_log(&log, KEYSTORE, calls);
    write_present(home.path(), LEFT + 1);
    let keystore = GetKeystoreInfoResponse {
        audit_records,
        audit_head,
        ..keystore()
    };
    Known {
        key: key(),
        log: Some(Log::read(&log, &keystore, ARN).unwrap()),
        home: Some(Home::read(home.path(), &keystore.keystore_id).unwrap()),
        keystore,
        dependants: vec![Dependant {
            volume_id: "volume".to_owned(),
            domain: 3,
            location: "/srv/<vault>".to_owned(),
            files: 12,
            bytes: 4096,
            mounted: false,
            report_time_ms: 1_650_000_000_000,
        }],
        tried: tried(),
        nonce: None,
        operator: "op".to_owned(),
        witness: None,
        known_copies: vec!["tape 17".to_owned()],
        made: Made::now(false),
    }
}

fn known() -> Known {
    known_with(&life())
}

fn verified(kind: Kind, value: &Value) -> Result<Verified, String> {
    let key = SigningKey::generate().unwrap();
    verify(&sign(kind, value, &key), key.public(), None)
}

fn outcome(record: &Record, id: &str) -> Outcome {
    record.checks.iter().find(|check| check.id == id).unwrap().outcome
}

/// The document and its page, in lower case.
fn text(record: &Record) -> String {
    let page = page::page(&record.value, "00", "11");
    format!("{}{page}", record.value).to_lowercase()
}

fn statement(record: &Record) -> &str {
    record.value["statement"].as_str().unwrap()
}
