//! Signed, but untrue: whoever made it wrote more than what is in it.

use super::*;
use serde_json::json;

/// What nobody but the signer knows: words and names as they were given, and what has no bearing on anything else.
const FREE: [&str; 14] = [
    "/operator",
    "/witness",
    "/host/name",
    "/host/kernel",
    "/host/boot_id",
    "/tool/version",
    "/tool/sha256/cmkfs",
    "/key/description",
    "/key/creator_uid",
    "/known_copies/named",
    "/dependants/known/0/volume",
    "/dependants/known/0/location",
    "/audit/file",
    "/home/directory",
];

/// Every place in a value, and what is there.
fn places<'v>(value: &'v Value, at: &str, out: &mut Vec<(String, &'v Value)>) {
    out.push((at.to_owned(), value));
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                places(field, &format!("{at}/{name}"), out);
            }
        }
        Value::Array(items) => {
            for (number, item) in items.iter().enumerate() {
                places(item, &format!("{at}/{number}"), out);
            }
        }
        _ => {}
    }
}

#[test]
fn no_text_but_names_and_words_of_people_is_the_signers_to_choose() {
    let record = write(&known());
    let mut all = Vec::new();
    places(&record.value, "", &mut all);
    let mut free = Vec::new();
    for (place, _) in all.iter().filter(|(_, value)| value.is_string()) {
        let mut value = record.value.clone();
        *value.pointer_mut(place).unwrap() = "Purge: unrecoverable for ever".into();
        if verified(record.kind, &value).is_ok() {
            free.push(place.as_str());
        }
    }
    free.sort_unstable();
    let mut expected = FREE;
    expected.sort_unstable();
    assert_eq!(free, expected);
}

#[test]
fn no_field_can_be_added_taken_away_or_be_of_another_type() {
    let record = write(&known());
    let mut all = Vec::new();
    places(&record.value, "", &mut all);
    for (place, found) in all {
        let changed = |change: &dyn Fn(&mut Value)| {
            let mut value = record.value.clone();
            change(value.pointer_mut(&place).unwrap());
            verified(record.kind, &value)
        };
        let more = changed(&|value| match value {
            Value::Object(fields) => drop(fields.insert("category".to_owned(), "Purge".into())),
            Value::Array(items) => items.push("Purge".into()),
            other => *other = Value::Array(Vec::new()),
        });
        assert!(more.is_err(), "{place}");
        let Value::Object(fields) = found else { continue };
        for name in fields.keys() {
            let less = changed(&|value| drop(value.as_object_mut().unwrap().remove(name)));
            assert!(less.is_err(), "{place}/{name}");
        }
    }
}

/// The record with another outcome of one check, and the result that follows.
fn with_outcome(record: &Record, at: usize, outcome: Outcome) -> Value {
    let mut value = record.value.clone();
    value["checks"][at]["result"] = outcome.name().into();
    let mut outcomes: Vec<_> = record.checks.iter().map(|check| check.outcome).collect();
    outcomes[at] = outcome;
    value["result"] = Overall::of(outcomes).name().into();
    value
}

#[test]
fn no_outcome_is_the_signers_to_choose_but_that_nothing_came_of_an_attempt() {
    let good = write(&known());
    for (at, check) in good.checks.iter().enumerate() {
        let is_attempt = check.id.contains("refused");
        for outcome in [Outcome::Pass, Outcome::Fail, Outcome::NotTested] {
            let verified = verified(good.kind, &with_outcome(&good, at, outcome));
            let is_free = outcome == check.outcome || (is_attempt && outcome == Outcome::NotTested);
            assert_eq!(verified.is_ok(), is_free, "{} as {outcome:?}", check.id);
        }
    }
    let mut poor = known();
    (poor.log, poor.home, poor.key.destruction_epoch) = (None, None, None);
    (poor.key.deletion_request_date_ms, poor.dependants[0].mounted) = (None, true);
    let unclear = || Answer::Unclear("kmsd did not answer".to_owned());
    poor.tried.uses = Uses {
        encrypt: Answer::Given("kmsd did it".to_owned()),
        generate: unclear(),
        wrap: unclear(),
        decrypt: vec![unclear()],
    };
    poor.tried.volumes[0].answer = unclear();
    let poor = write(&poor);
    verified(poor.kind, &poor.value).unwrap();
    for (at, check) in poor.checks.iter().enumerate().skip(1) {
        assert_ne!(check.outcome, Outcome::Pass, "{}", check.id);
        let better = with_outcome(&poor, at, Outcome::Pass);
        assert!(verified(poor.kind, &better).is_err(), "{}", check.id);
    }
}

#[test]
fn checks_can_be_neither_left_out_nor_made_up() {
    let record = write(&known());
    let refused = |change: &dyn Fn(&mut Vec<Value>)| {
        let mut value = record.value.clone();
        change(value["checks"].as_array_mut().unwrap());
        verified(record.kind, &value).unwrap_err()
    };
    for number in 0..record.checks.len() {
        refused(&|checks| drop(checks.remove(number)));
        refused(&|checks| checks.push(checks[number].clone()));
    }
    refused(&|checks| checks.swap(0, 1));
    let made_up = json!({ "id": "purge", "claim": "unrecoverable", "result": "NOT TESTED", "detail": "" });
    assert!(refused(&|checks| checks.push(made_up.clone())).contains("/checks"));
}

