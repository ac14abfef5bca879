//! Destruction through the front doors: drills, passphrases, and kill -9 in the midst of it.

use crate::fixture::{KMSD, Kms, base64, text};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

const WEEK_S: u64 = 7 * 24 * 3600;

fn drill() -> Kms {
    let mut kms = Kms::initialized(&["--drill"]);
    kms.serve(&[]);
    kms
}

fn schedule(kms: &Kms, key: &str) {
    let arguments = [
        "schedule-key-deletion",
        "--pending-window-in-days",
        "7",
        "--key-id",
        key,
    ];
    kms.ctl(&arguments).unwrap();
}

fn advance(kms: &Kms, seconds: u64) -> Result<Value, String> {
    kms.ctl(&["advance-clock", "--seconds", &seconds.to_string()])
}

fn info(kms: &Kms) -> Value {
    kms.ctl(&["get-keystore-info"]).unwrap()
}

fn describe(kms: &Kms, key: &str) -> Value {
    kms.ctl(&["describe-key", "--key-id", key]).unwrap()["KeyMetadata"].take()
}

#[test]
fn a_drill_destroys_a_key_when_its_window_has_passed_and_not_before() {
    let mut kms = drill();
    let (dies, lives) = (kms.create_key(), kms.create_key());
    kms.ctl(&["create-alias", "--alias-name", "alias/dies", "--key-id", &dies])
        .unwrap();
    let plain = base64(b"attack at dawn");
    let (dying, living) = (
        kms.encrypt(&dies, &plain, "{}"),
        kms.encrypt(&lives, &plain, "{}"),
    );
    schedule(&kms, &dies);
    let early = advance(&kms, WEEK_S - 60).unwrap();
    assert_eq!(early["DestroyedKeyIds"], Value::Array(Vec::new()));
    let pending = describe(&kms, &dies);
    assert_eq!(pending["KeyState"], "PendingDeletion");
    assert_ne!(pending["DeleteDate"], "");
    for name in [
        "DestructionDate",
        "DestructionEpoch",
        "DeletionDueDate",
        "DeletionRequestDate",
    ] {
        assert_eq!(pending.get(name), None, "{name}");
    }
    assert_eq!(pending["KeyVersions"].as_array().unwrap().len(), 1);

    let late = advance(&kms, 60).unwrap();
    assert_eq!(late["DestroyedKeyIds"], serde_json::json!([dies]));
    for _ in 0..2 {
        for name in [dies.as_str(), "alias/dies"] {
            let destroyed = describe(&kms, name);
            assert_eq!(destroyed["KeyState"], "Destroyed");
            assert_eq!(destroyed["DeleteDate"], "");
            assert_eq!(destroyed["DeletionDueDate"], pending["DeleteDate"]);
            assert!(
                text(&destroyed["DeletionRequestDate"]).as_str()
                    < text(&destroyed["DeletionDueDate"]).as_str()
            );
            assert_eq!(destroyed["DestructionEpoch"], 1);
            assert_eq!(destroyed["KeyVersions"], pending["KeyVersions"]);
            assert!(text(&destroyed["DestructionDate"]).as_str() > text(&destroyed["CreationDate"]).as_str());
        }
        let refused = kms.decrypt(&dying, "{}").unwrap_err();
        assert_eq!(refused, "Forbidden.KeyNotFound: the key was destroyed\n");
        assert_eq!(
            kms.code(&["cancel-key-deletion", "--key-id", &dies]),
            "Forbidden.KeyNotFound"
        );
        assert_eq!(kms.decrypt(&living, "{}").unwrap(), plain);
        let info = info(&kms);
        assert_eq!(
            (
                &info["Epoch"],
                &info["Drill"],
                &info["RootSlot"],
                &info["Erasure"]
            ),
            (&2.into(), &true.into(), &"file".into(), &"none".into())
        );
        assert_eq!(info["DestructionSuspended"], false);
        let log = kms.verify().unwrap();
        let head = text(&info["AuditHead"]);
        let home = kms.home();
        let arguments = [
            "audit",
            "verify",
            "--home",
            home.to_str().unwrap(),
            "--head",
            &head,
        ];
        let witnessed = kms.ctl(&arguments).unwrap();
        assert_eq!(witnessed["WitnessedRecords"], info["AuditRecords"]);
        assert!(log["Records"].as_u64() > info["AuditRecords"].as_u64());
        kms.restart();
    }
    assert!(!kms.home().join("slot-1").exists() && !kms.home().join("root-1").exists());
    kms.verify().unwrap();
    let log = std::fs::read(kms.log()).unwrap();
    for operation in ["AdvanceClock", "BeginKeyDestruction", "DestroyKeyMaterial"] {
        let name = operation.as_bytes();
        assert!(
            log.windows(name.len()).any(|window| window == name),
            "{operation}"
        );
    }
}

#[test]
fn a_production_keystore_cannot_shift_its_clock() {
    let kms = Kms::start();
    let error = advance(&kms, WEEK_S).unwrap_err();
    assert!(
        error.starts_with("Forbidden.NoPermission: this keystore was not made for drills"),
        "{error}"
    );
    assert_eq!(info(&kms)["Drill"], false);
    kms.ctl(&["confirm-clock"]).unwrap();
    for seconds in ["0", "-1", "x", "316224001"] {
        assert!(
            kms.ctl(&["advance-clock", "--seconds", seconds]).is_err(),
            "{seconds}"
        );
    }
}

