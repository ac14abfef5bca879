//! One kmsd for one test.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use kms_client::Client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

pub const KMSD: &str = env!("CARGO_BIN_EXE_kmsd");
pub const KMSCTL: &str = env!("CARGO_BIN_EXE_kmsctl");

/// A keystore, and the daemon that serves it; both end with the test.
pub struct Kms {
    directory: TempDir,
    daemon: Option<Child>,
    /// Whether the home is a mount of its own.
    tmpfs: bool,
}

impl Kms {
    /// A new keystore, served.
    pub fn start() -> Self {
        let mut kms = Self::initialized(&[]);
        kms.serve(&[]);
        kms
    }

    /// A new keystore that nobody serves yet.
    pub fn initialized(arguments: &[&str]) -> Self {
        let kms = Self {
            directory: tempfile::tempdir().unwrap(),
            daemon: None,
            tmpfs: false,
        };
        kms.init(arguments);
        kms
    }

    /// A new keystore, served, on a filesystem of its own with so many bytes.
    pub fn confined(bytes: u64) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test mounts a small tmpfs: run it as root"
        );
        let mut kms = Self {
            directory: tempfile::tempdir().unwrap(),
            daemon: None,
            tmpfs: true,
        };
        std::fs::create_dir(kms.home()).unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", kms.home(), "tmpfs", flags, Some(options.as_c_str())).unwrap();
        kms.init(&[]);
        kms.serve(&[]);
        kms
    }

    fn init(&self, arguments: &[&str]) {
        let mut init = Command::new(KMSD);
        init.arg("init").arg("--home").arg(self.home()).args(arguments);
        assert!(init.status().unwrap().success());
    }

    /// A keystore that is a copy of `home`, that nobody serves yet.
    pub fn copied(home: &Path) -> Self {
        let kms = Self {
            directory: tempfile::tempdir().unwrap(),
            daemon: None,
            tmpfs: false,
        };
        copy(home, &kms.home());
        kms
    }

    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/kmsd.sock")
    }

    pub fn log(&self) -> PathBuf {
        self.home().join("audit.log")
    }

    /// Serves the keystore; returns when the ready line was read.
    pub fn serve(&mut self, arguments: &[&str]) {
        self.start_daemon(self.command(arguments));
    }

    /// The same, logging to whatever `log` is.
    pub fn serve_logging(&mut self, log: Stdio) {
        let mut command = self.command(&[]);
        command.stderr(log);
        self.start_daemon(command);
    }

    fn start_daemon(&mut self, mut command: Command) {
        let mut daemon = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(daemon.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, format!("ready socket={}\n", self.socket().display()));
        self.daemon = Some(daemon);
    }

    /// Serves the keystore, which must fail; gives what it said.
    pub fn serve_fails(&self) -> String {
        self.serve_fails_with(&[])
    }

    pub fn serve_fails_with(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(!output.status.success());
        assert_eq!(output.stdout, b"");
        String::from_utf8(output.stderr).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut serve = Command::new(KMSD);
        serve.env("RUST_LOG", "warn").arg("serve").args(arguments);
        serve
            .arg("--home")
            .arg(self.home())
            .arg("--socket")
            .arg(self.socket());
        serve
    }

    /// Ends the daemon by SIGTERM, which must succeed.
    pub fn stop(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
        assert!(daemon.wait().unwrap().success());
    }

    /// Ends the daemon as a power cut would, but for the page cache.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    pub fn restart(&mut self) {
        self.stop();
        self.serve(&[]);
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket(), Duration::from_secs(20)).unwrap()
    }

    /// kmsctl, as a shell runs it: its JSON, or its standard error.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Value, String> {
        outcome(&self.ctl_command(arguments).output().unwrap())
    }

    /// kmsctl, to be run.
    pub fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut ctl = Command::new(KMSCTL);
        ctl.arg("--socket").arg(self.socket()).args(arguments);
        ctl
    }

    /// A call that must fail, and its code.
    pub fn code(&self, arguments: &[&str]) -> String {
        let error = self.ctl(arguments).unwrap_err();
        error.split_once(": ").unwrap().0.to_owned()
    }

    pub fn create_key(&self) -> String {
        text(&self.ctl(&["create-key"]).unwrap()["KeyMetadata"]["KeyId"])
    }

    pub fn state(&self, key: &str) -> String {
        text(&self.ctl(&["describe-key", "--key-id", key]).unwrap()["KeyMetadata"]["KeyState"])
    }

    /// A base64 blob of base64 plaintext.
    pub fn encrypt(&self, key: &str, plaintext: &str, context: &str) -> String {
        let arguments = [
            "encrypt",
            "--key-id",
            key,
            "--plaintext",
            plaintext,
            "--encryption-context",
            context,
        ];
        text(&self.ctl(&arguments).unwrap()["CiphertextBlob"])
    }

    /// The base64 plaintext of a base64 blob.
    pub fn decrypt(&self, blob: &str, context: &str) -> Result<String, String> {
        let arguments = [
            "decrypt",
            "--ciphertext-blob",
            blob,
            "--encryption-context",
            context,
        ];
        self.ctl(&arguments).map(|answer| text(&answer["Plaintext"]))
    }

    pub fn verify(&self) -> Result<Value, String> {
        self.ctl(&["audit", "verify", "--home", self.home().to_str().unwrap()])
    }
}