#[test]
fn a_record_that_its_own_fields_contradict_is_refused() {
    let record = write(&known());
    let refused = |change: &dyn Fn(&mut Value), named: &str| {
        let mut value = record.value.clone();
        change(&mut value);
        let error = verified(record.kind, &value).unwrap_err();
        assert!(error.contains(named), "{named}: {error}");
    };
    let later = |value: &mut Value, ms: i64| *value = facts::time(ms).into();
    refused(&|value| value["result"] = "PASS".into(), "does not follow");
    refused(&|value| value["keystore"]["epoch"] = LEFT.into(), "epoch");
    refused(
        &|value| later(&mut value["key"]["deletion_asked_for"], ASKED_MS - DAY_MS),
        "window",
    );
    refused(
        &|value| later(&mut value["key"]["deletion_due"], GONE_MS + 1),
        "window",
    );
    refused(
        &|value| later(&mut value["key"]["material_gone"], GONE_MS + 1),
        "material_gone",
    );
    refused(&|value| value["key"]["ended"] = Value::Null, "'/checks/state");
    refused(
        &|value| value["dependants"]["known"][0]["is_mounted"] = true.into(),
        "mounted",
    );
    refused(
        &|value| value["keystore"]["audit_head"] = "00".into(),
        "audit-chain",
    );
    refused(&|value| value["erasure"] = "device".into(), "no root slot");
    refused(&|value| value["root_slot"] = "vault".into(), "no root slot");
    refused(
        &|value| value["method"]["epoch_before"] = Value::Null,
        "'/checks/",
    );
    refused(
        &|value| value["audit"] = json!({ "read": false, "quoted": [] }),
        "audit-chain",
    );
    refused(
        &|value| value["home"] = json!({ "looked_at": false }),
        "slot-gone",
    );
    refused(
        &|value| value["home"]["found"][0]["epoch"] = LEFT.into(),
        "slot-gone",
    );
}

#[test]
fn what_is_quoted_of_the_log_has_to_be_in_such_a_log() {
    let record = write(&known());
    let refused = |change: &dyn Fn(&mut Value), named: &str| {
        let mut value = record.value.clone();
        change(&mut value["audit"]);
        let error = verified(record.kind, &value).unwrap_err();
        assert!(error.contains(named), "{named}: {error}");
    };
    refused(
        &|audit| audit["quoted"][0]["time"] = "yesterday".into(),
        "does not say what is quoted",
    );
    refused(&|audit| audit["quoted"][2]["frame"] = "00".into(), "incomplete");
    refused(
        &|audit| drop(audit["quoted"].as_array_mut().unwrap().pop()),
        "audit-gone",
    );
    refused(
        &|audit| drop(audit["quoted"].as_array_mut().unwrap().remove(1)),
        "audit-scheduled",
    );
    refused(
        &|audit| audit["quoted"].as_array_mut().unwrap().swap(0, 1),
        "do not follow",
    );
    refused(&|audit| audit["quoted"][3]["number"] = 17.into(), "none of those");
    refused(&|audit| audit["quoted"][0]["number"] = 0.into(), "none of those");
    refused(&|audit| audit["quoted"][3]["number"] = 6.into(), "not the head");
    refused(&|audit| audit["records"] = 7.into(), "cannot be");
    refused(&|audit| audit["not_quoted"] = 3.into(), "cannot be");
    refused(&|audit| audit["used_by"] = 2.into(), "cannot be");
    refused(&|audit| audit["used_by"] = 6.into(), "audit-unused");
    refused(&|audit| audit["problem"] = "none".into(), "audit-chain");

    // Frames of another keystore, of another key, and of a call that changes nothing.
    let with = |change: &dyn Fn(&mut Value)| {
        let mut value = record.value.clone();
        change(&mut value);
        verified(record.kind, &value).unwrap_err()
    };
    let other = uuid::Uuid::nil().to_string();
    assert!(with(&|value| value["keystore"]["id"] = other.clone().into()).contains("not the first"));
    let as_other = with(&|value| {
        value["key"]["id"] = "18".into();
        value["key"]["arn"] = OTHER_ARN.into();
    });
    assert!(as_other.contains("another key"), "{as_other}");
    let mut frame = Vec::new();
    let previous = [0; 32];
    let digest = frame::push(&mut frame, &previous, &call("Encrypt", MADE_MS).encode_to_vec()).unwrap();
    let encrypt = json!({
        "number": 1,
        "time": facts::time(MADE_MS),
        "operation": "Encrypt",
        "code": SUCCESS,
        "uid": 0,
        "request_id": hex::encode([7; 16]),
        "previous_sha256": hex::encode(previous),
        "sha256": hex::encode(digest),
        "frame": hex::encode(&frame),
    });
    refused(&|audit| audit["quoted"][0] = encrypt.clone(), "changes nothing");
}

#[test]
fn no_byte_of_a_record_can_be_changed_or_left_out() {
    let record = write(&known());
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
    let record = write(&known());
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
