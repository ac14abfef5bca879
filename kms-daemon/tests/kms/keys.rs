//! Keys, their states and aliases.

use crate::fixture::{Kms, text};

/// Brings a fresh key into `state`.
fn key_in(kms: &Kms, state: &str) -> String {
    let key = kms.create_key();
    match state {
        "Enabled" => {}
        "Disabled" => drop(kms.ctl(&["disable-key", "--key-id", &key]).unwrap()),
        "PendingDeletion" => drop(schedule(kms, &key, "7").unwrap()),
        other => panic!("{other}"),
    }
    assert_eq!(kms.state(&key), state);
    key
}

fn schedule(kms: &Kms, key: &str, days: &str) -> Result<serde_json::Value, String> {
    kms.ctl(&[
        "schedule-key-deletion",
        "--key-id",
        key,
        "--pending-window-in-days",
        days,
    ])
}

#[test]
fn every_transition_and_every_use_in_every_state() {
    const OK: &str = "";
    const STATE: &str = "Rejected.StateModifiedFailed";
    // state, operation, code or OK, state after
    let table = [
        ("Enabled", "enable-key", OK, "Enabled"),
        ("Enabled", "disable-key", OK, "Disabled"),
        ("Enabled", "schedule-key-deletion", OK, "PendingDeletion"),
        ("Enabled", "cancel-key-deletion", STATE, "Enabled"),
        ("Enabled", "encrypt", OK, "Enabled"),
        ("Enabled", "generate-data-key", OK, "Enabled"),
        ("Disabled", "enable-key", OK, "Enabled"),
        ("Disabled", "disable-key", OK, "Disabled"),
        ("Disabled", "schedule-key-deletion", OK, "PendingDeletion"),
        ("Disabled", "cancel-key-deletion", STATE, "Disabled"),
        ("Disabled", "encrypt", "Rejected.Disabled", "Disabled"),
        ("Disabled", "generate-data-key", "Rejected.Disabled", "Disabled"),
        ("PendingDeletion", "enable-key", STATE, "PendingDeletion"),
        ("PendingDeletion", "disable-key", STATE, "PendingDeletion"),
        (
            "PendingDeletion",
            "schedule-key-deletion",
            "Rejected.PendingDeletion",
            "PendingDeletion",
        ),
        ("PendingDeletion", "cancel-key-deletion", OK, "Enabled"),
        (
            "PendingDeletion",
            "encrypt",
            "Rejected.PendingDeletion",
            "PendingDeletion",
        ),
        (
            "PendingDeletion",
            "generate-data-key",
            "Rejected.PendingDeletion",
            "PendingDeletion",
        ),
    ];
    let mut kms = Kms::start();
    let mut left = Vec::new();
    for (state, operation, expected, after) in table {
        let key = key_in(&kms, state);
        let mut arguments = vec![operation, "--key-id", &key];
        match operation {
            "schedule-key-deletion" => arguments.extend(["--pending-window-in-days", "30"]),
            "encrypt" => arguments.extend(["--plaintext", "AA=="]),
            _ => {}
        }
        let outcome = kms.ctl(&arguments);
        let code = outcome.map_or_else(
            |error| error.split(": ").next().unwrap().to_owned(),
            |_| String::new(),
        );
        assert_eq!(code, expected, "{operation} while {state}");
        assert_eq!(kms.state(&key), after, "{operation} while {state}");
        left.push((key, after));
    }
    kms.restart();
    for (key, state) in left {
        assert_eq!(kms.state(&key), state, "after a restart");
    }
}

#[test]
fn deletion_has_a_window_of_7_to_30_days_and_a_date() {
    let kms = Kms::start();
    let key = kms.create_key();
    for days in ["0", "6", "31", "4294967295"] {
        let error = schedule(&kms, &key, days).unwrap_err();
        assert!(
            error.starts_with("InvalidParameter: PendingWindowInDays"),
            "{error}"
        );
    }
    assert_eq!(kms.state(&key), "Enabled");
    let answer = schedule(&kms, &key, "7").unwrap();
    let described = kms.ctl(&["describe-key", "--key-id", &key]).unwrap();
    assert_eq!(described["KeyMetadata"]["DeleteDate"], answer["DeleteDate"]);
    assert!(text(&answer["DeleteDate"]).ends_with('Z'));
    kms.ctl(&["cancel-key-deletion", "--key-id", &key]).unwrap();
    let described = kms.ctl(&["describe-key", "--key-id", &key]).unwrap();
    assert_eq!(described["KeyMetadata"]["DeleteDate"], "");
}

#[test]
fn a_disabled_key_comes_back_whole() {
    let kms = Kms::start();
    let key = kms.create_key();
    let blob = kms.encrypt(&key, "c2VjcmV0", "{}");
    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();
    assert!(
        kms.decrypt(&blob, "{}")
            .unwrap_err()
            .starts_with("Rejected.Disabled: ")
    );
    kms.ctl(&["enable-key", "--key-id", &key]).unwrap();
    assert_eq!(kms.decrypt(&blob, "{}").unwrap(), "c2VjcmV0");
}

