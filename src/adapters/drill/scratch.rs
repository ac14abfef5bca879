//! A kmsd, a volume and a mount of the drill's own in a temporary directory, all of which is gone when this is dropped.

use super::kms::Kms;
use crate::adapters::fuse;
use kms_client::Client;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use std::fs::{DirBuilder, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for something that must come about.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for one call to kmsd: a revocation may have to end a mount.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What a mount is given to go dark before kmsd ends it.
const DRAIN_MAX_MS: u32 = 1000;

/// Where the programs are, none of which needs any other to be installed.
#[derive(Debug, Clone)]
pub struct Programs {
    /// This program.
    pub cmkfs: PathBuf,
    /// The key management service.
    pub kmsd: PathBuf,
    /// The program that tries to recover what was destroyed.
    pub recover: PathBuf,
}

impl Programs {
    /// Beside this program.
    ///
    /// # Errors
    /// The one that is missing.
    pub fn find() -> Result<Self, String> {
        let cmkfs = std::env::current_exe().map_err(|error| format!("this program's own file: {error}"))?;
        let beside = |name: &str| {
            let path = cmkfs.with_file_name(name);
            match path.is_file() {
                true => Ok(path),
                false => Err(format!(
                    "the drill needs {name} beside {}: build the whole workspace",
                    cmkfs.display()
                )),
            }
        };
        Ok(Self {
            kmsd: beside("kmsd")?,
            recover: beside("cmkfs-recover")?,
            cmkfs,
        })
    }
}

/// Waits until `holds`, as long as nobody interrupts.
///
/// # Errors
/// It did not come about in time.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let start = Instant::now();
    while !holds()? {
        super::check_interrupt()?;
        if start.elapsed() > LIMIT {
            return Err(format!("within a minute it was never so that {what}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Everything of a scratch drill.
pub struct Scratch {
    dir: PathBuf,
    programs: Programs,
    kmsd: Option<Child>,
    mount: Option<Child>,
    client: Option<Client>,
}

impl Scratch {
    /// Makes the directory, with nothing in it.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(programs: Programs) -> Result<Self, String> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| format!("no random bytes: {error}"))?;
        let parent = std::fs::canonicalize(std::env::temp_dir())
            .map_err(|error| format!("{}: {error}", std::env::temp_dir().display()))?;
        let dir = parent.join(format!("cmkfs-drill-{}", hex::encode(random)));
        let make = |path: &Path, mode| {
            let made = DirBuilder::new().mode(mode).create(path);
            made.map_err(|error| format!("{}: {error}", path.display()))
        };
        make(&dir, 0o700)?;
        let scratch = Self {
            dir,
            programs,
            kmsd: None,
            mount: None,
            client: None,
        };
        make(&scratch.mountpoint(), 0o700)?;
        make(&scratch.path("copies"), 0o700)?;
        make(&scratch.path("withheld"), 0o700)?;
        Ok(scratch)
    }

    /// A path in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The keystore.
    #[must_use]
    pub fn keystore(&self) -> PathBuf {
        self.path("keystore")
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> PathBuf {
        self.path("volume")
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> PathBuf {
        self.path("mnt")
    }

    /// The programs.
    #[must_use]
    pub const fn programs(&self) -> &Programs {
        &self.programs
    }

    fn socket(&self) -> PathBuf {
        self.path("kmsd.sock")
    }

    /// Makes a keystore for drills and serves it.
    ///
    /// # Errors
    /// kmsd does not start.
    pub fn start_kmsd(&mut self) -> Result<(), String> {
        let init = Command::new(&self.programs.kmsd)
            .args(["init", "--drill", "--home"])
            .arg(self.keystore())
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("kmsd init: {error}"))?;
        if !init.status.success() {
            return Err(format!("kmsd init: {}", String::from_utf8_lossy(&init.stderr)));
        }
        let log = self.log("kmsd.log")?;
        let mut command = Command::new(&self.programs.kmsd);
        command
            .args(["serve", "--home"])
            .arg(self.keystore())
            .arg("--socket")
            .arg(self.socket())
            .stdout(Stdio::piped());
        let mut child = start(&mut command, log)?;
        let out = child.stdout.take();
        self.kmsd = Some(child);
        let mut line = String::new();
        let heard = out.map(|out| BufReader::new(out).read_line(&mut line));
        if !matches!(heard, Some(Ok(1..))) || !line.contains("ready") {
            return Err(format!("kmsd does not start: {}", self.last_line("kmsd.log")));
        }
        let client = Client::connect(&self.socket(), CALL_TIMEOUT);
        self.client = Some(client.map_err(|error| format!("kmsd: {error}"))?);
        Ok(())
    }

    fn log(&self, name: &str) -> Result<File, String> {
        let path = self.path(name);
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| format!("{}: {error}", path.display()))
    }

    /// What a daemon said last.
    #[must_use]
    pub fn last_line(&self, log: &str) -> String {
        let text = std::fs::read_to_string(self.path(log)).unwrap_or_default();
        text.lines().last().unwrap_or("it said nothing").to_owned()
    }

    /// The service's client.
    ///
    /// # Errors
    /// kmsd was not started.
    pub fn kms(&self) -> Result<Kms<'_>, String> {
        self.client
            .as_ref()
            .map(Kms::over)
            .ok_or_else(|| "kmsd is not running".to_owned())
    }

    /// Makes the volume under a key.
    ///
    /// # Errors
    /// What cmkfs said.
    pub fn create_volume(&self, key: &str) -> Result<(), String> {
        let made = Command::new(&self.programs.cmkfs)
            .arg("--socket")
            .arg(self.socket())
            .arg("create")
            .arg(self.volume())
            .args(["--key-id", key])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cmkfs create: {error}"))?;
        match made.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&made.stderr).trim().to_owned()),
        }
    }

    /// Mounts the volume, in the foreground of a child.
    ///
    /// # Errors
    /// What the mount said.
    pub fn mount(&mut self) -> Result<(), String> {
        let log = self.log("mount.log")?;
        let mut command = Command::new(&self.programs.cmkfs);
        command
            .arg("--socket")
            .arg(self.socket())
            .args([
                "mount",
                "--foreground",
                "-o",
                &format!("drain_max_ms={DRAIN_MAX_MS}"),
            ])
            .arg(self.volume())
            .arg(self.mountpoint())
            .stdout(Stdio::null());
        self.mount = Some(start(&mut command, log)?);
        let mountpoint = self.mountpoint();
        wait_until("the volume is mounted", || {
            if let Some(status) = self
                .mount
                .as_mut()
                .and_then(|child| child.try_wait().ok().flatten())
            {
                return Err(format!(
                    "the mount ended ({status}): {}",
                    self.last_line("mount.log")
                ));
            }
            is_mounted(&mountpoint)
        })
    }

    /// The mounting process.
    ///
    /// # Errors
    /// There is none.
    pub fn mount_pid(&self) -> Result<u32, String> {
        self.mount
            .as_ref()
            .map(Child::id)
            .ok_or_else(|| "nothing is mounted".to_owned())
    }

    /// The key management service's process.
    ///
    /// # Errors
    /// There is none.
    pub fn kmsd_pid(&self) -> Result<u32, String> {
        self.kmsd
            .as_ref()
            .map(Child::id)
            .ok_or_else(|| "kmsd is not running".to_owned())
    }

    /// Sends the mounting process a signal.
    ///
    /// # Errors
    /// There is none.
    pub fn signal_mount(&self, signal: Signal) -> Result<(), String> {
        let child = self.mount.as_ref().ok_or("nothing is mounted")?;
        kill_process(Pid::from_child(child), signal).map_err(|error| format!("the mount: {error}"))
    }

    /// Waits for the mounting process's end.
    ///
    /// # Errors
    /// It does not end.
    pub fn mount_end(&mut self) -> Result<ExitStatus, String> {
        let mut child = self.mount.take().ok_or("nothing is mounted")?;
        let mut status = None;
        let waited = wait_until("the mount's process ends", || {
            status = child.try_wait().map_err(|error| format!("the mount: {error}"))?;
            Ok(status.is_some())
        });
        match status {
            Some(status) => Ok(status),
            None => {
                self.mount = Some(child);
                waited.and(Err("the mount's process does not end".to_owned()))
            }
        }
    }

    /// Unmounts in order.
    ///
    /// # Errors
    /// It is in use, or did not end well.
    pub fn unmount(&mut self) -> Result<(), String> {
        let mountpoint = self.mountpoint();
        wait_until("the mount is not in use", || {
            match fuse::unmount(&mountpoint, false) {
                Ok(_) => Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
                Err(error) => Err(format!("unmount: {error}")),
            }
        })?;
        let status = self.mount_end()?;
        match status.success() {
            true => Ok(()),
            false => Err(format!(
                "the mount ended with {status}: {}",
                self.last_line("mount.log")
            )),
        }
    }

    /// Takes a mount that nobody serves any more out of the tree.
    pub fn detach(&self) {
        // What is not there need not be.
        let _gone =
            rustix::mount::unmount(self.mountpoint(), rustix::mount::UnmountFlags::DETACH).or_else(|_| {
                fuse::unmount(&self.mountpoint(), true)
                    .map(|_| ())
                    .map_err(|_| rustix::io::Errno::IO)
            });
    }

    /// Ends kmsd in order.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_kmsd(&mut self) -> Result<(), String> {
        self.client = None;
        if let Some(mut child) = self.kmsd.take() {
            kill_process(Pid::from_child(&child), Signal::TERM).map_err(|error| format!("kmsd: {error}"))?;
            child.wait().map_err(|error| format!("kmsd: {error}"))?;
        }
        Ok(())
    }
}

