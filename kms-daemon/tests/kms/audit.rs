//! The audit log: what it holds, and what is noticed when it is touched.

use crate::fixture::Kms;
use std::path::Path;

/// A log of a few records, with the daemon stopped; and the head and number of records in its middle.
fn busy() -> (Kms, String, u64) {
    let mut kms = Kms::start();
    let key = kms.create_key();
    kms.encrypt(&key, "AAAA", r#"{"case": "17"}"#);
    let middle = kms.verify().unwrap();
    for _ in 0..3 {
        kms.state(&key);
    }
    kms.stop();
    let head = crate::fixture::text(&middle["Head"]);
    (kms, head, middle["Records"].as_u64().unwrap())
}

fn verify(kms: &Kms, path: &Path) -> Result<serde_json::Value, String> {
    kms.ctl(&["audit", "verify", "--file", path.to_str().unwrap()])
}

/// Offsets at which the frames begin, and where the last one ends.
fn frames(log: &[u8]) -> Vec<usize> {
    let mut offsets = vec![25];
    while *offsets.last().unwrap() < log.len() {
        let at = *offsets.last().unwrap();
        let length = u32::from_be_bytes(log[at..at + 4].try_into().unwrap());
        offsets.push(at + 4 + 32 + length as usize + 32);
    }
    assert_eq!(*offsets.last().unwrap(), log.len());
    offsets
}

#[test]
fn a_good_log_verifies_offline_and_against_a_head_kept_elsewhere() {
    let (kms, head, records) = busy();
    let report = kms.verify().unwrap();
    // Of each describe-key both calls.
    assert_eq!(report["Records"], records + 6);
    assert_eq!(report["WitnessedRecords"], 0);
    let home = kms.home();
    let with = |head: &str| {
        kms.ctl(&[
            "audit",
            "verify",
            "--home",
            home.to_str().unwrap(),
            "--head",
            head,
        ])
    };
    assert_eq!(with(&head).unwrap()["WitnessedRecords"], records);
    assert!(
        with(&"00".repeat(32))
            .unwrap_err()
            .starts_with("AuditLogInvalid: ")
    );
    assert!(with("xyz").unwrap_err().starts_with("InvalidParameter: "));
}

#[test]
fn every_flipped_byte_is_named_with_its_record() {
    let (kms, ..) = busy();
    let log = std::fs::read(kms.log()).unwrap();
    let frames = frames(&log);
    let path = kms.home().join("copy");
    // Every byte of one frame in the middle, and one of every other, the last included.
    let middle = frames[2]..frames[3];
    for at in middle.chain(frames.windows(2).map(|frame| frame[0] + 40)) {
        let mut bad = log.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, &bad).unwrap();
        let error = verify(&kms, &path).unwrap_err();
        let record = frames.iter().filter(|&&begin| begin <= at).count();
        let named = format!("record {record} at offset {}: ", frames[record - 1]);
        assert!(error.contains(&named), "byte {at}: {error}");
    }
    let mut bad = log;
    bad[3] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    assert!(verify(&kms, &path).unwrap_err().contains("is not an audit log"));
}

#[test]
fn removed_swapped_repeated_and_cut_records_are_named() {
    let (kms, head, _) = busy();
    let log = std::fs::read(kms.log()).unwrap();
    let at = frames(&log);
    let frame = |number: usize| &log[at[number - 1]..at[number]];
    let start = &log[..at[1]];
    let path = kms.home().join("copy");
    let cases = [
        ("removed", [start, &log[at[2]..]].concat(), "record 2 "),
        (
            "swapped",
            [start, frame(3), frame(2), &log[at[3]..]].concat(),
            "record 2 ",
        ),
        ("repeated", [start, frame(2), &log[at[1]..]].concat(), "record 3 "),
        ("torn", log[..log.len() - 1].to_vec(), "incomplete"),
    ];
    for (what, bad, named) in cases {
        std::fs::write(&path, bad).unwrap();
        let error = verify(&kms, &path).unwrap_err();
        assert!(error.contains(named), "{what}: {error}");
    }
    // A tail cut between records leaves a good log: only a head kept elsewhere tells.
    std::fs::write(&path, start).unwrap();
    assert_eq!(verify(&kms, &path).unwrap()["Records"], 1);
    let file = path.to_str().unwrap();
    let error = kms
        .ctl(&["audit", "verify", "--file", file, "--head", &head])
        .unwrap_err();
    assert!(error.contains("was cut before it, or rewritten"), "{error}");
}

