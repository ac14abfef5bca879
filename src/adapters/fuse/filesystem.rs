//! Every FUSE request, translated. No request may panic a loop, and none logs a name.

use super::convert::{dark_attr, file_attr, file_type, kind_of_mode, negative_attr, permissions, timestamp};
use super::invalidate::{Laundry, Search, answer_search};
use super::negotiate::negotiate;
use super::reply::{GENERATION, TTL, reply_attr, reply_empty, reply_entry, reply_xattr};
use super::residue::Residue;
use super::session::CacheMode;
use crate::engine::{
    Attr, Clock, Cookie, Error, Fallocate, Ino, Kill, NewNode, Opening, Owner, RenameFlags, Seek, SetAttr,
    SetXattr, SystemClock, Taken, Volume,
};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Most bytes one copy_file_range request copies; programs ask again for the rest. A revocation waits for requests
/// that are under way.
const COPY_BYTES_MAX: u64 = 8 << 20;
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
/// Attributes of these names are shown to root alone (xattr(7)).
const TRUSTED: &[u8] = b"trusted.";
const SGID: u16 = 0o2000;
/// File handles: whether the open file may write.
const READER: FileHandle = FileHandle(0);
const WRITER: FileHandle = FileHandle(1);

/// The engine behind a FUSE session.
pub(super) struct CmkFs {
    volume: Arc<Volume>,
    cache: CacheMode,
    /// Open handles that may write, per inode: in these files the kernel may hold what the engine has not seen.
    writers: Mutex<HashMap<Ino, u64>>,
    /// There once the session is.
    laundry: Arc<RwLock<Option<Laundry>>>,
    residue: Arc<Residue>,
}

impl CmkFs {
    pub(super) fn new(
        volume: Arc<Volume>,
        cache: CacheMode,
        laundry: Arc<RwLock<Option<Laundry>>>,
        residue: Arc<Residue>,
    ) -> Self {
        Self {
            volume,
            cache,
            writers: Mutex::default(),
            laundry,
            residue,
        }
    }

    /// Calls the engine. A panic is its defect: it is logged, and the caller gets EIO.
    fn call<T>(
        &self,
        operation: &'static str,
        ino: INodeNo,
        call: impl FnOnce(&Volume) -> Result<T, Error>,
    ) -> Result<T, Errno> {
        let outcome = catch_unwind(AssertUnwindSafe(|| call(&self.volume)));
        let error = match outcome {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(_) => {
                tracing::error!(operation, inode = ino.0, "a request panicked");
                return Err(Errno::from_i32(libc::EIO));
            }
        };
        if error.is_alarm() {
            tracing::error!(operation, inode = ino.0, %error, "a request failed");
        }
        Err(Errno::from_i32(error.errno()))
    }

    fn open_flags(&self) -> FopenFlags {
        match self.cache {
            CacheMode::Writeback => FopenFlags::FOPEN_KEEP_CACHE,
            CacheMode::None => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        }
    }

    fn opened(&self, ino: Ino, flags: OpenFlags) -> FileHandle {
        if flags.acc_mode() == OpenAccMode::O_RDONLY {
            return READER;
        }
        *self.writers.lock().entry(ino).or_insert(0) += 1;
        WRITER
    }

    fn released(&self, ino: Ino, handle: FileHandle) {
        if handle != WRITER {
            return;
        }
        let mut writers = self.writers.lock();
        if let Some(count) = writers.get_mut(&ino) {
            *count -= 1;
            if *count == 0 {
                writers.remove(&ino);
            }
        }
    }

    /// What HANDLE_KILLPRIV_V2 leaves to the daemon. The kernel goes on with the mode it knows, for execve(2) too, until
    /// it is told that its attributes are stale.
    fn drop_privileges(
        &self,
        volume: &Volume,
        req: &Request,
        ino: INodeNo,
        wanted: bool,
    ) -> Result<(), Error> {
        if wanted
            && volume.drop_privileges(Ino(ino.0), killed_by(req, &volume.getattr(Ino(ino.0))?))?
            && let Some(laundry) = &*self.laundry.read()
        {
            laundry.expire_attributes(Ino(ino.0));
        }
        Ok(())
    }

