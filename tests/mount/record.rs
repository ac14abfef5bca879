//! `cmkfs drill record`: of a key that is destroyed, and of no other; and what is verified of it.

use crate::program::program;
use crate::world::{World, errno, eventually};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use cmkfs::adapters::drill::document::{Kind, Outcome};
use cmkfs::adapters::drill::record::uses;
use cmkfs::adapters::drill::sign::PublicKey;
use cmkfs::adapters::drill::verify::verify;
use kms_client::Client;
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

const NONCE: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const EIGHT_DAYS_S: &str = "691200";

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A kmsd for drills and a signing key.
fn world() -> World {
    let world = World::with_drill_clock();
    world.cmkfs_ok(&["drill", "keygen", &file(&world, "signer")]);
    world
}

fn file(world: &World, name: &str) -> String {
    world.path(name).to_str().unwrap().to_owned()
}

fn schedule(world: &World, key: &str) {
    let arguments = [
        "schedule-key-deletion",
        "--key-id",
        key,
        "--pending-window-in-days",
        "7",
        "--yes",
    ];
    world.kmsctl(&arguments).unwrap();
}

fn destroy(world: &World, key: &str) {
    schedule(world, key);
    world
        .kmsctl(&["advance-clock", "--seconds", EIGHT_DAYS_S])
        .unwrap();
    assert_eq!(world.state_of_key(key), "Destroyed");
}

/// A key whose material is to be imported.
fn external(world: &World) -> String {
    let made = world.kmsctl(&["create-key", "--origin", "EXTERNAL"]).unwrap();
    made["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned()
}

fn import(world: &World, key: &str) {
    let offered = world
        .kmsctl(&["get-parameters-for-import", "--key-id", key])
        .unwrap();
    let text = |name: &str| offered[name].as_str().unwrap();
    let public = BASE64_STANDARD.decode(text("PublicKey")).unwrap();
    let public = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(&public).unwrap()).unwrap();
    let mut wrapped = vec![0; public.ciphertext_size()];
    public
        .encrypt(&OAEP_SHA256_MGF1SHA256, &[0x5a; 32], &mut wrapped, None)
        .unwrap();
    let wrapped = BASE64_STANDARD.encode(&wrapped);
    let mut arguments = vec!["import-key-material", "--key-id", key];
    arguments.extend([
        "--encrypted-key-material",
        &wrapped,
        "--import-token",
        text("ImportToken"),
    ]);
    world.kmsctl(&arguments).unwrap();
}

fn record(world: &World, key: &str, more: &[&str]) -> Output {
    let (report, html, signer) = (
        file(world, "r.json"),
        file(world, "r.html"),
        file(world, "signer"),
    );
    let mut arguments = vec!["drill", "record", "--key-id", key, "--report", &report];
    arguments.extend(["--html", &html, "--signing-key", &signer]);
    arguments.extend(more);
    world.cmkfs(&arguments)
}

fn verified(world: &World, name: &str, more: &[&str]) -> Output {
    Command::new(program("cmkfs"))
        .args(["drill", "verify", &file(world, name)])
        .args(["--key", &file(world, "signer.pub")])
        .args(more)
        .output()
        .unwrap()
}

fn content(world: &World) -> Value {
    let file: Value = serde_json::from_slice(&fs::read(world.path("r.json")).unwrap()).unwrap();
    file["record"].clone()
}

fn result_of<'r>(record: &'r Value, id: &str) -> &'r str {
    let checks = record["checks"].as_array().unwrap();
    let mut of = checks.iter().filter(|check| check["id"] == id);
    let first = of.next().unwrap_or_else(|| panic!("no check {id}"))["result"]
        .as_str()
        .unwrap();
    assert!(of.all(|check| check["result"] == first), "{id}");
    first
}

/// One line, and nothing written.
fn assert_refused(world: &World, output: &Output, named: &str) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.lines().count() == 1 && said.contains(named),
        "{named}: {said}"
    );
    assert!(output.stdout.is_empty());
    assert!(!world.path("r.json").exists() && !world.path("r.html").exists());
}

