//! A machine with that disk: ext4 on a loop device, kmsd and cmkfs on it. It is taken down whatever happens.

use crate::disk::{Disk, FILE_NAME, Image};
use crate::oracle::{Seen, Violation, failed};
use crate::program::program;
use fuser::BackgroundSession;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for something that must come about; no outcome depends on how soon it does.
const LIMIT: Duration = Duration::from_secs(60);

/// What can be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    Kmsd,
    Mount,
}

pub struct Machine {
    pub disk: Disk,
    session: Option<BackgroundSession>,
    loop_device: String,
    kmsd: Mutex<Option<Child>>,
    mount: Mutex<Option<Child>>,
    scratch: TempDir,
}

fn run(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Result<String, Violation> {
    let mut command = Command::new(program);
    command.args(arguments);
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    match status.success() {
        true => Ok(String::from_utf8(stdout).unwrap()),
        false => Err(failed(format!(
            "{command:?}: {status}: {}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        ))),
    }
}

impl Machine {
    /// An ext4 with a keystore of two keys and a volume of two directories and two files, all of it durable.
    pub fn base_image() -> Arc<Image> {
        let machine = Self::attach(Disk::new(Arc::default()));
        run(
            "mkfs.ext4",
            &["-q", "-E", "nodiscard,lazy_itable_init=0", &machine.loop_device],
        )
        .unwrap();
        machine.mount_host().unwrap();
        run(
            program("kmsd"),
            &["init", "--home", machine.host("keystore").to_str().unwrap()],
        )
        .unwrap();
        machine.start_kmsd().unwrap();
        for alias in ["alias/volume", "alias/other"] {
            let created: serde_json::Value =
                serde_json::from_str(&machine.kmsctl(&["create-key"]).unwrap()).unwrap();
            let id = created["KeyMetadata"]["KeyId"].as_str().unwrap();
            machine
                .kmsctl(&["create-alias", "--alias-name", alias, "--key-id", id])
                .unwrap();
        }
        let (volume, socket) = (machine.host("volume"), machine.socket());
        let arguments = [
            "--socket",
            socket.to_str().unwrap(),
            "create",
            volume.to_str().unwrap(),
        ];
        run(
            program("cmkfs"),
            &[&arguments[..], &["--key-id", "alias/volume"]].concat(),
        )
        .unwrap();
        machine.mount().unwrap();
        crate::workload::prepare(&machine.mnt());
        machine.unmount().unwrap();
        machine.stop_kmsd();
        machine.unmount_host();
        let image = machine.disk.image();
        machine.shut_down();
        image
    }

    /// Switches a machine on: ext4 recovers its journal.
    pub fn boot(disk: Disk) -> Result<Self, Violation> {
        let machine = Self::attach(disk);
        machine.mount_host()?;
        Ok(machine)
    }

    fn attach(disk: Disk) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["device", "host", "mnt"] {
            std::fs::create_dir(scratch.path().join(name)).unwrap();
        }
        let session = disk.attach(&scratch.path().join("device"));
        let file = scratch.path().join("device").join(FILE_NAME);
        let arguments = ["--find", "--show", "--direct-io=on", file.to_str().unwrap()];
        let loop_device = run("losetup", &arguments).unwrap().trim().to_owned();
        Self {
            disk,
            session: Some(session),
            loop_device,
            kmsd: Mutex::default(),
            mount: Mutex::default(),
            scratch,
        }
    }

    fn mount_host(&self) -> Result<(), Violation> {
        let host = self.scratch.path().join("host");
        run(
            "mount",
            &["-t", "ext4", &self.loop_device, host.to_str().unwrap()],
        )
        .map(drop)
    }

    fn unmount_host(&self) {
        let host = self.scratch.path().join("host");
        run("umount", &[host.to_str().unwrap()]).unwrap();
    }

    fn host(&self, name: &str) -> PathBuf {
        self.scratch.path().join("host").join(name)
    }

    /// Where the volume is mounted.
    pub fn mnt(&self) -> PathBuf {
        self.scratch.path().join("mnt")
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path().join("kmsd.sock")
    }

    pub fn start_kmsd(&self) -> Result<(), Violation> {
        let mut child = Command::new(program("kmsd"))
            .args(["serve", "--home", self.host("keystore").to_str().unwrap()])
            .args(["--socket", self.socket().to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(self.scratch.path().join("kmsd.log")).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        *self.kmsd.lock().unwrap() = Some(child);
        match line.contains("ready") {
            true => Ok(()),
            false => Err(failed(format!("kmsd does not start: {}", self.log("kmsd.log")))),
        }
    }

    pub fn kmsctl(&self, arguments: &[&str]) -> Result<String, Violation> {
        run(
            program("kmsctl"),
            &[&["--socket", self.socket().to_str().unwrap()], arguments].concat(),
        )
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.scratch.path().join(name)).unwrap_or_default()
    }

    pub fn mount(&self) -> Result<(), Violation> {
        let log = std::fs::File::create(self.scratch.path().join("mount.log")).unwrap();
        let child = Command::new(program("cmkfs"))
            .args([
                "--socket",
                self.socket().to_str().unwrap(),
                "mount",
                "--foreground",
            ])
            .args(["-o", "publish_interval_ms=200"])
            .args([self.host("volume"), self.mnt()])
            .stderr(log)
            .spawn()
            .unwrap();
        let mut mount = self.mount.lock().unwrap();
        let child = mount.insert(child);
        let start = Instant::now();
        // Until it says so, the daemon itself may be looking at the mount, and keep it from being unmounted.
        while !self.log("mount.log").contains("the volume is mounted") {
            if child.try_wait().unwrap().is_some() {
                return Err(failed(format!(
                    "the volume is not mounted: {}",
                    self.log("mount.log")
                )));
            }
            assert!(start.elapsed() < LIMIT, "no mount within a minute");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What the volume, and the other key, are found to be.
    pub fn observe(&self) -> Result<Seen, Violation> {
        let described = self.kmsctl(&["describe-key", "--key-id", "alias/other"])?;
        let described: serde_json::Value = serde_json::from_str(&described).unwrap();
        let state = described["KeyMetadata"]["KeyState"].as_str().unwrap().to_owned();
        Seen::of(&self.mnt(), state)
    }

    pub fn unmount(&self) -> Result<(), Violation> {
        run(program("cmkfs"), &["umount", self.mnt().to_str().unwrap()])?;
        let status = self.mount.lock().unwrap().take().unwrap().wait().unwrap();
        match status.success() {
            true => Ok(()),
            false => Err(failed(format!(
                "the mount ended with {status}: {}",
                self.log("mount.log")
            ))),
        }
    }

    /// Space that leaked, and inodes that were being deleted, are what a crash may leave.
    pub fn fsck(&self) -> Result<(), Violation> {
        let (socket, volume) = (self.socket(), self.host("volume"));
        let arguments = [
            "--socket",
            socket.to_str().unwrap(),
            "fsck",
            volume.to_str().unwrap(),
        ];
        let output = Command::new(program("cmkfs"))
            .args(arguments)
            .args(["--scrub", "--json"])
            .output()
            .unwrap();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .map_err(|_| failed(format!("fsck: {}", String::from_utf8_lossy(&output.stderr))))?;
        let problems = report["problems"].as_array().unwrap();
        let worse: Vec<_> = problems
            .iter()
            .filter(|problem| problem["fault"] != "leaked-space")
            .collect();
        match worse.is_empty() {
            true => Ok(()),
            false => Err(failed(format!("fsck found {worse:?}"))),
        }
    }

    /// SIGKILL, and nothing else is done.
    pub fn kill(&self, daemon: Daemon) {
        let child = match daemon {
            Daemon::Kmsd => &self.kmsd,
            Daemon::Mount => &self.mount,
        };
        let mut child = child.lock().unwrap();
        child.as_mut().unwrap().kill().unwrap();
        child.take().unwrap().wait().unwrap();
    }

    /// Starts what was killed again; the mount is made anew in either case.
    pub fn recover(&self, daemon: Daemon) -> Result<(), Violation> {
        match daemon {
            Daemon::Kmsd => {
                self.start_kmsd()?;
                self.unmount()?;
            }
            Daemon::Mount => detach(&self.mnt()),
        }
        self.mount()
    }

    fn stop_kmsd(&self) {
        if let Some(mut child) = self.kmsd.lock().unwrap().take() {
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            child.wait().unwrap();
        }
    }

    /// Takes everything down; nothing of it stays mounted.
    pub fn shut_down(self) {
        let scratch = self.scratch.path().to_owned();
        drop(self);
        for name in ["device", "host", "mnt"] {
            assert!(!is_mounted(&scratch.join(name)), "{name} stays mounted");
        }
    }
}

fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

fn detach(path: &Path) {
    if is_mounted(path)
        && let Err(errno) = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)
    {
        eprintln!("{} stays mounted: {errno}", path.display());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        detach(&self.mnt());
        for child in [&self.mount, &self.kmsd] {
            if let Ok(mut child) = child.lock()
                && let Some(mut child) = child.take()
                && (child.kill().is_err() || child.wait().is_err())
            {
                eprintln!("a child of the test is left behind");
            }
        }
        let host = self.scratch.path().join("host");
        if is_mounted(&host) && run("umount", &[host.to_str().unwrap()]).is_err() {
            detach(&host);
        }
        if let Err(violation) = run("losetup", &["--detach", &self.loop_device]) {
            eprintln!("{violation}");
        }
        // The kernel lets go of the loop device, and so of the disk, when it likes: until then the disk is in use.
        detach(&self.scratch.path().join("device"));
        drop(self.session.take());
    }
}
