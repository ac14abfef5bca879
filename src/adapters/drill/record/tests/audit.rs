//! What is made of the audit log: what was taken back, what came too late, and what is not all there.

use super::*;

#[track_caller]
fn assert_outcomes(calls: &[AuditRecord], expected: [(&str, Outcome); 3]) {
    let record = write(&known_with(calls));
    for (id, expected) in expected {
        assert_eq!(outcome(&record, id), expected, "{id}");
    }
    verified(record.kind, &record.value).unwrap();
}

#[test]
fn what_was_taken_back_does_not_count() {
    use Outcome::{Fail, NotTested, Pass};
    let checks = |scheduled, gone, unused| {
        [
            ("audit-scheduled", scheduled),
            ("audit-gone", gone),
            ("audit-unused", unused),
        ]
    };
    let mut cancelled = life();
    cancelled.insert(3, call("CancelKeyDeletion", ASKED_MS + 4));
    assert_outcomes(&cancelled, checks(Fail, Pass, Pass));
    // The first was cancelled, and the second is the one that counts.
    let mut again = life();
    again.insert(2, call("ScheduleKeyDeletion", ASKED_MS - DAY_MS));
    again.insert(3, call("CancelKeyDeletion", ASKED_MS - DAY_MS));
    assert_outcomes(&again, checks(Pass, Pass, Pass));
    let mut not_cancelled = life();
    not_cancelled.insert(3, refused_call("CancelKeyDeletion", ASKED_MS + 4));
    assert_outcomes(&not_cancelled, checks(Pass, Pass, Pass));
    let mut scheduled_late = life();
    let late = scheduled_late.remove(2);
    scheduled_late.push(late);
    assert_outcomes(&scheduled_late, checks(Fail, Pass, Pass));

    // Material that was imported after its end is there again.
    let external = |calls: &[AuditRecord]| {
        let mut known = known_with(calls);
        known.key.origin = EXTERNAL.to_owned();
        let record = write(&known);
        verified(record.kind, &record.value).unwrap();
        (outcome(&record, "audit-gone"), outcome(&record, "audit-unused"))
    };
    let mut imported = life();
    imported.insert(5, call("ImportKeyMaterial", GONE_MS + 3));
    imported.insert(6, call("Encrypt", GONE_MS + 4));
    assert_eq!(external(&imported), (Fail, NotTested));
    imported.push(call("DestroyKeyMaterial", GONE_MS + 5));
    assert_eq!(external(&imported), (Pass, Pass));
}

#[test]
fn a_batch_of_which_any_item_was_carried_out_is_a_use() {
    let batch = |items: Vec<Item>| {
        let record = AuditRecord {
            items,
            ..call("BatchDecrypt", GONE_MS + DAY_MS)
        };
        outcome(
            &write(&known_with(&[life(), vec![record]].concat())),
            "audit-unused",
        )
    };
    let (refused, done) = (item(ARN, "Forbidden.KeyNotFound"), item(ARN, ""));
    assert_eq!(batch(vec![refused.clone(), done.clone()]), Outcome::Fail);
    assert_eq!(batch(vec![done.clone()]), Outcome::Fail);
    assert_eq!(batch(vec![refused.clone(), refused.clone()]), Outcome::Pass);
    assert_eq!(batch(vec![refused, item(OTHER_ARN, "")]), Outcome::Pass);
}

#[test]
fn dates_that_are_not_those_of_the_log_fail() {
    let with = |change: &dyn Fn(&mut Known)| {
        let mut known = known();
        change(&mut known);
        let record = write(&known);
        verified(record.kind, &record.value).unwrap();
        (
            outcome(&record, "audit-scheduled"),
            outcome(&record, "audit-gone"),
        )
    };
    let minute = 60_000;
    let near = with(&|known| known.key.deletion_request_date_ms = Some(ASKED_MS + 3 - minute));
    assert_eq!(near, (Outcome::Pass, Outcome::Pass));
    let early = with(&|known| known.key.deletion_request_date_ms = Some(ASKED_MS + 2 - minute));
    assert_eq!(early, (Outcome::Fail, Outcome::Pass));
    let late = with(&|known| known.key.destruction_date_ms = Some(GONE_MS + DAY_MS));
    assert_eq!(late, (Outcome::Pass, Outcome::Fail));
}