#[test]
fn the_record_of_a_destroyed_key_verifies_and_says_what_it_must() {
    let mut world = world();
    world.create_volume();
    world.mount(&[]);
    fs::write(world.at("file"), [7; 5000]).unwrap();
    world.unmount();
    let key = world.key.clone();
    destroy(&world, &key);
    let (home, volume) = (world.keystore(), world.volume());
    let (home, volume) = (home.to_str().unwrap(), volume.to_str().unwrap());
    let files = ["--kms-home", home, "--volume", volume];
    let people = [
        "--nonce",
        NONCE,
        "--operator",
        "the tests",
        "--known-copy",
        "tape 17",
    ];
    let output = record(&world, &key, &[files.as_slice(), &people].concat());
    assert!(output.status.success(), "{}", said(&output));
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(
        out.lines().count() == 1 && out.starts_with("Destruction record (TEST CLOCK"),
        "{out}"
    );

    let found = verified(
        &world,
        "r.json",
        &["--nonce", NONCE, "--kind", "destruction-record"],
    );
    let said_of_it = said(&found);
    assert!(
        found.status.success() && said_of_it.starts_with("genuine destruction record"),
        "{said_of_it}"
    );
    assert!(said_of_it.contains("TEST CLOCK") && said_of_it.contains("erasure = none"));
    let other = verified(&world, "r.json", &["--nonce", &"5a".repeat(32)]);
    assert!(!other.status.success() && said(&other).contains("another challenge"));

    let record = content(&world);
    assert_eq!(record["document"], "destruction record");
    assert_eq!(record["result"], "INCOMPLETE");
    for id in [
        "state",
        "epoch",
        "mounted",
        "refused-encrypt",
        "refused-generate",
        "refused-decrypt",
        "volume-refused",
        "slot-gone",
        "audit-chain",
        "audit-scheduled",
        "audit-gone",
        "audit-unused",
    ] {
        assert_eq!(result_of(&record, id), "PASS", "{id}");
    }
    for id in ["window", "erasure", "recovery"] {
        assert_eq!(result_of(&record, id), "NOT TESTED", "{id}");
    }
    assert_eq!(record["method"]["epoch_before"], 1);
    assert_eq!(record["keystore"]["epoch"], 2);
    let dependant = &record["dependants"]["known"][0];
    assert_eq!(dependant["location"], volume);
    assert!(dependant["files"].as_u64().unwrap() >= 1, "{dependant}");
    assert_eq!(record["known_copies"]["named"], "tape 17");
    assert_eq!(record["operator"], "the tests");
    for field in ["created", "deletion_asked_for", "deletion_due", "material_gone"] {
        assert!(record["key"][field].is_string(), "{field}");
    }
    assert_eq!(record["key"]["versions"].as_array().unwrap().len(), 1);

    let page = fs::read_to_string(world.path("r.html")).unwrap();
    assert!(page.contains("This is not a drill report.") && page.contains("erasure = none"));
    let bytes = fs::read(world.path("r.json")).unwrap();
    for text in [page, String::from_utf8(bytes.clone()).unwrap()] {
        let text = text.to_lowercase();
        assert!(!text.contains("purge") && !text.contains("for ever") && !text.contains("forever"));
    }

    let signer = PublicKey::read(&file(&world, "signer.pub")).unwrap();
    assert_eq!(
        verify(&bytes, signer, None).unwrap().kind,
        Kind::DestructionRecord
    );
    for part in 0..200 {
        let at = part * (bytes.len() - 1) / 199;
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert!(verify(&changed, signer, None).is_err(), "byte {at}");
    }
}

#[test]
fn there_is_no_record_of_a_key_in_any_other_state() {
    let world = world();
    let key = world.key.clone();
    let record = |key: &str| record(&world, key, &[]);
    assert_refused(&world, &record(&key), "is Enabled");
    world.with_key("disable-key");
    assert_refused(&world, &record(&key), "is Disabled");
    schedule(&world, &key);
    assert_refused(&world, &record(&key), "is PendingDeletion");
    let external = external(&world);
    assert_refused(&world, &record(&external), "is PendingImport");
    for unknown in ["alias/nobody", "00000000-0000-4000-8000-000000000000"] {
        assert_refused(&world, &record(unknown), "Forbidden.KeyNotFound");
    }
}

