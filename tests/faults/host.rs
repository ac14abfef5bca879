//! The host: a filesystem in memory, served through FUSE, on which every request that the engine and RocksDB make can be made
//! to fail. The kernel caches no content of it and no attribute, so that each write(2), read(2) and fsync(2) arrives, and its
//! answer is the caller's.

use crate::tree::{Answer, BLOCK, Body, CAPACITY_BYTES, Content, Node, ROOT, Tree};
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};
use rustix::mount::UnmountFlags;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

/// Names change through this kernel alone.
const NAME_TTL: Duration = Duration::from_secs(3600);

/// What is asked of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Write,
    Fsync,
    FsyncDir,
    Create,
    Mkdir,
    Rename,
    Unlink,
    Rmdir,
    Fallocate,
    Setattr,
    Lookup,
    Getattr,
    Open,
    Read,
    Readdir,
    Seek,
}

/// Requests that are counted together: each is a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Everything that changes something or makes it durable.
    Changes,
    Writes,
    Fsyncs,
    /// Everything that asks.
    Reads,
}

impl Class {
    const ALL: [Self; 4] = [Self::Changes, Self::Writes, Self::Fsyncs, Self::Reads];

    fn has(self, kind: Kind) -> bool {
        let asks = matches!(
            kind,
            Kind::Lookup | Kind::Getattr | Kind::Open | Kind::Read | Kind::Readdir | Kind::Seek
        );
        match self {
            Self::Changes => !asks,
            Self::Writes => kind == Kind::Write,
            Self::Fsyncs => kind == Kind::Fsync,
            Self::Reads => asks,
        }
    }
}

/// How a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// With EIO; nothing is done.
    Eio,
    /// With ENOSPC; nothing is done.
    Enospc,
    /// A write takes in a part, and says so.
    Short,
    /// A write takes in a part, and fails with EIO.
    Torn,
    /// A sync fails with EIO, and what was not synced is lost: the kernel drops pages that it could not write.
    Lost,
    /// A request that asks fails with EIO.
    Unreadable,
}

impl Fault {
    pub const ALL: [Self; 6] = [
        Self::Eio,
        Self::Enospc,
        Self::Short,
        Self::Torn,
        Self::Lost,
        Self::Unreadable,
    ];

    /// The requests that may fail in this way.
    pub fn class(self) -> Class {
        match self {
            Self::Eio | Self::Enospc => Class::Changes,
            Self::Short | Self::Torn => Class::Writes,
            Self::Lost => Class::Fsyncs,
            Self::Unreadable => Class::Reads,
        }
    }

    fn errno(self) -> i32 {
        match self {
            Self::Enospc => libc::ENOSPC,
            _ => libc::EIO,
        }
    }
}

/// What is to fail.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub fault: Fault,
    /// The first request that fails, of those that may.
    pub site: usize,
    /// How many fail, one after the other.
    pub length: usize,
}

impl Plan {
    /// The length of what does not end before the volume does: its host is gone.
    pub const FOR_GOOD: usize = usize::MAX;
}

/// How many requests of each class there were.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sites([usize; Class::ALL.len()]);

impl Sites {
    pub fn of(&self, class: Class) -> usize {
        self.0[class as usize]
    }
}

type Listing = Vec<(u64, FileType, OsString)>;

struct State {
    tree: Tree,
    plan: Option<Plan>,
    sites: Sites,
    /// The requests that failed, and what they were about.
    failed: Vec<String>,
    listings: HashMap<u64, Listing>,
    handles: u64,
}

impl State {
    /// Counts a request, and says how it is to fail.
    fn admit(&mut self, kind: Kind, path: impl FnOnce(&Tree) -> String) -> Option<Fault> {
        let mut fault = None;
        for class in Class::ALL.into_iter().filter(|class| class.has(kind)) {
            let site = self.sites.0[class as usize];
            self.sites.0[class as usize] += 1;
            let planned = self.plan.filter(|plan| plan.fault.class() == class);
            let is_hit = |plan: &Plan| (plan.site..plan.site.saturating_add(plan.length)).contains(&site);
            fault = fault.or(planned.filter(is_hit).map(|plan| plan.fault));
        }
        if fault.is_some() {
            self.failed.push(format!("{kind:?} {}", path(&self.tree)));
        }
        fault
    }

    /// The same for a request that does nothing if it fails.
    fn pass(&mut self, kind: Kind, path: impl FnOnce(&Tree) -> String) -> Answer<()> {
        self.admit(kind, path).map_or(Ok(()), |fault| Err(fault.errno()))
    }

    fn pass_on(&mut self, kind: Kind, ino: u64) -> Answer<()> {
        self.pass(kind, |tree| path_of(tree, ino))
    }

