//! Records as they are made, shown and verified, of keys that no test could wait for.

use super::super::document::{Kind, Outcome, Overall, sign};
use super::super::sign::SigningKey;
use super::super::verify::{Verified, verify};
use super::contents::write;
use super::*;
use kms_audit::frame;
use kms_audit::{Item, Record as AuditRecord};
use kms_client::proto::key_metadata::Version;
use prost::Message;
use std::path::Path;

const ARN: &str = "acs:kms:local:0:key/17";
const DAY_MS: i64 = 86_400_000;

fn audit_record(operation: &str, arn: &str) -> AuditRecord {
    AuditRecord {
        time_ms: 1_700_000_000_000,
        request_id: vec![7; 16],
        operation: operation.to_owned(),
        code: kms_audit::SUCCESS.to_owned(),
        items: vec![Item {
            key_arn: arn.to_owned(),
            ..Item::default()
        }],
        count: 1,
        ..AuditRecord::default()
    }
}

/// Writes a log of these calls; how many there are, and the head.
fn write_log(path: &Path, keystore: uuid::Uuid, calls: &[(&str, &str)]) -> (u64, Vec<u8>) {
    let header = frame::header(keystore);
    let mut bytes = header.to_vec();
    let mut head = frame::genesis(&header);
    for (operation, arn) in calls {
        head = frame::push(&mut bytes, &head, &audit_record(operation, arn).encode_to_vec()).unwrap();
    }
    std::fs::write(path, bytes).unwrap();
    (calls.len() as u64, head.to_vec())
}

const LIFE: [(&str, &str); 5] = [
    ("CreateKey", ARN),
    ("Encrypt", ARN),
    ("ScheduleKeyDeletion", ARN),
    ("DestroyKeyMaterial", ARN),
    ("Encrypt", "acs:kms:local:0:key/18"),
];

/// What is known of a key of a keystore that is not for drills, with a log of these calls.
fn known_with(calls: &[(&str, &str)]) -> Known {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.log");
    let id = uuid::Uuid::from_bytes([9; 16]);
    let (audit_records, audit_head) = write_log(&path, id, calls);
    let keystore = GetKeystoreInfoResponse {
        keystore_id: id.to_string(),
        epoch: 6,
        state_seq: 40,
        root_slot: "file".to_owned(),
        erasure: "none".to_owned(),
        audit_records,
        audit_head,
        ..GetKeystoreInfoResponse::default()
    };
    let log = Log::read(&path, &keystore, ARN).unwrap();
    let passed = |id, claim: &str| check(id, claim, (Outcome::Pass, String::new()));
    Known {
        key: KeyMetadata {
            key_id: "17".to_owned(),
            arn: ARN.to_owned(),
            key_state: KeyState::Destroyed.into(),
            key_spec: "Aliyun_AES_256".to_owned(),
            origin: "Aliyun_KMS".to_owned(),
            creation_date_ms: 1_600_000_000_000,
            deletion_request_date_ms: Some(1_700_000_000_000),
            deletion_due_date_ms: Some(1_700_000_000_000 + 7 * DAY_MS),
            destruction_date_ms: Some(1_700_000_000_000 + 7 * DAY_MS + 60_000),
            destruction_epoch: Some(5),
            versions: vec![Version {
                key_version_id: "v1".to_owned(),
                creation_date_ms: 1_600_000_000_000,
            }],
            ..KeyMetadata::default()
        },
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
        log: Some(log),
        tried: vec![
            passed("refused-encrypt", "kmsd refuses Encrypt"),
            passed("refused-generate", "kmsd refuses GenerateDataKey"),
            passed("refused-decrypt", "kmsd refuses Decrypt"),
            passed("volume-refused", "the volume does not open"),
            passed("slot-gone", "no slot"),
        ],
        nonce: None,
        operator: "op".to_owned(),
        witness: None,
        known_copies: vec!["tape 17".to_owned()],
    }
}

