//! A kmsd, a key, a volume and its mount in a scratch directory, all of them taken down whatever happens.

use crate::program::program;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for something that must come about; no test's outcome depends on how soon it does.
const LIMIT: Duration = Duration::from_secs(60);

/// Everything a test needs.
pub struct World {
    kmsd: Option<Child>,
    mount: Option<Child>,
    pub key: String,
    scratch: TempDir,
}

/// Waits until `holds`.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < LIMIT,
            "within a minute it was never so that {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl World {
    /// A mounted volume.
    pub fn new() -> Self {
        let mut world = Self::unmounted();
        world.mount(&[]);
        world
    }

    /// A volume that is not mounted.
    pub fn unmounted() -> Self {
        let world = Self::without_volume();
        world.create_volume();
        world
    }

    /// A kmsd with a key.
    pub fn without_volume() -> Self {
        Self::with_keystore(&[])
    }

    /// The same, whose clock can be moved.
    pub fn with_drill_clock() -> Self {
        Self::with_keystore(&["--drill"])
    }

    fn with_keystore(options: &[&str]) -> Self {
        let fuse = File::options().read(true).write(true).open("/dev/fuse");
        fuse.expect_fuse();
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount, change owners and users: run them as root"
        );
        let scratch = tempfile::tempdir().unwrap();
        let mut world = Self {
            kmsd: None,
            mount: None,
            key: String::new(),
            scratch,
        };
        // Tests act as other users in the mount.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(world.path(""), mode).unwrap();
        std::fs::create_dir(world.mnt()).unwrap();
        let home = world.keystore();
        let init = Command::new(program("kmsd"))
            .arg("init")
            .arg("--home")
            .arg(home)
            .args(options)
            .output()
            .unwrap();
        assert!(init.status.success(), "{init:?}");
        world.start_kmsd();
        world.key = world.create_key();
        world
    }

    /// Another key's id.
    pub fn create_key(&self) -> String {
        let created = self.kmsctl(&["create-key"]).unwrap();
        created["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned()
    }

    /// Makes the volume.
    pub fn create_volume(&self) {
        self.cmkfs_ok(&["create", self.volume().to_str().unwrap(), "--key-id", &self.key]);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub fn volume(&self) -> PathBuf {
        self.path("volume")
    }

    pub fn keystore(&self) -> PathBuf {
        self.path("keystore")
    }

    pub fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// A path in the mount.
    pub fn at(&self, name: &str) -> PathBuf {
        self.mnt().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("kmsd.sock")
    }

    pub fn start_kmsd(&mut self) {
        self.start_kmsd_by(self.kmsd_command());
    }

    /// What starts kmsd.
    pub fn kmsd_command(&self) -> Command {
        let mut command = Command::new(program("kmsd"));
        command
            .args(["serve", "--home", self.keystore().to_str().unwrap()])
            .args(["--socket", self.socket().to_str().unwrap()]);
        command
    }

    /// Starts kmsd in another way, which leads to the same process.
    pub fn start_kmsd_by(&mut self, mut command: Command) {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        self.kmsd = Some(child);
        assert!(line.contains("ready"), "kmsd said '{line}'");
    }

    /// Sends a signal to kmsd.
    pub fn signal_kmsd(&self, signal: i32) {
        send(self.kmsd.as_ref().unwrap(), signal);
    }

    /// Stops kmsd, in order or with SIGKILL.
    pub fn stop_kmsd(&mut self, signal: i32) {
        end(self.kmsd.take().unwrap(), signal);
    }

    /// An operation of kmsctl: its JSON, or its line of error.
    pub fn kmsctl(&self, arguments: &[&str]) -> Result<Value, String> {
        let output = Command::new(program("kmsctl"))
            .arg("--socket")
            .arg(self.socket())
            .args(arguments)
            .output()
            .unwrap();
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(String::from_utf8(output.stderr).unwrap())
        }
    }

    pub fn with_key(&self, operation: &str) {
        self.kmsctl(&[operation, "--key-id", &self.key]).unwrap();
    }

    pub fn cmkfs(&self, arguments: &[&str]) -> Output {
        Command::new(program("cmkfs"))
            .arg("--socket")
            .arg(self.socket())
            .args(arguments)
            .output()
            .unwrap()
    }

    pub fn cmkfs_ok(&self, arguments: &[&str]) -> String {
        let output = self.cmkfs(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Mounts in the foreground of a child, so that its pid is known.
    pub fn mount(&mut self, options: &[&str]) {
        let log = File::create(self.path("mount.log")).unwrap();
        self.mount_with_log(options, log.into());
        // Until then the daemon itself looks at the mount.
        eventually("the mount says that it is there", || {
            self.log().contains("the volume is mounted")
        });
    }

    /// The same, logging to whatever `log` is.
    pub fn mount_with_log(&mut self, options: &[&str], log: Stdio) {
        let child = Command::new(program("cmkfs"))
            .arg("--socket")
            .arg(self.socket())
            .args(["mount", "--foreground"])
            .env("CMKFS_LOG", "trace")
            .args(options)
            .args([self.volume(), self.mnt()])
            .stderr(log)
            .spawn()
            .unwrap();
        self.mount = Some(child);
        eventually("the volume is mounted", || {
            let ended = self.mount.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{}", self.log());
            self.is_mounted()
        });
    }

    /// Whether a volume is mounted on the mount point, or anywhere below the scratch directory.
    pub fn is_mounted(&self) -> bool {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let scratch = self.path("");
        let ours = |line: &str| line.contains(scratch.to_str().unwrap()) && line.contains(" fuse.cmkfs ");
        table.lines().any(ours)
    }

    /// The process that serves the mount.
    pub fn mount_pid(&self) -> u32 {
        self.mount.as_ref().unwrap().id()
    }

    /// The key management service.
    pub fn kmsd_pid(&self) -> u32 {
        self.kmsd.as_ref().unwrap().id()
    }

    /// What the mounting process logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("mount.log")).unwrap_or_default()
    }

    /// Unmounts in order; the process must end well. A child that another test's thread is about to start has copies of
    /// this process's descriptors until it calls execve(2), those of files in this mount among them: it is busy for
    /// that long.
    pub fn unmount(&mut self) {
        eventually("the mount is not in use", || {
            let output = self.cmkfs(&["umount", self.mnt().to_str().unwrap()]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() || said.contains("in use"), "{said}");
            output.status.success()
        });
        let status = self.mount.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status:?}: {}", self.log());
        assert!(!self.log().contains("refers to the volume still"));
    }

    pub fn key_state(&self) -> String {
        self.state_of_key(&self.key)
    }

    pub fn state_of_key(&self, key: &str) -> String {
        let described = self.kmsctl(&["describe-key", "--key-id", key]).unwrap();
        described["KeyMetadata"]["KeyState"].as_str().unwrap().to_owned()
    }

    /// Unmounts lazily.
    pub fn detach(&self) {
        detach(&self.mnt());
    }

    /// Takes a mount that nobody serves any more out of the tree.
    pub fn clear_mountpoint(&self) {
        self.detach();
        assert!(!self.is_mounted());
    }

    /// Sends a signal to the mounting process.
    pub fn signal_mount(&self, signal: i32) {
        send(self.mount.as_ref().unwrap(), signal);
    }

    /// Waits for the end of the mounting process.
    pub fn wait_for_mount(&mut self) -> std::process::ExitStatus {
        self.mount.take().unwrap().wait().unwrap()
    }

    /// Sends a signal to the mounting process and waits for its end.
    pub fn end_mount(&mut self, signal: i32) -> std::process::ExitStatus {
        let status = end(self.mount.take().unwrap(), signal);
        if signal == libc::SIGKILL {
            assert_eq!(status.signal(), Some(libc::SIGKILL));
            detach(&self.mnt());
        }
        status
    }

    /// Calls of kmsd's operations that give keys, so far.
    pub fn key_calls(&self) -> u64 {
        let metrics = self.kmsctl(&["get-metrics"]).unwrap();
        let calls = |operation: &str| {
            find_object(&metrics, operation)
                .and_then(|of| of["Calls"].as_u64())
                .unwrap_or(0)
        };
        calls("IssueDataKeys") + calls("OpenDataKeys")
    }
}