    fn write(&mut self, ino: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        // No multiple of anything that a record or a block is a multiple of.
        let part = data.get(..(data.len() * 5 / 8).max(1)).unwrap_or(data);
        match self.admit(Kind::Write, |tree| path_of(tree, ino)) {
            None => self.tree.write(ino, offset, data).map(|()| data.len() as u32),
            Some(Fault::Short) => self.tree.write(ino, offset, part).map(|()| part.len() as u32),
            Some(Fault::Torn) => self.tree.write(ino, offset, part).and(Err(libc::EIO)),
            Some(fault) => Err(fault.errno()),
        }
    }

    fn fsync(&mut self, ino: u64) -> Answer<()> {
        match self.admit(Kind::Fsync, |tree| path_of(tree, ino)) {
            None => self.tree.sync(ino),
            Some(Fault::Lost) => self.tree.lose_pages(ino).and(Err(libc::EIO)),
            Some(fault) => Err(fault.errno()),
        }
    }

    fn attr(&self, ino: u64) -> Answer<FileAttr> {
        Ok(attr(ino, self.tree.node(ino)?))
    }
}

fn path_of(tree: &Tree, ino: u64) -> String {
    tree.node(ino)
        .map_or_else(|_| "?".to_owned(), |node| node.path.clone())
}

/// A host in use. Its clones are the same host.
#[derive(Clone)]
pub struct Host(Arc<Mutex<State>>);

impl Host {
    pub fn new(tree: Tree) -> Self {
        Self(Arc::new(Mutex::new(State {
            tree,
            plan: None,
            sites: Sites::default(),
            failed: Vec::new(),
            listings: HashMap::new(),
            handles: 0,
        })))
    }

    /// From now on requests are counted, and fail as planned.
    pub fn arm(&self, plan: Option<Plan>) {
        let mut state = self.0.lock().unwrap();
        state.plan = plan;
        state.sites = Sites::default();
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.0.lock().unwrap().plan = None;
    }

    /// How many requests there were since it was armed.
    pub fn sites(&self) -> Sites {
        self.0.lock().unwrap().sites
    }

    pub fn failed(&self) -> Vec<String> {
        self.0.lock().unwrap().failed.clone()
    }

    /// What it holds, for other hosts to begin with.
    pub fn tree(&self) -> Tree {
        self.0.lock().unwrap().tree.clone()
    }

