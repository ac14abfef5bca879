//! `cmkfs umount`

use super::{Failure, UmountArguments, complain};
use crate::adapters::fuse::{Mount, find, find_other, unmount};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// The file that a mount holds locked until all is on disk.
const LOCK: &str = "lock";
/// How long it may take before this says what it waits for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take at all.
const WAIT_MAX: Duration = Duration::from_secs(600);

pub(super) fn run(arguments: &UmountArguments) -> Result<(), Failure> {
    let path = &arguments.mountpoint;
    let mount = find(path)
        .map_err(unreadable)?
        .ok_or_else(|| format!("no cmkfs volume is mounted on {}", path.display()))?;
    // Opened before: a volume that lies where only its owner looks is then just not waited for.
    let lock = File::open(mount.volume.join(LOCK));
    unmount(&mount.mountpoint, false).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => format!(
            "{} is in use: leave it, close its files, and try again",
            path.display()
        ),
        _ => format!("cannot unmount {}: {error}", path.display()),
    })?;
    if let Some(other) = find_other(&mount).map_err(unreadable)? {
        return Err(format!(
            "unmounted from {}, but the same mount is at {}, too, and ends with that",
            path.display(),
            other.mountpoint.display()
        ));
    }
    match lock {
        Ok(lock) => wait_for(lock, &mount),
        Err(error) => Err(format!(
            "unmounted, but {} cannot be watched until all is on disk: {error}",
            mount.volume.display()
        )),
    }
}

/// Waits until the mount's process has put everything away.
fn wait_for(lock: File, mount: &Mount) -> Result<(), Failure> {
    let volume = &mount.volume;
    let (sender, done) = channel();
    std::thread::spawn(move || {
        // Whoever has given up waiting does not hear it.
        let _heard = sender.send(rustix::fs::flock(&lock, FlockOperation::LockExclusive));
    });
    let mut outcome = done.recv_timeout(PATIENCE);
    if outcome == Err(RecvTimeoutError::Timeout) {
        complain(&still_held(volume));
        outcome = done.recv_timeout(WAIT_MAX);
    }
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(errno)) => Err(format!(
            "unmounted, but {} could not be waited for: {errno}",
            volume.display()
        )),
        Err(_) => Err(format!("gave up waiting: {}", still_held(volume))),
    }
}

fn still_held(volume: &Path) -> String {
    format!(
        "unmounted, but {} is not released yet: its last writes are being stored, or another namespace has it mounted",
        volume.display()
    )
}

fn unreadable(error: std::io::Error) -> Failure {
    format!("mountinfo: {error}")
}
