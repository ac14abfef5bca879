//! What depends on a key: reported by sessions, listed by kmsctl, and shown before the key is scheduled for deletion.

use crate::fixture::{Kms, outcome};
use kms_client::{Client, EncryptionContext, Session, Usage};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

const VOLUME: [u8; 16] = [4; 16];
const VOLUME_ID: &str = "04040404-0404-0404-0404-040404040404";

fn open(client: &Client, domain: u16) -> Session {
    client.open_session(VOLUME, domain, Duration::ZERO).unwrap()
}

fn report(session: &Session, key: &str, location: &[u8], files: u64, bytes: u64) {
    let usage = Usage {
        location: Path::new(OsStr::from_bytes(location)),
        files,
        bytes,
    };
    session.report_usage(key, &usage).unwrap();
}

fn dependants(kms: &Kms, key: &str) -> Value {
    kms.ctl(&["describe-key", "--key-id", key]).unwrap()["Dependants"].take()
}

/// A key on which two domains depend.
fn with_dependants(kms: &Kms) -> String {
    let key = kms.create_key();
    let client = kms.client();
    report(&open(&client, 0), &key, b"/srv/vault", 1234, 5 << 30);
    report(&open(&client, 3), &key, b"/srv/vault", 1, 512);
    key
}

fn schedule<'a>(key: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["schedule-key-deletion", "--key-id", key];
    arguments.extend(["--pending-window-in-days", "7"]);
    arguments.extend(more);
    arguments
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn what_mounts_report_is_described_and_survives_kill_9() {
    let mut kms = Kms::initialized(&["--drill"]);
    kms.serve(&[]);
    let (key, other) = (kms.create_key(), kms.create_key());
    assert_eq!(dependants(&kms, &key), json!([]));
    let session = open(&kms.client(), 3);
    // A path that is no UTF-8, and one that becomes too long by that.
    let long = [b"/\xff".as_slice(), &[b'x'; 4090], &[0xff; 3]].concat();
    report(&session, &key, &long, 1, 1);
    let location = dependants(&kms, &key)[0]["Location"].take();
    let location = location.as_str().unwrap();
    assert!(location.starts_with("/\u{fffd}xxx") && location.ends_with('x'));
    assert_eq!(location.len(), 4 + 4090);
    report(&session, &key, b"/srv/vault", 17, u64::MAX);
    kms.kill();
    kms.serve(&[]);
    let listed = dependants(&kms, &key);
    let expected = |listed: &Value, mounted: bool| {
        json!([{
            "VolumeId": VOLUME_ID,
            "Domain": 3,
            "Location": "/srv/vault",
            "Files": 17,
            "Bytes": u64::MAX,
            "Mounted": mounted,
            "ReportTime": listed[0]["ReportTime"],
        }])
    };
    assert_eq!(listed, expected(&listed, false));
    assert!(listed[0]["ReportTime"].as_str().unwrap().starts_with("20"));

    // The domain's session, and no other's, makes it mounted, for as long as it holds the key.
    let client = kms.client();
    let contexts = [EncryptionContext::data_key(VOLUME, 0, 1)];
    let (elsewhere, here) = (open(&client, 0), open(&client, 3));
    elsewhere.issue_data_keys(&key, &contexts).unwrap();
    here.issue_data_keys(&other, &contexts).unwrap();
    assert_eq!(dependants(&kms, &key), expected(&listed, false));
    here.issue_data_keys(&key, &contexts).unwrap();
    assert_eq!(dependants(&kms, &key), expected(&listed, true));
    here.close().unwrap();
    elsewhere.close().unwrap();

    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();
    assert_eq!(dependants(&kms, &key), expected(&listed, false));
    kms.ctl(&schedule(&key, &["--yes"])).unwrap();
    kms.ctl(&["advance-clock", "--seconds", "604800"]).unwrap();
    assert_eq!(kms.state(&key), "Destroyed");
    for _ in 0..2 {
        assert_eq!(dependants(&kms, &key), expected(&listed, false));
        kms.restart();
    }
    kms.verify().unwrap();
}

#[test]
fn a_domain_that_was_removed_is_listed_no_more() {
    let kms = Kms::start();
    let key = with_dependants(&kms);
    let client = kms.client();
    open(&client, 0).report_removed(&key).unwrap();
    let left = dependants(&kms, &key);
    assert_eq!(left.as_array().unwrap().len(), 1);
    assert_eq!(left[0]["Domain"], 3);
    open(&client, 3).report_removed(&key).unwrap();
    open(&client, 3).report_removed(&key).unwrap();
    assert_eq!(dependants(&kms, &key), json!([]));
    kms.ctl(&schedule(&key, &[])).unwrap();
}

#[test]
fn more_than_a_page_is_listed_whole() {
    let kms = Kms::start();
    let key = kms.create_key();
    let client = kms.client();
    for domain in 0..201 {
        let session = open(&client, domain);
        report(&session, &key, b"/srv/vault", 1, 1);
        session.close().unwrap();
    }
    let listed = dependants(&kms, &key);
    let domains: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["Domain"].as_u64().unwrap())
        .collect();
    assert_eq!(domains, (0..201).collect::<Vec<_>>());
}