#[test]
fn of_an_external_key_the_record_says_that_our_copy_is_removed() {
    let world = world();
    let external = external(&world);
    import(&world, &external);
    let delete = ["delete-key-material", "--key-id", &external];
    world.kmsctl(&delete).unwrap();
    // It lacks its material a day before its deletion is asked for.
    world.kmsctl(&["advance-clock", "--seconds", "86400"]).unwrap();
    destroy(&world, &external);
    let home = world.keystore();
    let output = record(&world, &external, &["--kms-home", home.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let made = content(&world);
    for id in [
        "epoch",
        "slot-gone",
        "audit-scheduled",
        "audit-gone",
        "audit-unused",
    ] {
        assert_eq!(result_of(&made, id), "PASS", "{id}");
    }
    assert_eq!(made["method"]["epoch_before"], 1);
    let date = |name: &str| made["key"][name].as_str().unwrap().to_owned();
    assert!(date("material_gone") < date("deletion_asked_for") && date("deletion_due") <= date("ended"));
    let found = verified(&world, "r.json", &[]);
    assert!(
        said(&found).starts_with("genuine removal record"),
        "{}",
        said(&found)
    );
    let refused = verified(&world, "r.json", &["--kind", "destruction-record"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("it is a removal record, and no destruction record"));
    let all = [
        said(&output),
        said(&found),
        fs::read_to_string(world.path("r.json")).unwrap(),
        fs::read_to_string(world.path("r.html")).unwrap(),
    ];
    for text in all {
        assert!(!text.to_lowercase().contains("destroyed"), "{text}");
    }
    assert!(
        content(&world)["statement"]
            .as_str()
            .unwrap()
            .contains("our copy is removed")
    );
}

#[test]
fn of_a_key_that_never_had_material_there_is_no_record() {
    let world = world();
    let external = external(&world);
    destroy(&world, &external);
    let home = world.keystore();
    let output = record(&world, &external, &["--kms-home", home.to_str().unwrap()]);
    assert_refused(&world, &output, "no material that the key");
}

/// What is refused is refused for want of the key, and not whatever is asked.
#[test]
fn a_key_that_can_be_used_is_seen_to_be_used() {
    let world = world();
    let client = Client::connect(&world.socket(), Duration::from_secs(20)).unwrap();
    let outcomes = |key: &str| {
        let key = client.describe_key(key).unwrap();
        let region = key.arn.split(':').nth(2).unwrap();
        let checks = uses(&client, &key, region).checks(&key);
        checks.iter().map(|check| check.outcome).collect::<Vec<_>>()
    };
    use Outcome::{Fail, NotTested, Pass};
    // No blob is at hand that could be decrypted: that it is not is no refusal.
    assert_eq!(outcomes(&world.key), [Fail, Fail, Fail, NotTested]);
    world.with_key("disable-key");
    assert_eq!(outcomes(&world.key), [NotTested; 4]);
    destroy(&world, &world.key);
    assert_eq!(outcomes(&world.key), [Pass; 4]);
}

#[test]
fn a_slot_that_was_kept_and_a_directory_that_is_no_home_are_no_proof() {
    let world = world();
    let key = world.key.clone();
    let home = world.keystore();
    let kept = fs::read(home.join("slot-1")).unwrap();
    destroy(&world, &key);
    let slot_gone = |home: &std::path::Path| {
        let output = record(&world, &key, &["--kms-home", home.to_str().unwrap()]);
        let made = content(&world);
        let found = verified(&world, "r.json", &[]);
        assert!(said(&found).starts_with("genuine"), "{}", said(&found));
        assert_eq!(output.status.code(), found.status.code());
        result_of(&made, "slot-gone").to_owned()
    };
    assert_eq!(slot_gone(&home), "PASS");
    for name in ["slot-1", "slot-1.bak", "db/kept"] {
        fs::write(home.join(name), &kept).unwrap();
        assert_eq!(slot_gone(&home), "FAIL", "{name}");
        fs::remove_file(home.join(name)).unwrap();
    }
    let elsewhere = world.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::copy(home.join("audit.log"), elsewhere.join("audit.log")).unwrap();
    // Every attempt to use the key is recorded there, so that the copy ends early.
    assert_eq!(slot_gone(&elsewhere), "NOT TESTED");
}

#[test]
fn a_log_that_was_kept_bears_out_what_a_record_quotes_of_it() {
    let world = world();
    let key = world.key.clone();
    destroy(&world, &key);
    let home = world.keystore();
    let output = record(&world, &key, &["--kms-home", home.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let log = home.join("audit.log");
    let checked = |log: &std::path::Path| verified(&world, "r.json", &["--audit-log", log.to_str().unwrap()]);
    let found = checked(&log);
    assert!(
        found.status.success() && said(&found).contains("has what is quoted"),
        "{}",
        said(&found)
    );
    // Half of it does not reach the head.
    let half = world.path("half.log");
    let bytes = fs::read(&log).unwrap();
    fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    let refused = checked(&half);
    assert!(
        !refused.status.success() && said(&refused).contains("half.log"),
        "{}",
        said(&refused)
    );
}

#[test]
fn a_report_and_a_record_are_each_named_as_what_they_are() {
    let world = world();
    let key = world.key.clone();
    destroy(&world, &key);
    // Without any of kmsd's files.
    let output = record(&world, &key, &[]);
    assert!(output.status.success(), "{}", said(&output));
    for id in ["slot-gone", "audit-chain", "audit-gone", "volume-refused"] {
        assert_eq!(result_of(&content(&world), id), "NOT TESTED", "{id}");
    }
    let stated = content(&world)["statement"].as_str().unwrap().to_owned();
    assert!(
        stated.starts_with("kmsd says that") && stated.contains("was not observed"),
        "{stated}"
    );
    let refused = verified(&world, "r.json", &["--kind", "drill-report"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("it is a destruction record, and no drill report"));

    let (report, signer) = (file(&world, "drill.json"), file(&world, "signer"));
    let quick = ["--size-mib", "1", "--observe-ms", "100"];
    let mut drill = vec![
        "drill",
        "--scratch",
        "--report",
        &report,
        "--signing-key",
        &signer,
    ];
    drill.extend(quick);
    world.cmkfs_ok(&drill);
    let refused = verified(&world, "drill.json", &["--kind", "destruction-record"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("it is a drill report, and no destruction record"));
    let accepted = verified(&world, "drill.json", &["--kind", "drill-report"]);
    assert!(
        said(&accepted).starts_with("genuine drill report"),
        "{}",
        said(&accepted)
    );
    // Renamed, each is refused.
    for (name, from, to) in [("drill.json", "report", "record"), ("r.json", "record", "report")] {
        let text = fs::read_to_string(world.path(name)).unwrap();
        let renamed = text.replacen(&format!("\"{from}\": {{"), &format!("\"{to}\": {{"), 1);
        assert_ne!(renamed, text);
        fs::write(world.path("renamed.json"), renamed).unwrap();
        assert_eq!(
            verified(&world, "renamed.json", &[]).status.code(),
            Some(1),
            "{name}"
        );
    }
}

#[test]
fn a_directory_under_a_key_of_its_own_is_tried_through_its_mount() {
    let mut world = world();
    world.create_volume();
    world.mount(&[]);
    let key = world.create_key();
    fs::create_dir(world.at("acme")).unwrap();
    world.cmkfs_ok(&["setkey", world.at("acme").to_str().unwrap(), "--key-id", &key]);
    fs::write(world.at("acme/file"), [7; 5000]).unwrap();
    let known = || {
        let described = world.kmsctl(&["describe-key", "--key-id", &key]).unwrap();
        described["Dependants"].as_array().unwrap().len()
    };
    eventually("the mount has reported it", || known() == 1);
    destroy(&world, &key);
    eventually("it is destroyed for the mount, too", || {
        errno(fs::metadata(world.at("acme"))) == libc::ENOKEY
    });
    let (mounted, volume) = (world.mnt(), world.volume());
    let output = record(&world, &key, &["--volume", mounted.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let made = content(&world);
    assert_eq!(result_of(&made, "volume-refused"), "PASS");
    assert_eq!(result_of(&made, "mounted"), "NOT TESTED");
    let dependant = &made["dependants"]["known"][0];
    assert_eq!(dependant["domain"], 1, "{made}");
    assert_eq!(dependant["location"], volume.to_str().unwrap());
    world.unmount();
    // Nobody can tell without the volume's own key.
    let output = record(&world, &key, &["--volume", volume.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(result_of(&content(&world), "volume-refused"), "NOT TESTED");
}

#[test]
fn what_is_named_wrongly_is_refused_in_one_line() {
    let mut world = world();
    let key = world.key.clone();
    let other = world.create_key();
    world.create_volume();
    destroy(&world, &other);
    let volume = world.volume();
    let log = file(&world, "mount.log");
    fs::write(&log, "no log").unwrap();
    for (arguments, named) in [
        (vec!["--nonce", "12"], "--nonce 12"),
        (vec!["--kms-home", "/nonexistent"], "kmsd's home /nonexistent"),
        (vec!["--audit-log", "/nonexistent"], "audit log /nonexistent"),
        (vec!["--audit-log", log.as_str()], "audit log"),
        (vec!["--volume", "/etc"], "/etc is no cmkfs volume"),
        (vec!["--volume", volume.to_str().unwrap()], key.as_str()),
    ] {
        assert_refused(&world, &record(&world, &other, &arguments), named);
    }
    world.stop_kmsd(libc::SIGTERM);
    assert_refused(&world, &record(&world, &other, &[]), "kmsd does not answer");
}
