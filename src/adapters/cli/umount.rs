//! `cmkfs umount`

use super::{Failure, UmountArguments, mounts};
use crate::adapters::fuse::unmount;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::path::Path;

/// The file that a mount holds locked until all is on disk.
const LOCK: &str = "lock";

pub(super) fn run(arguments: &UmountArguments) -> Result<(), Failure> {
    let path = &arguments.mountpoint;
    let mount =
        mounts::find(path)?.ok_or_else(|| format!("no cmkfs volume is mounted on {}", path.display()))?;
    // Opened before: a volume that lies where only its owner looks is then just not waited for.
    let lock = File::open(mount.volume.join(LOCK));
    unmount(&mount.mountpoint, false).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => format!(
            "{} is in use: leave it, close its files, and try again",
            path.display()
        ),
        _ => format!("cannot unmount {}: {error}", path.display()),
    })?;
    match lock {
        Ok(lock) => wait_for(&lock, &mount.volume),
        Err(error) => Err(format!(
            "unmounted, but {} cannot be watched until all is on disk: {error}",
            mount.volume.display()
        )),
    }
}

/// Waits until the mount's process has put everything away.
fn wait_for(lock: &File, volume: &Path) -> Result<(), Failure> {
    rustix::fs::flock(lock, FlockOperation::LockExclusive).map_err(|errno| {
        format!(
            "unmounted, but {} could not be waited for: {errno}",
            volume.display()
        )
    })
}
