//! FUSE's types and the engine's, one into the other.

use crate::engine::{Attr, FileKind, Ino, Timestamp};
use fuser::{FileAttr, FileType, INodeNo};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What stat(2) gives as the preferred size of I/O.
const BLOCK_SIZE: u32 = 4096;

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind in the type bits of a mode.
pub(super) fn kind_of_mode(mode: u32) -> Option<FileKind> {
    Some(match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => FileKind::Regular,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => return None,
    })
}

pub(super) fn permissions(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.crtime),
        kind: file_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// What is shown of a directory whose attributes may not be: that it is there.
pub(super) fn dark_attr(ino: Ino) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino.0),
        kind: FileType::Directory,
        nlink: 2,
        ..negative_attr()
    }
}

/// The attributes of nothing: as a lookup's answer, a name that the kernel may remember is not there.
pub(super) fn negative_attr() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let whole = if time.secs < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    let exact = whole.and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(time.nanos))));
    exact.unwrap_or(UNIX_EPOCH)
}

/// A time that came with a request. fuser 0.18 subtracts the nanoseconds of times before 1970, where the protocol
/// adds them: taking both parts of the distance as they are undoes it.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp {
            secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            let secs = i64::try_from(before.as_secs()).map_or(i64::MIN, |secs| -secs);
            Timestamp {
                secs,
                nanos: before.subsec_nanos(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_go_out_exactly() {
        let time = system_time(Timestamp {
            secs: -2,
            nanos: 250_000_000,
        });
        assert_eq!(
            UNIX_EPOCH.duration_since(time).unwrap(),
            Duration::from_millis(1750)
        );
    }

    #[test]
    fn times_before_1970_come_in_as_the_kernel_sent_them() {
        // The kernel sends -2 s and 250 ms; fuser makes this of it.
        let received = UNIX_EPOCH - Duration::new(2, 250_000_000);
        assert_eq!(
            timestamp(received),
            Timestamp {
                secs: -2,
                nanos: 250_000_000
            }
        );
    }

    #[test]
    fn every_type_of_a_mode_is_known() {
        assert_eq!(kind_of_mode(libc::S_IFSOCK | 0o644), Some(FileKind::Socket));
        assert_eq!(kind_of_mode(0o644), Some(FileKind::Regular));
        assert_eq!(kind_of_mode(0o170_000), None);
    }
}
