//! The daemon as a process: its home, its socket, its end.

use crate::fixture::{KMSCTL, KMSD, Kms, base64, holds, outcome};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn init_refuses_a_home_that_is_not_empty() {
    let kms = Kms::initialized(&[]);
    let before = std::fs::read(kms.home().join("slot-1")).unwrap();
    let again = Command::new(KMSD)
        .arg("init")
        .arg("--home")
        .arg(kms.home())
        .output()
        .unwrap();
    assert!(!again.status.success());
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(said.contains("is not empty"), "{said}");
    assert_eq!(said.lines().count(), 1);
    assert_eq!(std::fs::read(kms.home().join("slot-1")).unwrap(), before);
    assert_eq!(kms.home().metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn init_refuses_a_region_that_no_arn_could_carry() {
    let home = tempfile::tempdir().unwrap();
    for (region, account) in [("", "1"), ("a:b", "1"), ("A", "1"), ("a", ""), ("a", "x")] {
        let mut init = Command::new(KMSD);
        init.arg("init").arg("--home").arg(home.path().join("h"));
        init.arg(format!("--region={region}"))
            .arg(format!("--account={account}"));
        assert!(!init.output().unwrap().status.success(), "{region} {account}");
        assert!(!home.path().join("h").exists());
    }
}

#[test]
fn a_home_that_is_none_is_named() {
    let home = tempfile::tempdir().unwrap();
    let mut serve = Command::new(KMSD);
    let output = serve
        .arg("serve")
        .arg("--home")
        .arg(home.path().join("none"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(
        said.contains("is not a keystore; make one with 'kmsd init --home"),
        "{said}"
    );
}

#[test]
fn it_starts_within_a_second_and_serves_one_home_once() {
    let mut kms = Kms::initialized(&[]);
    let begun = Instant::now();
    kms.serve(&[]);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let said = kms.serve_fails();
    assert!(said.contains("another kmsd serves"), "{said}");
    assert_eq!(said.lines().count(), 1);
    kms.create_key();
}

/// Programs that keep every processor busy are not to put off the end of what they see.
#[test]
fn every_thread_that_serves_goes_before_other_programs() {
    let kms = Kms::start();
    assert!(
        rustix::process::geteuid().is_root(),
        "a priority is taken as root"
    );
    // A call has the threads started that serve calls.
    kms.create_key();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", kms.pid())).unwrap();
    let of_task = |task: PathBuf| {
        let stat = std::fs::read_to_string(task.join("stat")).unwrap();
        let (name, rest) = stat.rsplit_once(')').unwrap();
        // Field 19 of /proc/PID/stat, the third behind the name.
        let nice: i32 = rest.split_ascii_whitespace().nth(16).unwrap().parse().unwrap();
        (name.to_owned(), nice)
    };
    let nices: Vec<_> = tasks.map(|task| of_task(task.unwrap().path())).collect();
    let (log, others): (Vec<_>, Vec<_>) = nices.into_iter().partition(|(name, _)| name.contains("tracing"));
    assert!(log.len() <= 1 && others.len() > 2, "{log:?} {others:?}");
    assert!(others.iter().all(|(_, nice)| *nice == -10), "{others:?}");
}

#[test]
fn the_socket_is_the_owner_s_alone_and_goes_with_the_daemon() {
    let mut kms = Kms::start();
    let mode = |path: std::path::PathBuf| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(kms.socket()), 0o600);
    assert_eq!(mode(kms.socket().parent().unwrap().to_owned()), 0o700);
    kms.stop();
    assert!(!kms.socket().exists());
    let said = kms.ctl(&["list-keys"]).unwrap_err();
    assert!(said.starts_with("ServiceUnavailable: "), "{said}");
    kms.serve(&["--socket-mode", "0660"]);
    assert_eq!(mode(kms.socket()), 0o660);
}

#[test]
fn the_socket_of_a_dead_daemon_is_replaced_and_a_file_is_not() {
    let mut kms = Kms::start();
    kms.kill();
    assert!(kms.socket().exists());
    kms.serve(&[]);
    kms.create_key();
    kms.stop();
    std::fs::write(kms.socket(), b"precious").unwrap();
    let said = kms.serve_fails();
    assert!(said.contains("is no socket"), "{said}");
    assert_eq!(std::fs::read(kms.socket()).unwrap(), b"precious");
}

#[test]
fn a_client_outlives_a_restart_of_the_daemon() {
    let mut kms = Kms::start();
    let key = kms.create_key();
    let client = kms.client();
    assert_eq!(client.describe_key(&key).unwrap().key_id, key);
    kms.restart();
    assert_eq!(client.describe_key(&key).unwrap().key_id, key);
    kms.kill();
    assert!(matches!(
        client.describe_key(&key),
        Err(kms_client::ClientError::Unreachable(_))
    ));
    kms.serve(&[]);
    assert_eq!(client.describe_key(&key).unwrap().key_id, key);
}

#[test]
fn nothing_that_is_secret_lies_in_the_home_in_the_clear() {
    let mut kms = Kms::start();
    let (alias, description, secret) = (
        "alias/payroll-of-the-east",
        "opens the vault of Mr Quill",
        b"tell nobody",
    );
    let answer = kms.ctl(&["create-key", "--description", description]).unwrap();
    let key = crate::fixture::text(&answer["KeyMetadata"]["KeyId"]);
    kms.ctl(&["create-alias", "--alias-name", alias, "--key-id", &key])
        .unwrap();
    kms.ctl(&["describe-key", "--key-id", alias]).unwrap();
    kms.code(&["describe-key", "--key-id", "alias/payroll-of-the-west"]);
    kms.encrypt(alias, &base64(secret), "{}");
    let data_key = kms.ctl(&["generate-data-key", "--key-id", alias]).unwrap();
    let data_key = crate::fixture::bytes(data_key["Plaintext"].as_str().unwrap());
    let needles: [&[u8]; 5] = [
        &alias.as_bytes()[6..],
        description.as_bytes(),
        secret,
        &data_key,
        b"of-the-west",
    ];
    for running in [true, false] {
        for needle in needles {
            assert!(
                !holds(&kms.home(), needle),
                "running {running}: {}",
                String::from_utf8_lossy(needle)
            );
        }
        // The search finds what is there: key ids are no secret.
        assert!(holds(&kms.home(), key.as_bytes()));
        if running {
            kms.stop();
        }
    }
}

/// Needs root, to become somebody else; a run as another user has nothing to test here.
#[test]
fn a_stranger_is_refused_and_cannot_fill_the_log() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut kms = Kms::initialized(&[]);
    kms.serve(&["--socket-mode", "0666"]);
    let key = kms.create_key();
    let open = || std::fs::Permissions::from_mode(0o755);
    let run = kms.socket().parent().unwrap().to_owned();
    let kmsctl = run.join("kmsctl");
    std::fs::copy(KMSCTL, &kmsctl).unwrap();
    for path in [&kmsctl, &run, &run.parent().unwrap().to_owned()] {
        std::fs::set_permissions(path, open()).unwrap();
    }
    let before = kms.verify().unwrap()["Records"].as_u64().unwrap();
    for uid in [12_345, 65_534] {
        for _ in 0..5 {
            let mut ctl = Command::new(&kmsctl);
            ctl.arg("--socket")
                .arg(kms.socket())
                .args(["disable-key", "--key-id", &key]);
            let said = outcome(&ctl.uid(uid).gid(uid).output().unwrap()).unwrap_err();
            assert!(said.starts_with("Forbidden.NoPermission: "), "{said}");
        }
    }
    assert_eq!(kms.state(&key), "Enabled");
    let after = kms.verify().unwrap()["Records"].as_u64().unwrap();
    assert_eq!(
        after,
        before + 4,
        "one record for each stranger, and both of describe-key"
    );
    kms.stop();
    // What was not recorded one by one is recorded as a number at the end.
    assert_eq!(kms.verify().unwrap()["Records"].as_u64().unwrap(), after + 2);
}

/// Takes all the room that is left below a directory.
fn fill(directory: &Path) -> PathBuf {
    let path = directory.join("fill");
    let mut length = 1 << 20;
    while length >= 512 {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        if std::io::Write::write_all(&mut file, &vec![7; length]).is_err() {
            length /= 2;
        }
    }
    path
}

/// Gives back the space that was taken behind a file's end.
fn trim(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len()).unwrap();
}

/// Takes all space, and what the database had taken for its logs.
fn starve_database(home: &Path) -> PathBuf {
    for entry in std::fs::read_dir(home.join("db")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "log") {
            trim(&path);
        }
    }
    fill(home)
}