/// The daemon dies when a file of the ratchet comes or goes, wherever it is by then.
#[test]
fn kill_9_in_the_midst_of_a_destruction_loses_no_survivor() {
    type Sign = fn(&Path, u64) -> bool;
    let signs: [Sign; 5] = [
        |home, next| home.join(format!("slot-{next}.staged")).exists(),
        |home, next| home.join(format!("root-{next}")).exists(),
        |home, next| home.join(format!("slot-{next}")).exists(),
        |home, next| !home.join(format!("slot-{}", next - 1)).exists(),
        |home, next| !home.join(format!("root-{}", next - 1)).exists(),
    ];
    let mut kms = drill();
    let lives: Vec<_> = (0..5).map(|_| kms.create_key()).collect();
    let plain = base64(b"attack at dawn");
    let living: Vec<_> = lives.iter().map(|key| kms.encrypt(key, &plain, "{}")).collect();
    let mut next = 2;
    for round in 0..20 {
        let sign = signs[round % signs.len()];
        let dies = kms.create_key();
        let dying = kms.encrypt(&dies, &plain, "{}");
        schedule(&kms, &dies);
        let (home, socket) = (kms.home(), kms.socket());
        let told = std::thread::scope(|scope| {
            let told = scope.spawn(|| {
                let mut ctl = Command::new(crate::fixture::KMSCTL);
                ctl.arg("--socket").arg(&socket);
                ctl.args(["advance-clock", "--seconds", &WEEK_S.to_string()]);
                ctl.stderr(Stdio::null());
                ctl.output().unwrap().status.success()
            });
            while !sign(&home, next) && !told.is_finished() {
                std::hint::spin_loop();
            }
            kms.kill();
            told.join().unwrap()
        });
        kms.serve(&[]);
        kms.verify().unwrap();
        for blob in &living {
            assert_eq!(kms.decrypt(blob, "{}").unwrap(), plain, "round {round}");
        }
        assert!(kms.decrypt(&dying, "{}").is_err(), "round {round}");
        // The start, or the check that follows it, has it again.
        advance(&kms, 1).unwrap();
        assert_eq!(kms.state(&dies), "Destroyed", "round {round}, answered: {told}");
        let epoch = info(&kms)["Epoch"].as_u64().unwrap();
        assert_eq!(epoch, next, "round {round}");
        let slots = kms.home().read_dir().unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_str().unwrap().starts_with("slot-")
        });
        assert_eq!(slots.count(), 1, "round {round}");
        next = epoch + 1;
    }
}

#[test]
fn a_passphrase_opens_its_slot_and_is_asked_for_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (right, wrong, short) = (
        file("right", "correct horse battery\n"),
        file("wrong", "correct horse batterz\n"),
        file("short", "elevenbytes\n"),
    );
    let init = |arguments: &[&str]| {
        let home = directory.path().join("refused");
        let mut init = Command::new(KMSD);
        let output = init
            .arg("init")
            .arg("--home")
            .arg(&home)
            .args(arguments)
            .output()
            .unwrap();
        assert!(!output.status.success() && !home.exists(), "{arguments:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    };
    let said = init(&["--slot", "passphrase", "--passphrase-file", &short]);
    assert!(said.contains("12 to 1024 bytes"), "{said}");
    let said = init(&["--slot", "passphrase", "--passphrase-file", "/nowhere/at/all"]);
    assert!(said.contains("/nowhere/at/all: "), "{said}");
    let said = init(&["--passphrase-file", &right]);
    assert!(said.contains("goes with --slot passphrase"), "{said}");

    let mut kms = Kms::initialized(&["--drill", "--slot", "passphrase", "--passphrase-file", &right]);
    let said = kms.serve_fails_with(&["--passphrase-file", &wrong]);
    assert!(said.contains("the passphrase is not that of"), "{said}");
    assert_eq!(said.lines().count(), 1);
    kms.serve(&["--passphrase-file", &right]);
    let (dies, lives) = (kms.create_key(), kms.create_key());
    let plain = base64(b"attack at dawn");
    let living = kms.encrypt(&lives, &plain, "{}");
    schedule(&kms, &dies);
    let answer = advance(&kms, WEEK_S).unwrap();
    assert_eq!(answer["DestroyedKeyIds"], serde_json::json!([dies]));
    assert_eq!(info(&kms)["RootSlot"], "passphrase");
    assert_eq!(info(&kms)["Erasure"], "none");
    kms.stop();
    kms.serve(&["--passphrase-file", &right]);
    assert_eq!(kms.decrypt(&living, "{}").unwrap(), plain);
    assert_eq!(kms.state(&dies), "Destroyed");

    let plain_slot = Kms::initialized(&[]);
    let said = plain_slot.serve_fails_with(&["--passphrase-file", &right]);
    assert!(said.contains("takes no passphrase"), "{said}");
}