#[test]
fn a_start_notices_a_log_that_was_cut_changed_or_taken_away() {
    let (mut kms, ..) = busy();
    let good = std::fs::read(kms.log()).unwrap();
    let at = frames(&good);
    let mut other = good.clone();
    let last = other.len() - 1;
    other[last] ^= 1;
    for bad in [&good[..at[at.len() - 2]], &good[..25], b"", &other] {
        std::fs::write(kms.log(), bad).unwrap();
        let said = kms.serve_fails();
        assert!(said.contains("audit"), "{said}");
        assert_eq!(
            std::fs::read(kms.log()).unwrap(),
            *bad,
            "a refused log was changed"
        );
    }
    std::fs::remove_file(kms.log()).unwrap();
    assert!(kms.serve_fails().contains("audit.log"));
    // What a crash leaves: a frame that was never finished, whose call was never answered.
    std::fs::write(kms.log(), [&good, &good[25..25 + 50]].concat()).unwrap();
    kms.serve(&[]);
    kms.verify().unwrap();
}

#[test]
fn without_a_log_nothing_is_answered_but_revocation() {
    let mut kms = Kms::start();
    let (key, disabled) = (kms.create_key(), kms.create_key());
    kms.ctl(&["disable-key", "--key-id", &disabled]).unwrap();
    let aside = kms.home().join("aside");
    std::fs::rename(kms.log(), &aside).unwrap();
    for refused in [
        vec!["describe-key", "--key-id", &key],
        vec!["encrypt", "--key-id", &key, "--plaintext", "AAAA"],
        vec!["list-keys"],
        vec!["create-key"],
        vec!["enable-key", "--key-id", &disabled],
        vec!["create-alias", "--alias-name", "alias/new", "--key-id", &key],
    ] {
        assert_eq!(kms.code(&refused), "ServiceUnavailable", "{refused:?}");
    }
    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();
    // To make sure that it is disabled needs no log either.
    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();
    std::fs::rename(&aside, kms.log()).unwrap();
    let before = kms.verify().unwrap()["Records"].as_u64().unwrap();
    assert_eq!(kms.state(&key), "Disabled");
    assert_eq!(kms.state(&disabled), "Disabled");
    assert_eq!(
        kms.code(&["describe-key", "--key-id", "alias/new"]),
        "Forbidden.KeyNotFound"
    );
    kms.restart();
    // The records of both DisableKeys waited in the key store.
    assert_eq!(kms.verify().unwrap()["Records"].as_u64().unwrap(), before + 5 + 2);
    let log = std::fs::read(kms.log()).unwrap();
    assert!(log.windows(10).any(|window| window == b"DisableKey"));
}

#[test]
fn a_log_that_is_cut_or_replaced_under_the_daemon_is_noticed() {
    let kms = Kms::start();
    let log = std::fs::read(kms.log()).unwrap();
    kms.create_key();
    let grown = std::fs::read(kms.log()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(kms.log()).unwrap();
    file.set_len(log.len() as u64).unwrap();
    assert_eq!(kms.code(&["list-keys"]), "ServiceUnavailable");
    std::fs::write(kms.log(), &grown).unwrap();
    kms.ctl(&["list-keys"]).unwrap();
    let copy = kms.home().join("copy");
    std::fs::copy(kms.log(), &copy).unwrap();
    std::fs::rename(&copy, kms.log()).unwrap();
    assert_eq!(kms.code(&["list-keys"]), "ServiceUnavailable");
}

/// A crash may leave the file as long as it was to become, without pages of it.
#[test]
fn a_last_record_that_a_crash_left_without_its_pages_is_cut_off_and_a_changed_one_is_not() {
    let (mut kms, _, _) = busy();
    let path = kms.log();
    let good = std::fs::read(&path).unwrap();
    let digest = &good[good.len() - 32..];
    let frame = |body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&length, digest, body, &[7; 32]].concat()
    };
    for hole in [0..2048, 2048..4096, 5000..6000] {
        let mut torn = frame(&[0x55; 6000]);
        torn[hole].fill(0);
        std::fs::write(&path, [good.as_slice(), &torn].concat()).unwrap();
        kms.serve(&[]);
        kms.stop();
        let kept = std::fs::read(&path).unwrap();
        assert!(kept.starts_with(&good) && !kept.ends_with(&torn));
        std::fs::write(&path, &good).unwrap();
    }
    std::fs::write(&path, [good.as_slice(), &frame(&[0x55; 6000])].concat()).unwrap();
    assert!(kms.serve_fails().contains("was changed"));
}