/// Makes keys until one cannot be made, and says why; space that was taken ahead is used up first.
fn exhaust(kms: &Kms) -> String {
    let refused = (0..2000).find_map(|_| kms.ctl(&["create-key"]).err());
    refused.unwrap().split(": ").next().unwrap().to_owned()
}

#[test]
fn a_key_is_disabled_on_a_full_disk_and_service_resumes_when_there_is_room() {
    // There has to be room for the reserve beside what the database takes.
    let mut kms = Kms::confined(64 << 20);
    let (key, other) = (kms.create_key(), kms.create_key());
    let blob = kms.encrypt(&other, &base64(b"plain"), "{}");
    let filling = starve_database(&kms.home());
    assert_eq!(exhaust(&kms), "InternalFailure");
    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();

    std::fs::remove_file(filling).unwrap();
    assert_eq!(kms.state(&key), "Disabled");
    assert_eq!(
        kms.code(&["encrypt", "--key-id", &key, "--plaintext", "AAAA"]),
        "Rejected.Disabled"
    );
    assert_eq!(kms.decrypt(&blob, "{}").unwrap(), base64(b"plain"));
    kms.create_key();
    // And the next time: the reserve is there again.
    let reserve = std::fs::metadata(kms.home().join("reserve")).unwrap();
    assert!(reserve.len() > 0 && reserve.blocks() * 512 >= reserve.len());
    let filling = starve_database(&kms.home());
    assert_eq!(exhaust(&kms), "InternalFailure");
    kms.ctl(&["disable-key", "--key-id", &other]).unwrap();
    std::fs::remove_file(filling).unwrap();
    kms.restart();
    assert_eq!(kms.state(&key), "Disabled");
    assert_eq!(kms.state(&other), "Disabled");
    kms.verify().unwrap();
}

