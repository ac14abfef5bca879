//! `cmkfs drill`: that it holds, that it fails when it should, and that nothing of it stays.

use crate::program::program;
use crate::world::{World, eventually};
use cmkfs::adapters::drill::sign::PublicKey;
use cmkfs::adapters::drill::verify::verify;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const NONCE: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const QUICK: &[&str] = &["--size-mib", "1", "--observe-ms", "200"];

/// Where a drill puts its scratch directory, its report, its page and its key.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Self { dir };
        fs::create_dir(place.scratch()).unwrap();
        for path in [place.dir.path(), &place.scratch()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let made = Command::new(program("cmkfs"))
            .args(["drill", "keygen", &place.file("key")])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        place
    }

    fn scratch(&self) -> std::path::PathBuf {
        self.dir.path().join("scratch")
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A drill with this program.
    fn command(&self, cmkfs: &Path) -> Command {
        let mut command = Command::new(cmkfs);
        command
            .arg("drill")
            .args(QUICK)
            .args(["--nonce", NONCE, "--operator", "the tests"])
            .args(["--signing-key", &self.file("key")])
            .args(["--report", &self.file("report.json")])
            .args(["--html", &self.file("report.html")])
            .env("TMPDIR", self.scratch())
            .stdin(Stdio::null());
        command
    }

    /// Its report, as a verifier with the public key and the nonce takes it.
    fn report(&self) -> Value {
        let verified = Command::new(program("cmkfs"))
            .args(["drill", "verify", &self.file("report.json"), "--nonce", NONCE])
            .args(["--key", &self.file("key.pub")])
            .output()
            .unwrap();
        let said = String::from_utf8(verified.stdout).unwrap();
        assert!(
            said.starts_with("genuine drill report"),
            "{said}{:?}",
            verified.stderr
        );
        let file: Value = serde_json::from_slice(&fs::read(self.file("report.json")).unwrap()).unwrap();
        file["report"].clone()
    }

    /// Nothing lies in the scratch directory, is mounted there, or runs from there.
    fn assert_nothing_is_left(&self) {
        let scratch = self.scratch();
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
        let name = scratch.to_str().unwrap();
        assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(name));
        for process in fs::read_dir("/proc").unwrap() {
            let command = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            assert!(!command.contains(name), "left behind: {command}");
        }
    }
}

fn result_of<'r>(report: &'r Value, id: &str) -> &'r str {
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == id);
    check.unwrap_or_else(|| panic!("no check {id}"))["result"]
        .as_str()
        .unwrap()
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn a_scratch_drill_holds_and_its_report_says_what_it_must() {
    let place = Place::new();
    let output = place.command(&program("cmkfs")).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    // Quiet in a pipe.
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(out.lines().count() == 1 && out.contains("INCOMPLETE"), "{out}");
    place.assert_nothing_is_left();

    let report = place.report();
    assert_eq!(report["result"], "INCOMPLETE");
    assert_eq!(report["document"], "drill report");
    assert_eq!(report["nonce"], NONCE);
    assert_eq!(report["operator"], "the tests");
    assert_eq!(report["erasure"], "none");
    assert!(report["clock"].as_str().unwrap().starts_with("TEST CLOCK"));
    for field in [
        "media",
        "method",
        "always_encrypted",
        "key_hierarchy",
        "witness",
        "time",
        "tool",
        "not_a_destruction_record",
    ] {
        assert!(!report[field].is_null(), "{field}");
    }
    for field in ["origin", "strength_bits", "version"] {
        assert!(!report["key"][field].is_null(), "key: {field}");
    }
    assert!(
        report["algorithms"]
            .as_str()
            .unwrap()
            .contains("not a NIST-approved mode")
    );
    assert!(report["algorithms"].as_str().unwrap().contains("not validated"));
    assert_eq!(
        report["known_copies"]["unknown"],
        "unknown copies are not covered"
    );
    for id in [
        "markers-written",
        "revocation-live",
        "revocation-stopped",
        "revocation-killed",
        "memory-mount-before",
        "memory-mount-after",
        "memory-kmsd-before",
        "memory-kmsd-after",
        "volume-search",
        "restored",
        "access-restored",
        "restored-after-stop",
        "restored-after-kill",
        "destroyed",
        "mount-refused",
        "recovery-without-old-slot",
        "recovery-control-survivor",
        "recovery-control-old-slot",
    ] {
        assert_eq!(result_of(&report, id), "PASS", "{id}");
    }
    for id in ["erasure", "tpm", "token", "kernel-memory"] {
        assert_eq!(result_of(&report, id), "NOT TESTED", "{id}");
    }
    for log in report["logs"].as_array().unwrap() {
        assert!(log["lines"].as_array().unwrap().len() > 100);
    }

    let page = fs::read_to_string(place.file("report.html")).unwrap();
    assert_eq!(page.matches("<svg ").count(), 3);
    assert!(page.contains("This is not a destruction record") && page.contains("Erasure = none"));
    // Self-contained: no address but the name of SVG's namespace.
    assert_eq!(
        page.matches("http").count(),
        page.matches("http://www.w3.org/2000/svg").count()
    );
    let file = fs::read(place.file("report.json")).unwrap();
    for text in [page, String::from_utf8(file.clone()).unwrap()] {
        let text = text.to_lowercase();
        assert!(!text.contains("purge") && !text.contains("for ever") && !text.contains("forever"));
    }

    let key = PublicKey::read(&place.file("key.pub")).unwrap();
    verify(&file, key, None).unwrap();
    for part in 0..48 {
        let at = part * (file.len() - 1) / 47;
        let mut changed = file.clone();
        changed[at] ^= 1;
        assert!(verify(&changed, key, None).is_err(), "byte {at}");
    }
}