/// Anybody may have calls refused, as many as they like.
#[test]
fn refused_calls_push_nothing_out_that_a_check_rests_on() {
    let refusals = |count| (0..count).map(|_| refused_call("CancelKeyDeletion", ASKED_MS + 5));
    let mut calls = life();
    calls.extend(refusals(40));
    calls.splice(3..3, refusals(40));
    let record = write(&known_with(&calls));
    assert_outcomes(
        &calls,
        [
            ("audit-scheduled", Outcome::Pass),
            ("audit-gone", Outcome::Pass),
            ("audit-unused", Outcome::Pass),
        ],
    );
    let audit = &record.value["audit"];
    let quoted = audit["quoted"].as_array().unwrap();
    let has = |operation: &str| quoted.iter().any(|entry| entry["operation"] == operation);
    for operation in [
        "CreateKey",
        "ScheduleKeyDeletion",
        "BeginKeyDestruction",
        "DestroyKeyMaterial",
    ] {
        assert!(has(operation), "{operation}");
    }
    assert_eq!(
        (quoted.len(), &audit["not_quoted"]),
        (16, &Value::from(80 + 4 - 16))
    );
    // Nor do calls that changed something, and were many.
    let mut toggled = life();
    let toggles = (0..40).map(|number| call(["DisableKey", "EnableKey"][number % 2], MADE_MS));
    toggled.splice(2..2, toggles);
    toggled.extend((0..40).map(|_| call("DisableKey", GONE_MS + 9)));
    assert_outcomes(
        &toggled,
        [
            ("audit-scheduled", Outcome::Pass),
            ("audit-gone", Outcome::Pass),
            ("audit-unused", Outcome::Pass),
        ],
    );
}

#[test]
fn a_log_that_ends_early_proves_nothing_and_a_damaged_one_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.log");
    let all = ["audit-scheduled", "audit-gone", "audit-unused"];
    let read = |known: &mut Known| known.log = Some(Log::read(&path, &known.keystore, ARN).unwrap());
    for length in [2, 3, 5] {
        let mut known = known();
        write_log(&path, KEYSTORE, &life()[..length]);
        read(&mut known);
        let record = write(&known);
        assert_eq!(outcome(&record, "audit-chain"), Outcome::NotTested, "{length}");
        for id in all {
            assert_eq!(outcome(&record, id), Outcome::NotTested, "{length}: {id}");
        }
        verified(record.kind, &record.value).unwrap();
    }
    let mut known = known();
    write_log(&path, KEYSTORE, &life());
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 40;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    read(&mut known);
    let record = write(&known);
    assert_eq!(outcome(&record, "audit-chain"), Outcome::Fail);
    for id in all {
        assert_eq!(outcome(&record, id), Outcome::NotTested, "{id}");
    }
    verified(record.kind, &record.value).unwrap();
    write_log(&path, uuid::Uuid::nil(), &life());
    let refused = Log::read(&path, &known.keystore, ARN).err().unwrap();
    assert!(refused.contains("that of the keystore 00000000"), "{refused}");
}

#[test]
fn a_log_that_somebody_kept_has_to_have_what_is_quoted_and_nothing_else_of_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kept.log");
    let mut calls = life();
    calls.insert(3, call("CancelKeyDeletion", ASKED_MS + 4));
    calls.insert(4, call("ScheduleKeyDeletion", ASKED_MS + 5));
    let record = write(&known_with(&calls)).value;
    let in_log = |record: &Value| verify::must_be_in_log(record, &path);
    write_log(&path, KEYSTORE, &calls);
    in_log(&record).unwrap();
    // It may have gone on.
    write_log(
        &path,
        KEYSTORE,
        &[calls.clone(), vec![call("DisableKey", GONE_MS + DAY_MS)]].concat(),
    );
    in_log(&record).unwrap();
    // What was left out follows from nothing in the record, and is in the log.
    let mut without = record.clone();
    without["audit"]["quoted"].as_array_mut().unwrap().remove(2);
    assert!(in_log(&without).unwrap_err().contains("other records"));
    write_log(&path, KEYSTORE, &calls[..4]);
    assert!(in_log(&record).unwrap_err().contains("up to record 4"));
    write_log(&path, KEYSTORE, &[life(), life()].concat());
    assert!(in_log(&record).is_err());
    let mut known = known();
    known.log = None;
    assert!(
        in_log(&write(&known).value)
            .unwrap_err()
            .contains("quotes no audit log")
    );
}
