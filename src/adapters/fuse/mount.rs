//! mount(2) and umount2(2), or fusermount3(1) for an ordinary user. Done here and not by fuser, whose check of
//! whether a mount is still there is inverted, and whose option strings know no escape.

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags as Flags, UnmountFlags};
use std::ffi::CString;
use std::io::{Error, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

/// The filesystem's type in mountinfo.
pub(super) const FILESYSTEM_TYPE: &str = "fuse.cmkfs";
const SUBTYPE: &str = "cmkfs";
const HELPER: &str = "fusermount3";
/// fusermount3 sends the device's descriptor through the socket that this variable names.
const HELPER_SOCKET: &str = "_FUSE_COMMFD";

/// Which of mount(8)'s generic options are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountFlags {
    /// `ro`
    pub read_only: bool,
    /// `nosuid`
    pub no_suid: bool,
    /// `nodev`
    pub no_dev: bool,
    /// `noexec`
    pub no_exec: bool,
    /// `allow_other`: users beside the one who mounts may use it.
    pub allow_other: bool,
}

/// Mounts, and returns the descriptor of /dev/fuse that serves the mount. `source` is what mountinfo shows.
pub(super) fn mount(source: &Path, mountpoint: &Path, flags: MountFlags) -> Result<OwnedFd> {
    if rustix::process::geteuid().is_root() {
        mount_as_root(source, mountpoint, flags)
    } else {
        mount_through_helper(source, mountpoint, flags)
    }
}

fn mount_as_root(source: &Path, mountpoint: &Path, flags: MountFlags) -> Result<OwnedFd> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::other(format!("/dev/fuse: {errno}")))?;
    let root_mode = rustix::fs::stat(mountpoint)?.st_mode & libc::S_IFMT;
    let mut data = format!(
        "fd={},rootmode={root_mode:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if flags.allow_other {
        data.push_str(",allow_other");
    }
    let mut mount_flags = Flags::NOATIME;
    for (on, flag) in [
        (flags.read_only, Flags::RDONLY),
        (flags.no_suid, Flags::NOSUID),
        (flags.no_dev, Flags::NODEV),
        (flags.no_exec, Flags::NOEXEC),
    ] {
        mount_flags.set(flag, on);
    }
    let data = CString::new(data)?;
    rustix::mount::mount(source, mountpoint, FILESYSTEM_TYPE, mount_flags, data.as_c_str())?;
    Ok(device)
}

fn mount_through_helper(source: &Path, mountpoint: &Path, flags: MountFlags) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    // The helper inherits a copy without close-on-exec.
    let inherited = rustix::io::dup(&theirs)?;
    let mut options = format!("subtype={SUBTYPE},default_permissions,noatime,fsname=");
    let mut options_bytes = std::mem::take(&mut options).into_bytes();
    for byte in source.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            options_bytes.push(b'\\');
        }
        options_bytes.push(*byte);
    }
    for (on, option) in [
        (flags.read_only, ",ro"),
        (flags.no_exec, ",noexec"),
        (flags.allow_other, ",allow_other"),
    ] {
        if on {
            options_bytes.extend_from_slice(option.as_bytes());
        }
    }
    run_helper(
        Command::new(HELPER)
            .arg("-o")
            .arg(std::ffi::OsStr::from_bytes(&options_bytes))
            .arg("--")
            .arg(mountpoint)
            .env(HELPER_SOCKET, inherited.as_raw_fd().to_string()),
    )?;
    drop((theirs, inherited));
    receive_descriptor(&ours)
}

/// Runs fusermount3; its first line says what went wrong. It has no exit status for a busy mount, only these words.
fn run_helper(command: &mut Command) -> Result<()> {
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::other(format!("{HELPER}: {error}; install the package fuse3")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("Device or resource busy") {
        return Err(Errno::BUSY.into());
    }
    Err(Error::other(
        said.lines().next().unwrap_or("fusermount3 failed").to_owned(),
    ))
}

fn receive_descriptor(socket: &UnixStream) -> Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        rustix::net::RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let rustix::net::RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(descriptor) = descriptors.next()
        {
            return Ok(descriptor);
        }
    }
    Err(Error::other("fusermount3 sent no descriptor"))
}

/// Unmounts; with `lazily` a busy mount leaves the tree now and ends when its last user does.
///
/// # Errors
/// EBUSY for a busy mount that is not unmounted lazily; what the helper said, for an ordinary user.
pub fn unmount(mountpoint: &Path, lazily: bool) -> Result<()> {
    let flags = if lazily {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    match rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW) {
        Err(Errno::PERM) => {
            let how = if lazily { "-uz" } else { "-u" };
            run_helper(Command::new(HELPER).arg(how).arg("--").arg(mountpoint))
        }
        other => Ok(other?),
    }
}