fn find_object<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    let object = value.as_object()?;
    object
        .get(name)
        .or_else(|| object.values().find_map(|inner| find_object(inner, name)))
}

trait ExpectFuse {
    fn expect_fuse(self);
}

impl ExpectFuse for std::io::Result<File> {
    fn expect_fuse(self) {
        if let Err(error) = self {
            panic!("/dev/fuse cannot be opened ({error}): scripts/setup.sh says how to get it");
        }
    }
}

fn send(child: &Child, signal: i32) {
    let pid = rustix::process::Pid::from_child(child);
    let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn end(mut child: Child, signal: i32) -> std::process::ExitStatus {
    send(&child, signal);
    child.wait().unwrap()
}

pub fn detach(mountpoint: &Path) {
    let flags = rustix::mount::UnmountFlags::DETACH;
    match rustix::mount::unmount(mountpoint, flags) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(errno) => eprintln!("{} stays mounted: {errno}", mountpoint.display()),
    }
}

impl Drop for World {
    fn drop(&mut self) {
        detach(&self.mnt());
        for mut child in [self.mount.take(), self.kmsd.take()].into_iter().flatten() {
            if child.kill().is_err() || child.wait().is_err() {
                eprintln!("a child of the test is left behind");
            }
        }
        if std::thread::panicking() {
            eprintln!("the mount's log:\n{}", self.log());
        }
    }
}

/// The errno of a failed operation.
pub fn errno<T>(result: std::io::Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap(),
    }
}

/// Bytes that differ between seeds and positions.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| step()).collect()
}
