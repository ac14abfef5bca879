//! Which volume is mounted where: proc(5)'s mountinfo. Nothing here asks the mounted filesystem itself.

use super::mount::FILESYSTEM_TYPE;
use std::ffi::OsString;
use std::fs::File;
use std::io::Result;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Symlinks that are followed to a mount point, as many as the kernel follows (MAXSYMLINKS).
const SYMLINKS_MAX: usize = 40;

/// A mount of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The volume's directory.
    pub volume: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Which filesystem this is: every mount of it, bind mounts included, has the same number, and no other.
    pub device: Device,
}

/// A device number, `st_dev` in stat(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// 0 for filesystems without a block device.
    pub major: u32,
    /// Names the connection in fusectl.
    pub minor: u32,
}

/// The table of mounts, open: it can be read when no more files can be opened.
#[derive(Debug)]
pub(super) struct Table(File);

impl Table {
    pub(super) fn open() -> Result<Self> {
        File::open("/proc/self/mountinfo").map(Self)
    }

    /// The topmost mount at `mountpoint`, if it is one of ours.
    pub(super) fn find(&self, mountpoint: &Path) -> Result<Option<Mount>> {
        let at = resolve(mountpoint, SYMLINKS_MAX);
        // The last one lies on top.
        let found = self
            .read()?
            .into_iter()
            .rfind(|(mount, _)| mount.mountpoint == at);
        Ok(found.filter(|(_, is_ours)| *is_ours).map(|(mount, _)| mount))
    }

    /// Every mount of this namespace, and whether it is of our type.
    fn read(&self) -> Result<Vec<(Mount, bool)>> {
        let mut table = Vec::new();
        let mut part = [0; 4096];
        loop {
            match self.0.read_at(&mut part, table.len() as u64)? {
                0 => break,
                count => table.extend_from_slice(part.get(..count).unwrap_or_default()),
            }
        }
        Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
    }
}

/// The topmost mount at `mountpoint`, if it is one of ours.
///
/// # Errors
/// If the table cannot be read.
pub fn find(mountpoint: &Path) -> Result<Option<Mount>> {
    Table::open()?.find(mountpoint)
}

/// The mount that a directory which can be looked at lies in, if it is one of ours.
///
/// # Errors
/// If the directory or the table cannot be read.
pub fn find_around(dir: &Path) -> Result<Option<Mount>> {
    let number = std::fs::metadata(dir)?.dev();
    let device = Device {
        major: rustix::fs::major(number),
        minor: rustix::fs::minor(number),
    };
    let found = Table::open()?
        .read()?
        .into_iter()
        .rfind(|(mount, _)| mount.device == device);
    Ok(found.filter(|(_, is_ours)| *is_ours).map(|(mount, _)| mount))
}

/// Another place where the filesystem of `unmounted` is still mounted.
///
/// # Errors
/// If the table cannot be read.
pub fn find_other(unmounted: &Mount) -> Result<Option<Mount>> {
    let found = Table::open()?.read()?.into_iter().find(|(mount, is_ours)| {
        // The number alone may be another filesystem's by now.
        *is_ours && mount.device == unmounted.device && mount.volume == unmounted.volume
    });
    Ok(found.map(|(mount, _)| mount))
}

/// The canonical path of a mount point, whose own attributes may be out of reach while the key is revoked.
fn resolve(mountpoint: &Path, symlinks_left: usize) -> PathBuf {
    let absolute = std::path::absolute(mountpoint).unwrap_or_else(|_| mountpoint.to_owned());
    let parent = absolute
        .parent()
        .and_then(|parent| std::fs::canonicalize(parent).ok());
    let (Some(parent), Some(name)) = (parent, absolute.file_name()) else {
        return absolute;
    };
    let joined = parent.join(name);
    // A symlink to a mount point lies outside of it, so that it can be read.
    match std::fs::read_link(&joined) {
        Ok(target) if symlinks_left > 0 => resolve(&parent.join(target), symlinks_left - 1),
        _ => joined,
    }
}

/// A line: `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAG...] - TYPE SOURCE SUPEROPTIONS`.
fn parse(line: &[u8]) -> Option<(Mount, bool)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = Device {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    let mountpoint = path(fields.nth(1)?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let is_ours = rest.next()? == FILESYSTEM_TYPE.as_bytes();
    Some((
        Mount {
            volume: path(rest.next()?),
            mountpoint,
            device,
        },
        is_ours,
    ))
}

/// Space, tab, newline and backslash are written as three octal digits behind a backslash.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal
            .filter(|_| byte == b'\\')
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(escaped) => {
                bytes.push(escaped);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => bytes.push(byte),
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_of_ours_is_recognized_with_its_escapes() {
        let line =
            br"36 35 0:41 / /mnt/my\040files rw,noatime shared:1 - fuse.cmkfs /data/a,b\134c rw,user_id=0";
        let mount = Mount {
            volume: r"/data/a,b\c".into(),
            mountpoint: "/mnt/my files".into(),
            device: Device { major: 0, minor: 41 },
        };
        assert_eq!(parse(line), Some((mount, true)));
    }

    #[test]
    fn other_types_and_broken_lines_are_none_of_ours() {
        assert!(parse(b"36 35 0:41 / /mnt rw - ext4 /dev/sda rw").is_some_and(|(_, is_ours)| !is_ours));
        assert_eq!(parse(b"36 35 0:41"), None);
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 041 / /mnt rw - fuse.cmkfs /data rw"), None);
    }

    #[test]
    fn a_circle_of_symlinks_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("circle");
        std::os::unix::fs::symlink("circle", &path).unwrap();
        assert_eq!(find(&path).unwrap(), None);
    }
}