fn known() -> Known {
    known_with(&LIFE)
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

#[test]
fn a_production_key_is_recorded_with_what_that_is_worth_and_no_more() {
    let record = write(known());
    let found = verified(record.kind, &record.value).unwrap();
    assert_eq!(found.kind, Kind::DestructionRecord);
    // Whatever else held: the medium and the copies were not tested.
    assert_eq!(found.overall, Overall::Incomplete);
    assert_eq!(record.value["title"], "Destruction record");
    for id in [
        "state",
        "window",
        "epoch",
        "mounted",
        "audit-chain",
        "audit-scheduled",
        "audit-gone",
        "audit-unused",
    ] {
        assert_eq!(outcome(&record, id), Outcome::Pass, "{id}");
    }
    for id in ["erasure", "recovery"] {
        assert_eq!(outcome(&record, id), Outcome::NotTested, "{id}");
    }
    let page = page::page(&record.value, "00", "11");
    for shown in [
        "<h1>Destruction record</h1>",
        "is destroyed, since 2023-11-21",
        "This is not a drill report.",
        "erasure = none",
        "whoever has them recovers everything",
        "unknown copies are not covered",
        "tape 17",
        "/srv/&lt;vault&gt;",
        "<td>12</td><td>4096</td>",
        "not a NIST-approved mode",
        "not validated",
        "DestroyKeyMaterial",
        "root key of epoch 5",
    ] {
        assert!(page.contains(shown), "{shown}");
    }
    assert!(!page.contains("<svg") && !page.contains("<script"));
    let text = text(&record);
    for never in ["test clock", "purge", "for ever", "forever", "unrecoverable"] {
        assert!(!text.contains(never), "{never}");
    }
}

#[test]
fn of_imported_material_it_is_never_said_that_it_is_destroyed() {
    let mut known = known();
    known.key.origin = EXTERNAL.to_owned();
    let record = write(known);
    assert_eq!(
        verified(record.kind, &record.value).unwrap().kind,
        Kind::RemovalRecord
    );
    let text = text(&record);
    assert!(!text.contains("destroyed"));
    assert!(
        text.contains("our copy is removed") && text.contains("its owner&#39;s copies")
            || text.contains("its owner's copies")
    );
    // Nor by somebody who signs it as what it is not.
    let mut value = record.value;
    value["document"] = "destruction record".into();
    assert!(
        verified(Kind::DestructionRecord, &value)
            .unwrap_err()
            .contains("origin")
    );
}

#[test]
fn a_keystore_for_drills_is_named_in_the_title() {
    let mut known = known();
    known.keystore.drill = true;
    let record = write(known);
    assert!(record.value["title"].as_str().unwrap().contains("TEST CLOCK"));
    assert!(page::page(&record.value, "00", "11").contains("<h1>Destruction record (TEST CLOCK"));
    assert_eq!(outcome(&record, "window"), Outcome::NotTested);
    verified(record.kind, &record.value).unwrap();
    let mut value = record.value;
    value["title"] = "Destruction record".into();
    assert!(verified(record.kind, &value).unwrap_err().contains("title"));
}

#[test]
fn a_device_is_no_proof_either() {
    let mut known = known();
    (known.keystore.erasure, known.keystore.root_slot) = ("device".to_owned(), "tpm".to_owned());
    let record = write(known);
    assert_eq!(outcome(&record, "erasure"), Outcome::NotTested);
    assert!(text(&record).contains("its maker's claim") && !text(&record).contains("purge"));
    verified(record.kind, &record.value).unwrap();
}

#[test]
fn what_kmsd_did_not_keep_is_not_tested() {
    let mut known = known();
    (known.key.deletion_request_date_ms, known.key.destruction_epoch) = (None, None);
    known.log = None;
    known.dependants[0].mounted = true;
    let record = write(known);
    for id in [
        "mounted",
        "window",
        "epoch",
        "audit-chain",
        "audit-scheduled",
        "audit-gone",
        "audit-unused",
    ] {
        assert_eq!(outcome(&record, id), Outcome::NotTested, "{id}");
    }
    verified(record.kind, &record.value).unwrap();
}

#[test]
fn what_speaks_against_it_fails() {
    let mut early = known();
    early.key.deletion_request_date_ms = Some(1_700_000_000_001 + DAY_MS);
    let mut behind = known();
    behind.keystore.epoch = 5;
    let used = [LIFE.as_slice(), &[("BatchDecrypt", ARN)]].concat();
    let mut rewritten = known();
    rewritten.keystore.audit_head = vec![1; 32];
    for (known, id) in [
        (early, "window"),
        (behind, "epoch"),
        (known_with(&used), "audit-unused"),
        (known_with(&LIFE[..3]), "audit-gone"),
        (rewritten, "audit-chain"),
    ] {
        let record = write(known);
        assert_eq!(outcome(&record, id), Outcome::Fail, "{id}");
        let found = verified(record.kind, &record.value).unwrap();
        assert_eq!(found.overall, Overall::Failed, "{id}");
    }
}

#[test]
fn a_log_that_ends_early_proves_nothing_and_a_damaged_one_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.log");
    let mut known = known();
    let id = uuid::Uuid::from_bytes([9; 16]);
    write_log(&path, id, &LIFE[..3]);
    known.log = Some(Log::read(&path, &known.keystore, ARN).unwrap());
    let record = write(known);
    for id in ["audit-chain", "audit-gone", "audit-unused"] {
        assert_eq!(outcome(&record, id), Outcome::NotTested, "{id}");
    }
    let mut known = self::known();
    write_log(&path, id, &LIFE);
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 40;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    known.log = Some(Log::read(&path, &known.keystore, ARN).unwrap());
    assert_eq!(outcome(&write(known), "audit-chain"), Outcome::Fail);
    let known = self::known();
    write_log(&path, uuid::Uuid::nil(), &LIFE);
    let refused = Log::read(&path, &known.keystore, ARN).err().unwrap();
    assert!(refused.contains("that of the keystore 00000000"), "{refused}");
}

