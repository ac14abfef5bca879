//! Which volume is mounted where: proc(5)'s mountinfo.

use super::Failure;
use crate::adapters::fuse::FILESYSTEM_TYPE;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A mount of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) volume: PathBuf,
    pub(super) mountpoint: PathBuf,
}

/// The topmost mount at `mountpoint`, if it is one of ours.
pub(super) fn find(mountpoint: &Path) -> Result<Option<Mount>, Failure> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(|error| format!("mountinfo: {error}"))?;
    let at = resolve(mountpoint);
    // The last one lies on top.
    let found = table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .rfind(|(mount, _)| mount.mountpoint == at);
    Ok(found.filter(|(_, is_ours)| *is_ours).map(|(mount, _)| mount))
}

/// The canonical path of a mount point, whose own attributes may be out of reach while the key is revoked.
fn resolve(mountpoint: &Path) -> PathBuf {
    let absolute = std::path::absolute(mountpoint).unwrap_or_else(|_| mountpoint.to_owned());
    let parent = absolute
        .parent()
        .and_then(|parent| std::fs::canonicalize(parent).ok());
    match (parent, absolute.file_name()) {
        (Some(parent), Some(name)) => {
            let joined = parent.join(name);
            // A symlink to a mount point lies outside of it, so that it can be read.
            std::fs::read_link(&joined)
                .map_or_else(|_| joined.clone(), |target| resolve(&parent.join(target)))
        }
        _ => absolute,
    }
}

/// A line: `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAG...] - TYPE SOURCE SUPEROPTIONS`.
fn parse(line: &[u8]) -> Option<(Mount, bool)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mountpoint = path(fields.nth(4)?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let is_ours = rest.next()? == FILESYSTEM_TYPE.as_bytes();
    Some((
        Mount {
            volume: path(rest.next()?),
            mountpoint,
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
        };
        assert_eq!(parse(line), Some((mount, true)));
    }

    #[test]
    fn other_types_and_broken_lines_are_none_of_ours() {
        assert!(parse(b"36 35 0:41 / /mnt rw - ext4 /dev/sda rw").is_some_and(|(_, is_ours)| !is_ours));
        assert_eq!(parse(b"36 35 0:41"), None);
        assert_eq!(parse(b""), None);
    }
}