/// Starts a daemon: out of reach of the terminal's signals, and not to outlive this process.
fn start(command: &mut Command, log: File) -> Result<Child, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stderr(log).process_group(0);
    // SAFETY: prctl(2) alone, which is safe between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?));
    }
    command.spawn().map_err(|error| format!("{name}: {error}"))
}

/// Whether one of our mounts is there, by the kernel's table: a dark one answers no stat(2).
fn is_mounted(mountpoint: &Path) -> Result<bool, String> {
    match fuse::find(mountpoint) {
        Ok(found) => Ok(found.is_some()),
        Err(error) => Err(format!("mountinfo: {error}")),
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.client = None;
        self.detach();
        for mut child in [self.mount.take(), self.kmsd.take()].into_iter().flatten() {
            // A stopped process heeds SIGKILL, too; one that has ended needs none.
            let _ended = child.kill();
            let _reaped = child.wait();
        }
        for _ in 0..100 {
            if !is_mounted(&self.mountpoint()).unwrap_or(true) {
                if let Err(error) = std::fs::remove_dir_all(&self.dir) {
                    tracing::warn!(%error, "the scratch directory is left behind");
                    eprintln!("cmkfs: {} is left behind: {error}", self.dir.display());
                }
                return;
            }
            self.detach();
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!(
            "cmkfs: {} is mounted still, and left behind",
            self.mountpoint().display()
        );
    }
}