/// Signed, but untrue: whoever made it wrote more than what is in it.
#[test]
fn a_signed_record_that_its_own_fields_contradict_is_refused() {
    let record = write(known());
    let refused = |change: &dyn Fn(&mut Value), named: &str| {
        let mut value = record.value.clone();
        change(&mut value);
        let error = verified(record.kind, &value).unwrap_err();
        assert!(error.contains(named), "{named}: {error}");
    };
    let pass = |value: &mut Value, id: &str| {
        let checks = value["checks"].as_array_mut().unwrap();
        for check in checks.iter_mut().filter(|check| check["id"] == id) {
            check["result"] = "PASS".into();
        }
    };
    refused(&|value| value["result"] = "PASS".into(), "does not follow");
    refused(&|value| pass(value, "erasure"), "erasure cannot");
    refused(&|value| pass(value, "recovery"), "recovery cannot");
    refused(
        &|value| {
            let checks = value["checks"].as_array_mut().unwrap();
            checks.retain(|check| check["id"] != "slot-gone");
        },
        "slot-gone is missing",
    );
    refused(&|value| value["keystore"]["epoch"] = 5.into(), "epoch is said");
    refused(
        &|value| value["key"]["material_gone"] = value["key"]["deletion_asked_for"].clone(),
        "window is said",
    );
    refused(
        &|value| value["dependants"]["known"][0]["is_mounted"] = true.into(),
        "mounted is said",
    );
    refused(
        &|value| value["keystore"]["audit_head"] = "00".into(),
        "audit-chain is said",
    );
    refused(&|value| value["erasure_worth"] = "erased".into(), "erasure_worth");
    refused(&|value| value["erasure"] = "device".into(), "erasure_worth");
    refused(
        &|value| value["audit"]["quoted"][0]["time"] = "yesterday".into(),
        "does not say what is quoted",
    );
    refused(
        &|value| value["audit"]["quoted"][2]["frame"] = "00".into(),
        "incomplete",
    );
    refused(
        &|value| value["key"]["arn"] = "acs:kms:local:0:key/18".into(),
        "another key",
    );
    refused(
        &|value| {
            let quoted = value["audit"]["quoted"].as_array_mut().unwrap();
            quoted.remove(2);
        },
        "no record of DestroyKeyMaterial",
    );
    refused(
        &|value| {
            let quoted = value["audit"]["quoted"].as_array_mut().unwrap();
            quoted.swap(0, 1);
        },
        "do not follow",
    );
}

#[test]
fn no_byte_of_a_record_can_be_changed_or_left_out() {
    let record = write(known());
    let key = SigningKey::generate().unwrap();
    let file = sign(record.kind, &record.value, &key);
    verify(&file, key.public(), None).unwrap();
    for at in 0..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(verify(&changed, key.public(), None).is_err(), "byte {at}");
        changed.remove(at);
        assert!(verify(&changed, key.public(), None).is_err(), "without byte {at}");
    }
}

#[test]
fn neither_document_passes_for_the_other() {
    let record = write(known());
    let key = SigningKey::generate().unwrap();
    let file = sign(record.kind, &record.value, &key);
    let found = verify(&file, key.public(), None).unwrap();
    let refused = found.must_be(Kind::DrillReport).unwrap_err();
    assert_eq!(refused, "it is a destruction record, and no drill report");
    // In the place, or under the label, of another kind: whatever it says of itself.
    let swapped = String::from_utf8(file)
        .unwrap()
        .replacen("\"record\"", "\"report\"", 1);
    assert!(verify(swapped.as_bytes(), key.public(), None).is_err());
    for kind in [Kind::DrillReport, Kind::RemovalRecord] {
        assert!(verified(kind, &record.value).is_err(), "{kind:?}");
        let mut value = record.value.clone();
        value["document"] = kind.name().into();
        assert!(verified(record.kind, &value).is_err(), "{kind:?}");
    }
}

#[test]
fn a_key_that_is_not_destroyed_is_refused_by_its_state() {
    let key = |state: KeyState| KeyMetadata {
        key_state: state.into(),
        ..known().key
    };
    must_be_gone(&key(KeyState::Destroyed)).unwrap();
    for (state, named) in [
        (KeyState::Enabled, "is Enabled"),
        (KeyState::Disabled, "is Disabled"),
        (KeyState::PendingDeletion, "is PendingDeletion"),
        (KeyState::PendingImport, "is PendingImport"),
        (KeyState::Unspecified, "does not know"),
    ] {
        let refused = must_be_gone(&key(state)).unwrap_err();
        assert!(
            refused.contains(named) && refused.lines().count() == 1,
            "{refused}"
        );
    }
}