    /// What was not synced is lost, of files that a seed determines. Nothing may be open.
    pub fn lose_power(&self, seed: u64) {
        let is_kept = |ino: u64| (ino ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 1;
        self.0.lock().unwrap().tree.lose_power(is_kept);
    }

    fn do_with<T>(&self, work: impl FnOnce(&mut State) -> Answer<T>) -> Result<T, Errno> {
        work(&mut self.0.lock().unwrap()).map_err(Errno::from_i32)
    }
}

/// A host that is mounted. It is unmounted whatever happens.
pub struct Mounted {
    pub host: Host,
    pub scratch: TempDir,
    session: Option<BackgroundSession>,
}

impl Mounted {
    pub fn new(tree: Tree) -> Self {
        let scratch = tempfile::Builder::new()
            .prefix("cmkfs-faults.")
            .tempdir()
            .unwrap();
        let host = Host::new(tree);
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("faults".to_owned())];
        let session = fuser::spawn_mount(host.clone(), scratch.path(), &config).unwrap();
        Self {
            host,
            scratch,
            session: Some(session),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(Err(_)) = self.session.take().map(BackgroundSession::umount_and_join) {
            detach(self.scratch.path());
        }
    }
}

/// Unmounts what may be in use, if it is mounted.
pub fn detach(mountpoint: &Path) {
    match rustix::mount::unmount(mountpoint, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(error) => println!("{} stays mounted: {error}", mountpoint.display()),
    }
}

fn file_type(node: &Node) -> FileType {
    match node.body {
        Body::Directory(_) => FileType::Directory,
        Body::File(_) => FileType::RegularFile,
    }
}

fn attr(ino: u64, node: &Node) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: node.size(),
        blocks: node.allocated_blocks() * (BLOCK as u64 / 512),
        atime: node.modified,
        mtime: node.modified,
        ctime: node.modified,
        crtime: UNIX_EPOCH,
        kind: file_type(node),
        perm: 0o700,
        nlink: node.nlink(),
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

fn reply_empty(reply: ReplyEmpty, done: Result<(), Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn reply_entry(reply: ReplyEntry, found: Result<FileAttr, Errno>) {
    match found {
        Ok(attr) => reply.entry_with_ttls(&Duration::ZERO, &NAME_TTL, &attr, Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

fn reply_attr(reply: ReplyAttr, attr: Result<FileAttr, Errno>) {
    match attr {
        Ok(attr) => reply.attr(&Duration::ZERO, &attr),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Host {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.do_with(|state| {
            state.pass(Kind::Lookup, |tree| tree.path(parent.0, name))?;
            state.attr(state.tree.child(parent.0, name)?)
        });
        reply_entry(reply, found);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let attr = self.do_with(|state| {
            state.pass_on(Kind::Getattr, ino.0)?;
            state.attr(ino.0)
        });
        reply_attr(reply, attr);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let attr = self.do_with(|state| {
            state.pass_on(Kind::Setattr, ino.0)?;
            if let Some(size) = size {
                state.tree.resize(ino.0, size)?;
            }
            match mtime {
                Some(TimeOrNow::SpecificTime(time)) => state.tree.set_modified(ino.0, time)?,
                Some(TimeOrNow::Now) => state.tree.set_modified(ino.0, SystemTime::now())?,
                None => {}
            }
            state.attr(ino.0)
        });
        reply_attr(reply, attr);
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.do_with(|state| {
            state.pass(Kind::Mkdir, |tree| tree.path(parent.0, name))?;
            let ino = state
                .tree
                .make(parent.0, name, Body::Directory(BTreeMap::new()))?;
            state.attr(ino)
        });
        reply_entry(reply, made);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.do_with(|state| {
            state.pass(Kind::Rmdir, |tree| tree.path(parent.0, name))?;
            state.tree.rmdir(parent.0, name)
        });
        reply_empty(reply, done);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.do_with(|state| {
            state.pass(Kind::Unlink, |tree| tree.path(parent.0, name))?;
            state.tree.unlink(parent.0, name)
        });
        reply_empty(reply, done);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = self.do_with(|state| {
            state.pass(Kind::Rename, |tree| tree.path(newparent.0, newname))?;
            if !flags.is_empty() {
                return Err(libc::EINVAL);
            }
            state.tree.rename(parent.0, name, newparent.0, newname)
        });
        reply_empty(reply, done);
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.do_with(|state| {
            state.pass(Kind::Create, |tree| tree.path(parent.0, name))?;
            let ino = state.tree.make(parent.0, name, Body::File(Content::default()))?;
            state.tree.open(ino)?;
            state.attr(ino)
        });
        match made {
            Ok(attr) => reply.created(
                &Duration::ZERO,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let done = self.do_with(|state| {
            state.pass_on(Kind::Open, ino.0)?;
            state.tree.open(ino.0)
        });
        match done {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno),
        }
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(reply, self.do_with(|state| state.tree.release(ino.0)));
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
        let data = self.do_with(|state| {
            state.pass_on(Kind::Read, ino.0)?;
            Ok(state.tree.content(ino.0)?.read(offset, size as usize))
        });
        match data {
            Ok(data) => reply.data(&data),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.do_with(|state| state.write(ino.0, offset, data)) {
            Ok(count) => reply.written(count),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(reply, self.do_with(|state| state.fsync(ino.0)));
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(reply, self.do_with(|state| state.pass_on(Kind::FsyncDir, ino.0)));
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.do_with(|state| {
            state.pass_on(Kind::Open, ino.0)?;
            let mut listing: Listing = [".", ".."]
                .map(|name| (ROOT, FileType::Directory, OsString::from(name)))
                .to_vec();
            for (name, child) in state.tree.entries(ino.0)? {
                listing.push((*child, file_type(state.tree.node(*child)?), name.clone()));
            }
            state.handles += 1;
            state.listings.insert(state.handles, listing);
            Ok(FileHandle(state.handles))
        });
        match opened {
            Ok(handle) => reply.opened(handle, FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let done = self.do_with(|state| {
            state.pass_on(Kind::Readdir, ino.0)?;
            let listing = state.listings.get(&fh.0).ok_or(libc::EBADF)?;
            for (index, (child, kind, name)) in listing.iter().enumerate().skip(offset as usize) {
                if reply.add(INodeNo(*child), index as u64 + 1, *kind, name) {
                    break;
                }
            }
            Ok(())
        });
        match done {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.0.lock().unwrap().listings.remove(&fh.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let free = self.0.lock().unwrap().tree.free_blocks();
        let (blocks, size) = (CAPACITY_BYTES / BLOCK as u64, BLOCK as u32);
        reply.statfs(blocks, free, free, 1 << 20, 1 << 20, size, 255, size);
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.do_with(|state| {
            state.pass_on(Kind::Fallocate, ino.0)?;
            state.tree.fallocate(ino.0, offset, length, mode)
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
        let found = self.do_with(|state| {
            state.pass_on(Kind::Seek, ino.0)?;
            state.tree.seek(ino.0, offset as u64, whence == libc::SEEK_DATA)
        });
        match found {
            Ok(at) => reply.offset(at as i64),
            Err(errno) => reply.error(errno),
        }
    }
}
