//! The disk: one file in a FUSE filesystem of its own. What is written to it lies over an image that does not change, and
//! each write and each flush is recorded in its order. The kernel caches nothing of it.

use crate::random::Random;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, WriteFlags,
};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

pub const DISK_BYTES: u64 = 384 << 20;
/// What a disk writes whole, or not at all.
const BLOCK: usize = 4096;
const FILE: INodeNo = INodeNo(2);
pub const FILE_NAME: &str = "disk";
const TTL: Duration = Duration::from_secs(3600);

/// What a disk holds: blocks that were never written are zeros.
#[derive(Default, Clone)]
pub struct Image(HashMap<u64, Arc<[u8; BLOCK]>>);

impl Image {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let skip = (at % BLOCK as u64) as usize;
            let (part, tail) = rest.split_at(rest.len().min(BLOCK - skip));
            let block = self
                .0
                .entry(at / BLOCK as u64)
                .or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(block)[skip..skip + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            rest = tail;
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let skip = (at % BLOCK as u64) as usize;
            let count = (into.len() - done).min(BLOCK - skip);
            match self.0.get(&(at / BLOCK as u64)) {
                Some(block) => into[done..done + count].copy_from_slice(&block[skip..skip + count]),
                None => into[done..done + count].fill(0),
            }
            done += count;
        }
    }
}

/// What reached the disk.
enum Record {
    Write { offset: u64, data: Vec<u8> },
    Flush,
}

struct State {
    image: Image,
    log: Vec<Record>,
}

/// A disk in use. Its clones are the same disk.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn new(image: Arc<Image>) -> Self {
        let state = State {
            image: (*image).clone(),
            log: Vec::new(),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    pub fn attach(&self, mountpoint: &Path) -> BackgroundSession {
        let mut config = Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("powercut".to_owned())];
        fuser::spawn_mount(self.clone(), mountpoint, &config).unwrap()
    }

    /// How many writes and flushes have reached it.
    pub fn position(&self) -> usize {
        self.0.lock().unwrap().log.len()
    }

    pub fn image(&self) -> Arc<Image> {
        Arc::new(self.0.lock().unwrap().image.clone())
    }

    /// What was recorded, on top of what the disk held in the beginning.
    pub fn recorded(&self, base: Arc<Image>) -> Recorded {
        let log = std::mem::take(&mut self.0.lock().unwrap().log);
        Recorded { base, log }
    }
}

/// A recorded run.
pub struct Recorded {
    base: Arc<Image>,
    log: Vec<Record>,
}

/// What a disk may hold when power fails.
pub struct Cut {
    pub image: Arc<Image>,
    /// Writes and flushes that had been sent to it.
    pub length: usize,
}

impl Recorded {
    pub fn len(&self) -> usize {
        self.log.len()
    }

    /// Everything up to some flush is on the disk; of what came after it, until the next, any part, the last of it torn.
    pub fn random_cut(&self, random: &mut Random) -> Cut {
        let is_flush = |index: &usize| matches!(self.log[*index], Record::Flush);
        let flushes: Vec<_> = (0..self.log.len()).filter(is_flush).collect();
        let from = *random.pick(&flushes);
        let to = flushes
            .into_iter()
            .find(|flush| *flush > from)
            .unwrap_or(self.log.len());
        let mut image = (*self.base).clone();
        for record in &self.log[..from] {
            if let Record::Write { offset, data } = record {
                image.write(*offset, data);
            }
        }
        let rest: Vec<_> = self.log[from..to].iter().collect();
        let (all, none) = (random.one_in(4), random.one_in(4));
        for record in &rest {
            let Record::Write { offset, data } = record else {
                continue;
            };
            if all || (!none && random.one_in(2)) {
                let blocks = (data.len() / BLOCK) as u64;
                let is_torn = !all && blocks > 1 && random.one_in(4);
                let length = match is_torn {
                    true => random.below(blocks) as usize * BLOCK,
                    false => data.len(),
                };
                image.write(*offset, &data[..length]);
            }
        }
        Cut {
            image: Arc::new(image),
            length: to,
        }
    }
}

fn attr(ino: INodeNo) -> FileAttr {
    let is_file = ino == FILE;
    FileAttr {
        ino,
        size: if is_file { DISK_BYTES } else { 0 },
        blocks: if is_file { DISK_BYTES / 512 } else { 0 },
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_file {
            FileType::RegularFile
        } else {
            FileType::Directory
        },
        perm: if is_file { 0o600 } else { 0o700 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == FILE_NAME {
            reply.entry(&TTL, &attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attr(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = DISK_BYTES.saturating_sub(offset).min(u64::from(size));
        let mut data = vec![0; left as usize];
        self.0.lock().unwrap().image.read(offset, &mut data);
        reply.data(&data);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        {
            let mut state = self.0.lock().unwrap();
            state.image.write(offset, data);
            state.log.push(Record::Write {
                offset,
                data: data.to_vec(),
            });
        }
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().log.push(Record::Flush);
        reply.ok();
    }
}