/// As if the old slot's content had not been withheld: the recovery program comes by it.
#[test]
fn a_drill_whose_old_slot_leaks_fails_and_says_so() {
    let place = Place::new();
    let programs = place.dir.path().join("programs");
    fs::create_dir(&programs).unwrap();
    fs::set_permissions(&programs, fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["cmkfs", "kmsd"] {
        fs::copy(program(name), programs.join(name)).unwrap();
    }
    let script = format!(
        "#!/bin/sh\nfor argument; do case $argument in */copies/before/keystore) of=${{argument%/copies/before/keystore}};; \
         esac; done\nexec {} \"$@\" --slot \"$of/withheld/slot-1\"\n",
        program("cmkfs-recover").display()
    );
    let recover = programs.join("cmkfs-recover");
    fs::write(&recover, script).unwrap();
    fs::set_permissions(&recover, fs::Permissions::from_mode(0o755)).unwrap();

    let output = place.command(&programs.join("cmkfs")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("drill: FAILED"), "{}", said(&output));
    place.assert_nothing_is_left();
    let report = place.report();
    assert_eq!(report["result"], "FAILED");
    assert_eq!(result_of(&report, "recovery-without-old-slot"), "FAIL");
    assert_eq!(result_of(&report, "revocation-live"), "PASS");
}

#[test]
fn an_interrupted_drill_leaves_nothing_behind_and_does_not_pass() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let place = Place::new();
        let mut drill = place
            .command(&program("cmkfs"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let name = place.scratch().to_str().unwrap().to_owned();
        eventually("the drill has mounted", || {
            fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .contains(&name)
        });
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&drill), signal).unwrap();
        assert_eq!(drill.wait().unwrap().code(), Some(1));
        place.assert_nothing_is_left();
        let report = place.report();
        assert_eq!(report["result"], "FAILED");
        assert_eq!(result_of(&report, "drill-complete"), "FAIL");
    }
}

#[test]
fn a_drill_on_a_volume_in_use_undoes_all_it_does() {
    let world = World::new();
    let place = Place::new();
    fs::write(world.at("mine"), b"content of a user").unwrap();
    let volume = world.volume();
    let refused = world.cmkfs(&["drill", volume.to_str().unwrap()]);
    assert!(
        !refused.status.success() && said(&refused).contains("--yes"),
        "{}",
        said(&refused)
    );
    assert_eq!(world.key_state(), "Enabled");

    let (report, key) = (place.file("report.json"), place.file("key"));
    let mut arguments = vec!["drill", volume.to_str().unwrap(), "--yes", "--nonce", NONCE];
    arguments.extend(QUICK);
    arguments.extend(["--report", &report, "--signing-key", &key]);
    let output = world.cmkfs(&arguments);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(world.key_state(), "Enabled");
    let left: Vec<_> = fs::read_dir(world.mnt())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["mine"]);
    assert_eq!(fs::read(world.at("mine")).unwrap(), b"content of a user");
    let report = place.report();
    assert_eq!(report["result"], "INCOMPLETE");
    for id in [
        "revocation-live",
        "restored",
        "access-restored",
        "volume-search",
        "memory-mount-after",
    ] {
        assert_eq!(result_of(&report, id), "PASS", "{id}");
    }
    for id in ["destroyed", "revocation-killed", "recovery-without-old-slot"] {
        assert_eq!(result_of(&report, id), "NOT TESTED", "{id}");
    }
}

#[test]
fn what_is_asked_for_wrongly_is_named_in_one_line_and_nothing_is_done() {
    let place = Place::new();
    let volume = place.file("no-volume");
    for (arguments, named) in [
        (vec!["--nonce", "12"], "--nonce 12"),
        (vec!["--signing-key", "/nonexistent/key"], "/nonexistent/key"),
        (vec!["--report", "/nonexistent/report"], "/nonexistent"),
        (vec![volume.as_str(), "--yes"], "no-volume"),
        (
            vec!["verify", "/nonexistent/report", "--key", NONCE],
            "/nonexistent/report",
        ),
        (vec!["verify", "/etc/hostname", "--key", NONCE], "/etc/hostname"),
        (
            vec!["verify", "/etc/hostname", "--key", "/etc/hostname"],
            "public key /etc/hostname",
        ),
    ] {
        let output = Command::new(program("cmkfs"))
            .arg("drill")
            .args(&arguments)
            .env("TMPDIR", place.scratch())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(
            said.lines().count() == 1 && said.contains(named),
            "{arguments:?}: {said}"
        );
    }
    place.assert_nothing_is_left();
}
