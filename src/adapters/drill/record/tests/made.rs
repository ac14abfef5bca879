//! What is made of what is known.

use super::*;

#[test]
fn a_production_key_is_recorded_with_what_that_is_worth_and_no_more() {
    let record = write(&known());
    let found = verified(record.kind, &record.value).unwrap();
    assert_eq!(found.kind, Kind::DestructionRecord);
    // Whatever else held: the medium and the copies were not tested.
    assert_eq!(found.overall, Overall::Incomplete);
    assert_eq!(record.value["title"], "Destruction record");
    for check in &record.checks {
        let expected = match check.id {
            "erasure" | "recovery" => Outcome::NotTested,
            _ => Outcome::Pass,
        };
        assert_eq!(check.outcome, expected, "{}: {}", check.id, check.detail);
    }
    let page = page::page(&record.value, "00", "11");
    for shown in [
        "<h1>Destruction record</h1>",
        "kmsd says that the key acs:kms:local:0:key/17",
        "is destroyed, since 2023-11-21",
        "Nothing that was checked contradicts it.",
        "The old slot was looked for in kmsd's home, and does not lie there.",
        "by what kmsd says and is made to do",
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
        "By the design of cmkfs",
    ] {
        assert!(page.contains(shown), "{shown}");
    }
    assert!(!page.contains("<svg") && !page.contains("<script"));
    let text = text(&record);
    for never in [
        "test clock",
        "purge",
        "for ever",
        "forever",
        "unrecoverable",
        "chosen by the verifier",
        "at no time",
    ] {
        assert!(!text.contains(never), "{never}");
    }
}

#[test]
fn of_imported_material_it_is_never_said_that_it_is_destroyed() {
    let mut known = known();
    known.key.origin = EXTERNAL.to_owned();
    let record = write(&known);
    assert_eq!(
        verified(record.kind, &record.value).unwrap().kind,
        Kind::RemovalRecord
    );
    let text = text(&record);
    assert!(!text.contains("destroyed"));
    assert!(text.contains("our copy is removed"));
    assert!(text.contains("its owner&#39;s copies") || text.contains("its owner's copies"));
    // Nor by somebody who signs it as what it is not.
    let mut value = record.value;
    value["document"] = "destruction record".into();
    assert!(
        verified(Kind::DestructionRecord, &value)
            .unwrap_err()
            .contains("origin")
    );
}

/// The key's end is one date, and that of its material another.
#[test]
fn imported_material_that_went_before_its_key_did_has_its_own_date() {
    let calls = [
        call("CreateKey", MADE_MS),
        call("ImportKeyMaterial", MADE_MS + DAY_MS),
        call("DestroyKeyMaterial", MADE_MS + 2 * DAY_MS),
        call("ScheduleKeyDeletion", ASKED_MS),
        call("DestroyKeyMaterial", GONE_MS),
    ];
    let mut known = known_with(&calls);
    known.key.origin = EXTERNAL.to_owned();
    let record = write(&known);
    verified(record.kind, &record.value).unwrap();
    assert_eq!(record.value["key"]["ended"], facts::time(GONE_MS));
    let removed = facts::time(MADE_MS + 2 * DAY_MS);
    assert_eq!(record.value["key"]["material_gone"], *removed);
    assert!(statement(&record).contains(&format!("By the audit log it was removed at {removed}.")));
    assert_eq!(outcome(&record, "audit-gone"), Outcome::Pass);
    // Without the log nobody knows.
    known.log = None;
    let record = write(&known);
    verified(record.kind, &record.value).unwrap();
    assert_eq!(record.value["key"]["material_gone"], Value::Null);
    assert!(statement(&record).contains("When it was removed is not known"));
}

#[test]
fn a_key_that_never_had_material_is_refused() {
    let mut known = known();
    known.key.origin = EXTERNAL.to_owned();
    known.key.destruction_epoch = None;
    let refused = known.must_be_recordable().unwrap_err();
    assert!(refused.starts_with("there is nothing to record") && refused.lines().count() == 1);
    let record = write(&known);
    assert_eq!(verified(record.kind, &record.value).unwrap_err(), refused);
    // It may have had some before kmsd kept the epoch: the log knows.
    let mut calls = life();
    calls.insert(1, call("ImportKeyMaterial", MADE_MS));
    let mut known = known_with(&calls);
    known.key.origin = EXTERNAL.to_owned();
    known.key.destruction_epoch = None;
    let record = write(&known);
    verified(record.kind, &record.value).unwrap();
    assert_eq!(outcome(&record, "epoch"), Outcome::NotTested);
    // And nobody imports into a key whose material kmsd made.
    known.key.origin = "Aliyun_KMS".to_owned();
    let record = write(&known);
    assert!(
        verified(record.kind, &record.value)
            .unwrap_err()
            .contains("has an import")
    );
}

#[test]
fn a_keystore_for_drills_is_named_in_the_title() {
    let mut known = known();
    known.keystore.drill = true;
    let record = write(&known);
    assert!(record.value["title"].as_str().unwrap().contains("TEST CLOCK"));
    assert!(page::page(&record.value, "00", "11").contains("<h1>Destruction record (TEST CLOCK"));
    assert_eq!(outcome(&record, "window"), Outcome::NotTested);
    verified(record.kind, &record.value).unwrap();
    let mut value = record.value;
    value["title"] = "Destruction record".into();
    assert!(verified(record.kind, &value).unwrap_err().contains("title"));
}

