//! The vocabulary of the engine: what goes in and comes out of [`Volume`](super::Volume).

use std::fmt;

/// An inode number: the key domain in the high 16 bits, a monotonic counter below; never reused. 0, the default, is none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory of the volume.
    pub const ROOT: Self = Self(1);

    /// The key domain the inode belongs to.
    #[must_use]
    pub fn domain(self) -> Domain {
        Domain((self.0 >> Domain::SHIFT) as u16)
    }
}

impl fmt::Debug for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ino {}", self.0)
    }
}

/// A key domain: a subtree under its own CMK. Domain 0 is the volume's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Domain(pub u16);

impl Domain {
    /// The domain every volume starts with; it holds the root directory.
    pub const FIRST: Self = Self(0);
    /// Where it stands in an inode number.
    pub(crate) const SHIFT: u32 = 48;

    /// The directory that the domain begins with.
    #[must_use]
    pub fn root(self) -> Ino {
        self.number(Ino::ROOT.0)
    }

    /// An inode of the domain by its number in it.
    pub(crate) fn number(self, counter: u64) -> Ino {
        Ino(u64::from(self.0) << Self::SHIFT | counter)
    }
}

/// The file types of inode(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FileKind {
    /// A regular file; the only kind with content and a DEK.
    Regular = 1,
    /// A directory.
    Directory = 2,
    /// A symbolic link; its target is part of the sealed inode record.
    Symlink = 3,
    /// A FIFO.
    Fifo = 4,
    /// A Unix socket.
    Socket = 5,
    /// A character device.
    CharDevice = 6,
    /// A block device.
    BlockDevice = 7,
}

impl FileKind {
    /// The kind whose stored number is `number`.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::Symlink,
            4 => Self::Fifo,
            5 => Self::Socket,
            6 => Self::CharDevice,
            7 => Self::BlockDevice,
            _ => return None,
        })
    }
}

pub(crate) const SUID: u16 = 0o4000;
pub(crate) const SGID: u16 = 0o2000;
const GROUP_EXEC: u16 = 0o010;

/// A point in time with nanoseconds, before 1970 too: `nanos` always counts forward from `secs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z, negative before.
    pub secs: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nanos: u32,
}

/// What stat(2) shows of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// File type.
    pub kind: FileKind,
    /// Permission bits, with suid, sgid and sticky: `st_mode & 07777`.
    pub perm: u16,
    /// Hard links. 2 + subdirectories for a directory.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, as the kernel encodes it (`new_encode_dev`), else 0.
    pub rdev: u32,
    /// Size in bytes.
    pub size: u64,
    /// Space taken, in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change of content or attributes.
    pub ctime: Timestamp,
    /// Birth.
    pub crtime: Timestamp,
}

/// Attributes to change; `None` leaves one as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct SetAttr {
    /// New `st_mode & 07777`.
    pub perm: Option<u16>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size in bytes: truncates, or extends with a hole.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<Timestamp>,
    /// New modification time. With `size` set and this unset, it becomes now.
    pub mtime: Option<Timestamp>,
    /// New change time; now when unset.
    pub ctime: Option<Timestamp>,
    /// What a change of size or owner takes away.
    pub kill: Kill,
}

/// Which privileges of a file a change of its content or owner takes away, as in Linux (setattr_should_drop_suidgid).
/// A directory keeps its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kill {
    /// None.
    #[default]
    Nothing,
    /// suid, sgid of what its group may execute, and security.capability: the caller is in the file's group, or
    /// privileged.
    ByMember,
    /// suid, sgid and security.capability.
    ByStranger,
}

impl Kill {
    /// What it leaves of the permission bits of an inode. sgid without group execution is no privilege to a member of the
    /// group, but mandatory locking's old mark.
    #[must_use]
    pub fn applied_to(self, kind: FileKind, perm: u16) -> u16 {
        let is_privilege = perm & GROUP_EXEC != 0;
        match self {
            _ if kind == FileKind::Directory => perm,
            Self::Nothing => perm,
            Self::ByMember if !is_privilege => perm & !SUID,
            Self::ByMember | Self::ByStranger => perm & !(SUID | SGID),
        }
    }
}

impl SetAttr {
    /// Whether nothing but times is set.
    pub(crate) fn is_of_times(&self) -> bool {
        matches!(
            self,
            Self {
                perm: None,
                uid: None,
                gid: None,
                size: None,
                kill: Kill::Nothing,
                ..
            }
        )
    }
}

/// What a new inode is made with.
#[derive(Debug, Clone, Copy)]
pub struct NewNode {
    /// File type; a symlink is made by [`Volume::symlink`](super::Volume::symlink).
    pub kind: FileKind,
    /// Permission bits as they were asked for.
    pub perm: u16,
    /// Permission bits to be withheld, unless the directory has a default ACL.
    pub umask: u16,
    /// Owner.
    pub uid: u32,
    /// Group; a parent with the sgid bit overrides it.
    pub gid: u32,
    /// Device number for device nodes.
    pub rdev: u32,
}

/// The flags of renameat2(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// Fail with EEXIST if the target is there.
    pub no_replace: bool,
    /// Swap the two names.
    pub exchange: bool,
    /// Leave a whiteout (a character device 0:0) of this owner at the source.
    pub whiteout: Option<Owner>,
}

/// To whom something new belongs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group; a parent with the sgid bit overrides it.
    pub gid: u32,
}

/// A position in a directory, valid until that directory is deleted, whatever else comes and goes in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

impl Cookie {
    /// Before the first entry.
    pub const START: Self = Self(0);
}

/// One directory entry as readdir gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The inode it names.
    pub ino: Ino,
    /// Its file type.
    pub kind: FileKind,
    /// Its name: 1 to 255 bytes without '/' and NUL; `.` and `..` are among the entries given.
    pub name: &'a [u8],
    /// Where a later call goes on after this entry.
    pub cookie: Cookie,
}

/// Whether the receiver of directory entries took the one it was shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Taken; show the next.
    Yes,
    /// No room: it was not taken, and no other is to be shown.
    Full,
}

/// The modes of fallocate(2) that have a meaning here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallocate {
    /// Reserve space; extend the size unless `keep_size`.
    Allocate {
        /// Leave the size as it is.
        keep_size: bool,
    },
    /// Make a hole; the size stays.
    PunchHole,
    /// Make the range read as zeros.
    ZeroRange {
        /// Leave the size as it is.
        keep_size: bool,
    },
}

/// What lseek(2) looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

/// How setxattr(2) treats an attribute that is or is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetXattr {
    /// Create or replace.
    Any,
    /// `XATTR_CREATE`: fail with EEXIST if it is there.
    Create,
    /// `XATTR_REPLACE`: fail with ENODATA if it is not.
    Replace,
}

/// What statfs(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatFs {
    /// Block size in bytes.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub blocks_free: u64,
    /// Free blocks for an unprivileged caller.
    pub blocks_available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// Longest name, in bytes.
    pub name_max: u32,
}

impl StatFs {
    /// The block size, in bytes.
    pub(crate) const BLOCK_BYTES: u32 = 4096;
}