    fn make(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
    ) -> Result<Attr, Errno> {
        let kind = kind_of_mode(mode).ok_or(Errno::from_i32(libc::EINVAL))?;
        let node = NewNode {
            kind,
            perm: permissions(mode),
            umask: permissions(umask),
            uid: req.uid(),
            gid: req.gid(),
            rdev,
        };
        self.call("make", parent, |volume| {
            volume.make(Ino(parent.0), name.as_bytes(), &node)
        })
    }
}

/// Whether the caller keeps suid and sgid of what it changes. Its capabilities do not come with a request: root stands
/// for CAP_FSETID.
fn is_privileged(req: &Request) -> bool {
    req.uid() == 0
}

/// Whether the caller has the group's rights, or any. A request says neither its other groups nor, to this version of
/// fuser, what the kernel makes of them (FUSE_SETXATTR_EXT): they are looked up while the caller waits.
fn is_in_group(req: &Request, gid: u32) -> bool {
    is_privileged(req) || req.gid() == gid || other_groups(req.pid()).contains(&gid)
}

/// What a change by the caller takes away. Whether it is in the group matters to sgid alone, and is costly to know.
fn killed_by(req: &Request, attr: &Attr) -> Kill {
    match attr.perm & SGID == 0 || is_in_group(req, attr.gid) {
        true => Kill::ByMember,
        false => Kill::ByStranger,
    }
}

fn owns(req: &Request, attr: &Attr) -> bool {
    is_privileged(req) || req.uid() == attr.uid
}

fn other_groups(pid: u32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let numbers = groups.unwrap_or_default().split_whitespace();
    numbers.filter_map(|number| number.parse().ok()).collect()
}

fn time_of(time: TimeOrNow) -> crate::engine::Timestamp {
    match time {
        TimeOrNow::SpecificTime(time) => timestamp(time),
        TimeOrNow::Now => SystemClock.now(),
    }
}