#[test]
fn a_key_that_cannot_be_disabled_for_good_is_refused_for_now_and_the_next_attempt_makes_it_last() {
    for operation in [
        vec!["disable-key"],
        // What depends on the key cannot be told then.
        vec!["schedule-key-deletion", "--pending-window-in-days", "7", "--yes"],
    ] {
        let mut kms = Kms::confined(48 << 20);
        let key = kms.create_key();
        let arguments = [operation.clone(), vec!["--key-id", &key]].concat();
        std::fs::remove_file(kms.home().join("reserve")).unwrap();
        let filling = starve_database(&kms.home());
        assert_eq!(exhaust(&kms), "InternalFailure");
        // Nor can it be opened anew.
        let (database, aside) = (kms.home().join("db"), kms.home().join("aside"));
        std::fs::rename(&database, &aside).unwrap();
        assert!(kms.ctl(&arguments).is_err());
        assert_ne!(kms.state(&key), "Enabled");

        // RocksDB made a directory before it found no database in it.
        std::fs::remove_dir_all(&database).unwrap();
        std::fs::rename(&aside, &database).unwrap();
        std::fs::remove_file(filling).unwrap();
        assert_ne!(kms.state(&key), "Enabled");
        let again = kms.ctl(&arguments);
        // The one is repeated, the other refused because it is so already: in either case it is stored.
        let already = "Rejected.PendingDeletion";
        assert!(again.is_ok() || again.unwrap_err().lines().any(|line| line.starts_with(already)));
        kms.kill();
        kms.serve(&[]);
        assert_ne!(kms.state(&key), "Enabled");
    }
}

#[test]
fn a_change_whose_record_finds_no_room_is_refused_and_a_revocation_is_not() {
    // Large enough for RocksDB to have taken space ahead, which outlasts the audit log's.
    let kms = Kms::confined(96 << 20);
    let key = kms.create_key();
    let filling = fill(&kms.home());
    assert_eq!(exhaust(&kms), "ServiceUnavailable");
    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();
    std::fs::remove_file(filling).unwrap();
    assert_eq!(kms.state(&key), "Disabled");
    kms.create_key();
}

#[test]
fn a_daemon_that_was_killed_on_a_full_disk_starts_on_it_and_disables_keys() {
    let mut kms = Kms::confined(48 << 20);
    let key = kms.create_key();
    for _ in 0..50 {
        kms.create_key();
    }
    kms.kill();
    let filling = fill(&kms.home());
    kms.serve(&[]);
    kms.ctl(&["disable-key", "--key-id", &key]).unwrap();
    kms.kill();
    std::fs::remove_file(filling).unwrap();
    kms.serve(&[]);
    assert_eq!(kms.state(&key), "Disabled");
}

#[test]
fn a_log_that_cannot_be_written_ends_no_call() {
    let mut kms = Kms::initialized(&[]);
    let (reader, log) = std::io::pipe().unwrap();
    drop(reader);
    kms.serve_logging(log.into());
    let key = kms.create_key();
    let aside = kms.home().join("aside");
    std::fs::rename(kms.log(), &aside).unwrap();
    // Each is worth a line in the log, written by the thread that writes the audit log.
    for _ in 0..3 {
        assert_eq!(kms.code(&["list-keys"]), "ServiceUnavailable");
    }
    std::fs::rename(&aside, kms.log()).unwrap();
    assert_eq!(kms.state(&key), "Enabled");
}