#[test]
fn a_key_has_three_names_and_no_others() {
    let mut kms = Kms::initialized(&["--region", "moon-1", "--account", "42"]);
    kms.serve(&[]);
    let created = kms.ctl(&["create-key", "--description", "für Elise"]).unwrap();
    let metadata = &created["KeyMetadata"];
    let (key, arn) = (text(&metadata["KeyId"]), text(&metadata["Arn"]));
    assert_eq!(arn, format!("acs:kms:moon-1:42:key/{key}"));
    kms.ctl(&["create-alias", "--alias-name", "alias/elise", "--key-id", &arn])
        .unwrap();
    for name in [&key, &arn, "alias/elise", "acs:kms:moon-1:42:alias/elise"] {
        assert_eq!(
            &kms.ctl(&["describe-key", "--key-id", name]).unwrap()["KeyMetadata"],
            metadata
        );
    }
    let strangers = [
        format!("acs:kms:moon-2:42:key/{key}"),
        format!("acs:kms:moon-1:43:key/{key}"),
        key.replace('-', ""),
        format!("{{{key}}}"),
        "00000000-0000-0000-0000-000000000000".to_owned(),
        "alias/none".to_owned(),
        "elise".to_owned(),
    ];
    for name in strangers {
        assert_eq!(
            kms.code(&["describe-key", "--key-id", &name]),
            "Forbidden.KeyNotFound",
            "{name}"
        );
    }
    assert_eq!(kms.code(&["describe-key", "--key-id", ""]), "InvalidParameter");
}

#[test]
fn only_what_is_supported_can_be_asked_for() {
    let kms = Kms::start();
    for flags in [
        ["--key-spec", "RSA_2048"],
        ["--key-usage", "SIGN/VERIFY"],
        ["--origin", "AWS_CLOUDHSM"],
        ["--protection-level", "HSM"],
    ] {
        assert_eq!(
            kms.code(&["create-key", flags[0], flags[1]]),
            "InvalidParameter",
            "{flags:?}"
        );
    }
    let long = "x".repeat(8193);
    assert_eq!(
        kms.code(&["create-key", "--description", &long]),
        "InvalidParameter"
    );
    assert_eq!(kms.ctl(&["list-keys"]).unwrap()["TotalCount"], 0);
}

#[test]
fn lists_come_in_pages() {
    let kms = Kms::start();
    let mut keys: Vec<String> = (0..5).map(|_| kms.create_key()).collect();
    keys.sort();
    kms.ctl(&["disable-key", "--key-id", &keys[0]]).unwrap();
    let mut listed = Vec::new();
    for page in ["1", "2", "3"] {
        let answer = kms
            .ctl(&["list-keys", "--page-size", "2", "--page-number", page])
            .unwrap();
        assert_eq!(answer["TotalCount"], 5);
        let page = answer["Keys"]["Key"].as_array().unwrap();
        listed.extend(page.iter().map(|key| text(&key["KeyId"])));
    }
    assert_eq!(listed, keys);
    assert_eq!(kms.code(&["list-keys", "--page-size", "101"]), "InvalidParameter");
}

#[test]
fn aliases_are_made_moved_listed_and_removed() {
    let mut kms = Kms::start();
    let (one, two) = (kms.create_key(), kms.create_key());
    let alias = |kms: &Kms, operation: &str, name: &str, key: &str| {
        kms.ctl(&[operation, "--alias-name", name, "--key-id", key])
            .map_err(|error| error.split(": ").next().unwrap().to_owned())
    };
    alias(&kms, "create-alias", "alias/a", &one).unwrap();
    alias(&kms, "create-alias", "alias/b/c_d-E", &one).unwrap();
    assert_eq!(
        alias(&kms, "create-alias", "alias/a", &two).unwrap_err(),
        "Rejected.AliasExists"
    );
    assert_eq!(
        alias(&kms, "update-alias", "alias/z", &two).unwrap_err(),
        "Forbidden.AliasNotFound"
    );
    assert_eq!(
        alias(&kms, "create-alias", "alias/y", "alias/a").unwrap_err(),
        "Forbidden.KeyNotFound"
    );
    let long = format!("alias/{}", "x".repeat(250));
    for name in ["a", "alias/", "alias/ä", "alias/a b", &long] {
        assert_eq!(
            alias(&kms, "create-alias", name, &one).unwrap_err(),
            "InvalidParameter",
            "{name}"
        );
    }
    alias(&kms, "update-alias", "alias/a", &two).unwrap();
    kms.restart();

    let names = |answer: serde_json::Value| -> Vec<String> {
        let aliases = answer["Aliases"]["Alias"].as_array().unwrap();
        aliases.iter().map(|alias| text(&alias["AliasName"])).collect()
    };
    assert_eq!(
        names(kms.ctl(&["list-aliases"]).unwrap()),
        ["alias/a", "alias/b/c_d-E"]
    );
    let of = |key: &str| names(kms.ctl(&["list-aliases-by-key-id", "--key-id", key]).unwrap());
    assert_eq!(of(&one), ["alias/b/c_d-E"]);
    assert_eq!(of(&two), ["alias/a"]);
    let described = kms.ctl(&["describe-key", "--key-id", "alias/a"]).unwrap();
    assert_eq!(described["KeyMetadata"]["KeyId"], two.as_str());
    kms.ctl(&["delete-alias", "--alias-name", "alias/a"]).unwrap();
    assert_eq!(
        kms.code(&["delete-alias", "--alias-name", "alias/a"]),
        "Forbidden.AliasNotFound"
    );
    assert_eq!(
        kms.code(&["describe-key", "--key-id", "alias/a"]),
        "Forbidden.KeyNotFound"
    );
    assert_eq!(kms.state(&two), "Enabled");
}