#[test]
fn words_that_no_kmsd_has_are_refused() {
    let refused = |change: &dyn Fn(&mut Known), named: &str| {
        let mut known = known();
        change(&mut known);
        let why = known.must_be_recordable().unwrap_err();
        assert!(why.contains(named), "{named}: {why}");
        let record = write(&known);
        assert_eq!(verified(record.kind, &record.value).unwrap_err(), why);
    };
    refused(
        &|known| known.keystore.root_slot = "vault".to_owned(),
        "no root slot 'vault'",
    );
    refused(
        &|known| known.keystore.erasure = "device".to_owned(),
        "erasure 'device'",
    );
    refused(&|known| known.key.protection_level = "HSM".to_owned(), "'HSM'");
    refused(&|known| known.key.origin = "elsewhere".to_owned(), "'elsewhere'");
    refused(
        &|known| known.key.key_spec = "Purge_512".to_owned(),
        "'Purge_512'",
    );
    refused(&|known| known.keystore.account = "1".to_owned(), ARN);
    refused(&|known| known.key.versions.clear(), "no version");
}

#[test]
fn what_kmsd_did_not_keep_is_not_tested() {
    let mut known = known();
    (known.key.deletion_request_date_ms, known.key.destruction_epoch) = (None, None);
    (known.log, known.home) = (None, None);
    known.dependants[0].mounted = true;
    known.tried.volumes.clear();
    known.nonce = Some(Nonce::parse(&"5a".repeat(32)).unwrap());
    known.made.signing_key = Made::now(true).signing_key;
    let record = write(&known);
    for id in [
        "mounted",
        "window",
        "epoch",
        "volume-refused",
        "slot-gone",
        "audit-chain",
        "audit-scheduled",
        "audit-gone",
        "audit-unused",
    ] {
        assert_eq!(outcome(&record, id), Outcome::NotTested, "{id}");
    }
    assert!(statement(&record).contains("Whether the old slot is gone was not observed."));
    let method = record.value["method"]["what"].as_str().unwrap();
    assert!(
        method.contains("Which epoch was left is not known. Whether the old slot is gone was not observed.")
    );
    assert_eq!(record.value["nonce_origin"], "given by the operator");
    verified(record.kind, &record.value).unwrap();
}

/// Whatever comes out of it can be verified, and does not state what its own checks deny.
#[test]
fn what_speaks_against_it_fails_and_is_stated() {
    let with = |change: &dyn Fn(&mut Known)| {
        let mut known = known();
        change(&mut known);
        known
    };
    let rewritten = |known: &mut Known| {
        known.keystore.audit_head = vec![1; 32];
        known.log = Log::of(&Log::value(known.log.as_ref()), &known.keystore, ARN).unwrap();
    };
    let used = [life(), vec![call("Decrypt", GONE_MS + DAY_MS)]].concat();
    let given = || Answer::Given("kmsd did it".to_owned());
    for (known, id) in [
        (with(&|known| known.key.destruction_date_ms = None), "state"),
        (
            with(&|known| known.key.deletion_request_date_ms = Some(ASKED_MS + DAY_MS)),
            "window",
        ),
        (
            with(&|known| known.key.deletion_due_date_ms = Some(GONE_MS + 1)),
            "window",
        ),
        (with(&|known| known.keystore.epoch = LEFT), "epoch"),
        (
            with(&|known| known.tried.uses.encrypt = given()),
            "refused-encrypt",
        ),
        (
            with(&|known| known.tried.uses.generate = given()),
            "refused-generate",
        ),
        (
            with(&|known| known.tried.uses.decrypt[0] = given()),
            "refused-decrypt",
        ),
        (
            with(&|known| known.tried.volumes[0].answer = given()),
            "volume-refused",
        ),
        (with(&rewritten), "audit-chain"),
        (known_with(&life()[..3]), "audit-gone"),
        (known_with(&used), "audit-unused"),
    ] {
        let record = write(&known);
        assert_eq!(outcome(&record, id), Outcome::Fail, "{id}");
        let found = verified(record.kind, &record.value).unwrap();
        assert_eq!(found.overall, Overall::Failed, "{id}");
        let stated = statement(&record);
        let claim = &record.checks.iter().find(|check| check.id == id).unwrap().claim;
        assert!(
            stated.contains("CONTRADICTED") && stated.contains(claim),
            "{id}: {stated}"
        );
    }
}

#[test]
fn an_old_slot_that_lies_there_is_stated_wherever_its_end_is() {
    let home = tempfile::tempdir().unwrap();
    write_present(home.path(), LEFT + 1);
    std::fs::write(home.path().join("slot.bak"), slot(LEFT, KEYSTORE)).unwrap();
    let mut known = known();
    known.home = Some(Home::read(home.path(), &KEYSTORE.to_string()).unwrap());
    let record = write(&known);
    assert_eq!(outcome(&record, "slot-gone"), Outcome::Fail);
    for text in [&record.value["statement"], &record.value["method"]["what"]] {
        assert!(text.as_str().unwrap().contains("LIES IN KMSD'S HOME"), "{text}");
    }
    verified(record.kind, &record.value).unwrap();
}

#[test]
fn a_key_that_is_not_destroyed_is_refused_by_its_state() {
    let key = |state: KeyState| KeyMetadata {
        key_state: state.into(),
        ..key()
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
