//! fusectl: a directory of files for each connection, one of which ends it.

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use std::fs::File;
use std::io::{Result, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Where it is mounted, if it is.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// Ends one connection, and none that may come to have its number later.
#[derive(Debug)]
pub struct AbortHandle(File);

impl From<OwnedFd> for AbortHandle {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor.into())
    }
}

impl AsFd for AbortHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AbortHandle {
    /// That of the connection behind the anonymous device 0:`minor`, which is to be there still when this returns. Where
    /// fusectl is mounted nowhere, root gets at it all the same.
    ///
    /// # Errors
    /// No fusectl, or no permission.
    pub fn open(minor: u32) -> Result<Self> {
        let path = format!("{CONNECTIONS}/{minor}/abort");
        match File::options().write(true).open(path) {
            Ok(file) => Ok(Self(file)),
            Err(_) => Self::open_detached(minor),
        }
    }

    /// Through a mount that is in no tree, and ends with its descriptors.
    fn open_detached(minor: u32) -> Result<Self> {
        let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_create(&context)?;
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&mount, format!("{minor}/abort"), flags, Mode::empty())?;
        Ok(Self(file.into()))
    }

    /// Has every request fail, those that wait included. What the kernel caches stays readable. Also returns Ok if the
    /// connection had ended before.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn abort(&self) -> Result<()> {
        (&self.0).write_all(b"1")
    }
}