#[allow(dead_code, reason = "not every target has the daemon killed by others")]
impl Kms {
    /// Serves the keystore by a command that is prepared.
    pub fn serve_by(&mut self, prepare: impl FnOnce(Command) -> Command) {
        self.start_daemon(prepare(self.command(&[])));
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// Whether the daemon has ended.
    pub fn has_ended(&mut self) -> bool {
        self.daemon.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    /// Waits until the daemon has ended by SIGKILL, which others sent.
    pub fn killed(&mut self) {
        let status = self.daemon.take().unwrap().wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
    }

    /// Serves the keystore until the ready line, or until others kill the daemon before; whether it was the former.
    pub fn serve_or_be_killed(&mut self, prepare: impl FnOnce(Command) -> Command) -> bool {
        let mut command = prepare(self.command(&[]));
        let mut daemon = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(daemon.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        self.daemon = Some(daemon);
        if line.is_empty() {
            self.killed();
        }
        !line.is_empty()
    }
}

impl Drop for Kms {
    fn drop(&mut self) {
        if self.daemon.is_some() && !std::thread::panicking() {
            self.stop();
        } else if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if self.tmpfs {
            let _ = rustix::mount::unmount(self.home(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

pub fn outcome(output: &Output) -> Result<Value, String> {
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).unwrap());
    }
    assert_eq!(output.stdout, b"");
    Err(String::from_utf8(output.stderr.clone()).unwrap())
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

pub fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

pub fn bytes(base64: &str) -> Vec<u8> {
    BASE64_STANDARD.decode(base64).unwrap()
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Whether any file under `directory` holds `needle`.
pub fn holds(directory: &Path, needle: &[u8]) -> bool {
    any_file(directory, &mut |content| {
        content.windows(needle.len()).any(|window| window == needle)
    })
}

/// Whether any file under `directory` holds one of many keys.
pub fn holds_any(directory: &Path, keys: &[[u8; 32]]) -> bool {
    // By their beginnings: eight bytes that meet by chance would be a failure to look into.
    let beginnings: HashSet<&[u8]> = keys.iter().map(|key| &key[..8]).collect();
    any_file(directory, &mut |content| {
        content.windows(8).any(|window| beginnings.contains(window))
    })
}

fn any_file(directory: &Path, is_it: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    directory.read_dir().unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => any_file(&path, is_it),
            false => is_it(&std::fs::read(path).unwrap()),
        }
    })
}