impl Filesystem for CmkFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        negotiate(config, self.cache);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.call("lookup", parent, |volume| {
            volume.lookup(Ino(parent.0), name.as_bytes())
        }) {
            Err(errno) if errno.code() == libc::ENOENT => reply.entry(&TTL, &negative_attr(), GENERATION),
            found => reply_entry(reply, found),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.volume.forget(Ino(ino.0), nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.residue.wipe_here(req);
        reply_attr(
            reply,
            self.call("getattr", ino, |volume| volume.getattr(Ino(ino.0))),
        );
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // What is left of chown(2) with -1 for both, where the kernel keeps the times. Without even those it is what a write
        // sends ahead, which sees to privileges itself.
        let is_empty =
            (mode, uid, gid, size) == (None, None, None, None) && atime.is_none() && mtime.is_none();
        let is_nothing = is_empty && ctime.is_some();
        // HANDLE_KILLPRIV_V2 leaves it to us: any change of owner, and a change of size by an ordinary user.
        let kills = uid.is_some() || gid.is_some() || is_nothing || (size.is_some() && !is_privileged(req));
        // The kernel changes no times of what it keeps itself, if truncate(2) finds the size there already.
        let keeps_times =
            self.cache == CacheMode::Writeback && size.is_some() && mtime.is_none() && ctime.is_none();
        let mut set = SetAttr {
            perm: mode.map(permissions),
            uid,
            gid,
            size,
            atime: atime.map(time_of),
            mtime: mtime.map(time_of),
            ctime: ctime.map(timestamp),
            kill: Kill::Nothing,
        };
        let changed = self.call("setattr", ino, |volume| {
            if kills || keeps_times {
                let before = volume.getattr(Ino(ino.0))?;
                if kills {
                    set.kill = killed_by(req, &before);
                }
                let is_changed = set.kill.applied_to(before.kind, before.perm) != before.perm;
                if is_nothing && is_changed && !owns(req, &before) {
                    return Err(Error::Posix(libc::EPERM));
                }
                if keeps_times {
                    (set.mtime, set.ctime) = (Some(before.mtime), Some(before.ctime));
                }
            }
            volume.setattr(Ino(ino.0), &set)
        });
        reply_attr(reply, changed);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.call("readlink", ino, |volume| volume.readlink(Ino(ino.0))) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        reply_entry(reply, self.make(req, parent, name, mode, umask, rdev));
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let mode = permissions(mode);
        reply_entry(
            reply,
            self.make(req, parent, name, libc::S_IFDIR | u32::from(mode), umask, 0),
        );
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(
            reply,
            self.call("unlink", parent, |volume| {
                volume.unlink(Ino(parent.0), name.as_bytes())
            }),
        );
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(
            reply,
            self.call("rmdir", parent, |volume| {
                volume.rmdir(Ino(parent.0), name.as_bytes())
            }),
        );
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().as_bytes();
        let made = self.call("symlink", parent, |volume| {
            volume.symlink(Ino(parent.0), name.as_bytes(), target, req.uid(), req.gid())
        });
        reply_entry(reply, made);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = RenameFlags {
            no_replace: flags.contains(fuser::RenameFlags::RENAME_NOREPLACE),
            exchange: flags.contains(fuser::RenameFlags::RENAME_EXCHANGE),
            whiteout: flags
                .contains(fuser::RenameFlags::RENAME_WHITEOUT)
                .then(|| Owner {
                    uid: req.uid(),
                    gid: req.gid(),
                }),
        };
        let (from, to) = (
            (Ino(parent.0), name.as_bytes()),
            (Ino(newparent.0), newname.as_bytes()),
        );
        reply_empty(
            reply,
            self.call("rename", parent, |volume| {
                volume.rename(from.0, from.1, to.0, to.1, flags)
            }),
        );
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let linked = self.call("link", ino, |volume| {
            volume.link(Ino(ino.0), Ino(newparent.0), newname.as_bytes())
        });
        reply_entry(reply, linked);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.call("open", ino, |volume| {
            let wanted = match flags.0 & libc::O_ACCMODE {
                libc::O_RDONLY => Opening::ToRead,
                _ => Opening::ToWrite,
            };
            volume.open_file(Ino(ino.0), wanted)?;
            if flags.0 & libc::O_TRUNC != 0 {
                let kill = match is_privileged(req) {
                    true => Kill::Nothing,
                    false => killed_by(req, &volume.getattr(Ino(ino.0))?),
                };
                let set = SetAttr {
                    size: Some(0),
                    kill,
                    ..SetAttr::default()
                };
                volume.setattr(Ino(ino.0), &set)?;
            }
            Ok(())
        });
        match opened {
            Ok(()) => reply.opened(self.opened(Ino(ino.0), flags), self.open_flags()),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let mode = libc::S_IFREG | u32::from(permissions(mode));
        match self.make(req, parent, name, mode, umask, 0) {
            Ok(attr) => {
                let handle = self.opened(attr.ino, OpenFlags(flags));
                reply.created(&TTL, &file_attr(&attr), GENERATION, handle, self.open_flags());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        match self.call("read", ino, |volume| volume.read(Ino(ino.0), offset, &mut buffer)) {
            Ok(count) => reply.data(buffer.get(..count).unwrap_or_default()),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.residue.note(data);
        let is_writeback = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let written = self.call("write", ino, |volume| match is_writeback {
            true => volume.write_back(Ino(ino.0), offset, data).map(|()| data.len()),
            false => {
                self.drop_privileges(volume, req, ino, kill)?;
                volume.write(Ino(ino.0), offset, data)
            }
        });
        match written {
            Ok(count) => reply.written(u32::try_from(count).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // The kernel writes the pages back itself, and stops asking.
        reply.error(Errno::from_i32(libc::ENOSYS));
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.released(Ino(ino.0), fh);
        reply.ok();
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(reply, self.call("fsync", ino, |volume| volume.fsync(Ino(ino.0))));
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // READDIR finds the directory by its inode; the kernel stops asking.
        reply.error(Errno::from_i32(libc::ENOSYS));
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.call("readdir", ino, |volume| {
            volume.readdir(Ino(ino.0), Cookie(offset), &mut |entry| {
                let name = OsStr::from_bytes(entry.name);
                taken(reply.add(INodeNo(entry.ino.0), entry.cookie.0, file_type(entry.kind), name))
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.call("readdirplus", ino, |volume| {
            volume.readdirplus(Ino(ino.0), Cookie(offset), &mut |entry, attr| {
                let name = OsStr::from_bytes(entry.name);
                // Without attributes, and to be asked about again: its key may be had by then.
                let (attr, ttl) = match attr {
                    Some(attr) => (file_attr(attr), TTL),
                    None => (dark_attr(entry.ino), Duration::ZERO),
                };
                taken(reply.add(
                    INodeNo(entry.ino.0),
                    entry.cookie.0,
                    name,
                    &ttl,
                    &attr,
                    GENERATION,
                ))
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(
            reply,
            self.call("fsyncdir", ino, |volume| volume.fsync(Ino(ino.0))),
        );
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        match self.call("statfs", ino, Volume::statfs) {
            Ok(s) => reply.statfs(
                s.blocks,
                s.blocks_free,
                s.blocks_available,
                s.files,
                s.files_free,
                s.block_size,
                s.name_max,
                s.block_size,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.residue.note(value);
        let how = match flags & (libc::XATTR_CREATE | libc::XATTR_REPLACE) {
            libc::XATTR_CREATE => SetXattr::Create,
            libc::XATTR_REPLACE => SetXattr::Replace,
            _ => SetXattr::Any,
        };
        let set = self.call("setxattr", ino, |volume| {
            let kill_sgid =
                name.as_bytes() == ACCESS_ACL && !is_in_group(req, volume.getattr(Ino(ino.0))?.gid);
            volume.setxattr(Ino(ino.0), name.as_bytes(), value, how, kill_sgid)
        });
        reply_empty(reply, set);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let value = self.call("getxattr", ino, |volume| {
            volume.getxattr(Ino(ino.0), name.as_bytes())
        });
        reply_xattr(reply, size, value);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.call("listxattr", ino, |volume| volume.listxattr(Ino(ino.0)));
        let list = names.map(|names| {
            names
                .into_iter()
                .filter(|name| is_privileged(req) || !name.starts_with(TRUSTED))
                .flat_map(|name| name.into_iter().chain([0]))
                .collect()
        });
        reply_xattr(reply, size, list);
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.call("removexattr", ino, |volume| {
            volume.removexattr(Ino(ino.0), name.as_bytes())
        });
        reply_empty(reply, removed);
    }

    fn access(&self, _req: &Request, ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself (default_permissions); what is left is whether the key may be used.
        reply_empty(
            reply,
            self.call("access", ino, |volume| volume.check_key(Ino(ino.0))),
        );
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let how = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => Fallocate::Allocate { keep_size },
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => Fallocate::PunchHole,
            libc::FALLOC_FL_ZERO_RANGE => Fallocate::ZeroRange { keep_size },
            _ => return reply.error(Errno::from_i32(libc::EOPNOTSUPP)),
        };
        let done = self.call("fallocate", ino, |volume| {
            self.drop_privileges(volume, req, ino, !is_privileged(req))?;
            volume.fallocate(Ino(ino.0), how, offset, length)
        });
        reply_empty(reply, done);
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::from_i32(libc::EINVAL)),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::from_i32(libc::ENXIO));
        };
        let ino = Ino(ino.0);
        if self.writers.lock().contains_key(&ino)
            && let Some(laundry) = &*self.laundry.read()
        {
            return laundry.take(Search {
                ino,
                offset,
                what,
                reply,
            });
        }
        let found = self.call("lseek", INodeNo(ino.0), |volume| volume.seek(ino, offset, what));
        answer_search(reply, found.map_err(|errno| errno.code()));
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        // Programs ask any file whether it is a terminal.
        reply.error(Errno::from_i32(libc::ENOTTY));
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let len = len.min(COPY_BYTES_MAX);
        let copied = self.call("copy_file_range", ino_out, |volume| {
            self.drop_privileges(volume, req, ino_out, !is_privileged(req))?;
            volume.copy_range(Ino(ino_in.0), offset_in, Ino(ino_out.0), offset_out, len)
        });
        match copied {
            Ok(count) => reply.written(u32::try_from(count).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno),
        }
    }
}

fn taken(is_full: bool) -> Taken {
    if is_full { Taken::Full } else { Taken::Yes }
}