#[test]
fn without_a_terminal_a_key_that_something_depends_on_is_not_scheduled_without_yes() {
    let kms = Kms::start();
    let (used, unused) = (with_dependants(&kms), kms.create_key());
    let refused = kms.ctl_command(&schedule(&used, &[])).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(refused.stdout, b"");
    let line = said(&refused);
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(
        line.starts_with(
            "ConfirmationRequired: 2 key domains of 1 volume with 1235 files, 5.0 GiB depend on key"
        ),
        "{line}"
    );
    assert!(line.contains("nothing was changed: repeat with --yes"), "{line}");
    assert_eq!(kms.state(&used), "Enabled");

    let done = kms.ctl_command(&schedule(&used, &["--yes"])).output().unwrap();
    assert!(outcome(&done).unwrap()["DeleteDate"].is_string());
    let shown = said(&done);
    for part in [
        "/srv/vault\n",
        "domain 0: 1234 files, 5.0 GiB, not mounted",
        "domain 3: 1 file, 512 bytes, not mounted",
        "2 key domains of 1 volume with 1235 files, 5.0 GiB, 0 of them mounted",
        "noise for ever after 7 days, unless 'kmsctl cancel-key-deletion'",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_eq!(kms.state(&used), "PendingDeletion");
    assert!(
        kms.ctl(&schedule(&used, &["--yes"]))
            .unwrap_err()
            .contains("Rejected.PendingDeletion")
    );

    let done = kms.ctl_command(&schedule(&unused, &[])).output().unwrap();
    assert!(outcome(&done).unwrap()["DeleteDate"].is_string());
    assert_eq!(said(&done), "");
    assert_eq!(kms.state(&unused), "PendingDeletion");
    assert_eq!(kms.code(&schedule("alias/nobody", &[])), "Forbidden.KeyNotFound");
    // What kmsd refuses in any case is not asked about.
    let days = [
        "schedule-key-deletion",
        "--key-id",
        &used,
        "--pending-window-in-days",
        "6",
    ];
    assert_eq!(kms.code(&days), "InvalidParameter");
}

/// The terminal's side, and the program's.
fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut its) = (-1, -1);
    // SAFETY: both pointers are to locals, which live as long as the call; the others may be null.
    let made = unsafe {
        libc::openpty(
            &mut ours,
            &mut its,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made these descriptors for us; nothing else owns them.
    unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(its)) }
}

/// Runs kmsctl at a terminal, where somebody types `answer`: how it ended, and what the terminal showed.
fn at_a_terminal(kms: &Kms, arguments: &[&str], answer: &str) -> (Output, String) {
    let (mut ours, its) = terminal();
    ours.write_all(answer.as_bytes()).unwrap();
    let mut ctl = kms.ctl_command(arguments);
    ctl.stdin(its.try_clone().unwrap())
        .stderr(its)
        .stdout(Stdio::piped());
    let child = ctl.spawn().unwrap();
    // The program's are the last descriptors of its side.
    drop(ctl);
    let reader = std::thread::spawn(move || {
        let (mut shown, mut buffer) = (Vec::new(), [0; 4096]);
        // EIO is the end of a terminal that nobody has open.
        while let Ok(read @ 1..) = ours.read(&mut buffer) {
            shown.extend_from_slice(&buffer[..read]);
        }
        String::from_utf8(shown).unwrap()
    });
    let output = child.wait_with_output().unwrap();
    (output, reader.join().unwrap())
}

#[test]
fn at_a_terminal_it_is_asked_whatever_depends_on_the_key() {
    let kms = Kms::start();
    let (used, unused) = (with_dependants(&kms), kms.create_key());
    // The last one is what ends an input.
    for answer in ["n\n", "\n", "yess\n", "no way, yes\n", "\u{4}"] {
        for key in [&used, &unused] {
            let (output, shown) = at_a_terminal(&kms, &schedule(key, &[]), answer);
            assert_eq!(output.status.code(), Some(1), "{answer:?}: {shown}");
            assert_eq!(output.stdout, b"");
            assert!(shown.contains("Schedule the deletion? [y/N] "), "{shown}");
            assert!(shown.contains("NotConfirmed: nothing was changed"), "{shown}");
            assert_eq!(shown.contains("domain 0: 1234 files"), key == &used);
            assert_eq!(
                shown.contains("No volume is known to depend on key"),
                key == &unused
            );
            assert_eq!(kms.state(key), "Enabled");
        }
    }
    for (key, answer, more) in [
        (&used, "y\n", &[][..]),
        (&unused, "Yes\n", &[]),
        (&with_dependants(&kms), "", &["--yes"]),
    ] {
        let (output, shown) = at_a_terminal(&kms, &schedule(key, more), answer);
        assert!(outcome(&output).unwrap()["DeleteDate"].is_string(), "{shown}");
        assert_eq!(shown.contains("[y/N]"), more.is_empty());
        assert_eq!(kms.state(key), "PendingDeletion");
    }
}

/// kmsd lists nothing without an audit log, but takes away what it is told to.
#[test]
fn without_a_log_yes_schedules_all_the_same() {
    let kms = Kms::start();
    let key = with_dependants(&kms);
    let aside = kms.home().join("aside");
    std::fs::rename(kms.log(), &aside).unwrap();
    let refused = kms.ctl(&schedule(&key, &[])).unwrap_err();
    assert_eq!(refused.lines().count(), 1, "{refused}");
    assert!(refused.starts_with("ServiceUnavailable: "), "{refused}");
    assert!(refused.ends_with("repeat with --yes\n"), "{refused}");
    let done = kms.ctl_command(&schedule(&key, &["--yes"])).output().unwrap();
    outcome(&done).unwrap();
    assert!(
        said(&done).contains("cannot be told: ServiceUnavailable"),
        "{}",
        said(&done)
    );
    std::fs::rename(&aside, kms.log()).unwrap();
    assert_eq!(kms.state(&key), "PendingDeletion");
}
