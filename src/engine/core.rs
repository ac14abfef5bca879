//! What an open volume consists of, and how an operation gets at it: through an [`Access`], which proves that the
//! volume's keys may be used for as long as it is held.

use super::active::Active;
use super::bell::Bell;
use super::chunkcache::ChunkCache;
use super::clock::Clock;
use super::commit::{Batch, Committer, Seq};
use super::dek::Misses;
use super::error::{Error, Result};
use super::format::inode::InodeRecord;
use super::format::root::SealRecord;
use super::format::rowkey::{self, Family};
use super::keyring::{Admission, Keyring, Purpose};
use super::keys::DomainKeys;
use super::keyservice::CacheObserver;
use super::node::{Node, NodeTable};
use super::nursery::Nursery;
use super::orphan::Orphans;
use super::slots::Slots;
use super::space::{Room, Space};
use super::store::Store;
use super::sync::{Mutex, rank};
use super::types::{FileKind, Ino, Timestamp};
use super::volume::Options;
use std::collections::HashSet;
use std::fs::File;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::SyncSender;

/// What the records of something new take of the host, generously, in bytes.
const RECORDS_BYTES: usize = 4096;

/// The parts of an open volume.
pub(crate) struct Core {
    pub(crate) dir: PathBuf,
    pub(crate) options: Options,
    pub(crate) store: Arc<Store>,
    pub(crate) space: Arc<Space>,
    pub(crate) committer: Committer,
    pub(crate) keyring: Keyring,
    pub(crate) slots: Slots,
    pub(crate) nodes: NodeTable,
    pub(crate) chunks: ChunkCache,
    pub(crate) nursery: Nursery,
    pub(crate) misses: Misses,
    pub(crate) active: Active,
    pub(crate) orphans: Orphans,
    /// Files of which a failed sync lost content: they outlive their nodes (rule R6).
    pub(crate) poisoned: Mutex<HashSet<Ino>, rank::Poisoned>,
    /// Held by renames from one directory to another: while it is, no directory's ancestors change.
    pub(crate) rename: Mutex<(), rank::Rename>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) observer: Mutex<Option<Arc<dyn CacheObserver>>, rank::Observer>,
    /// Whether somebody here wants the volume dark, whatever the KMS says. Held over every change of the key's state.
    pub(crate) is_shut_by_hand: Mutex<bool, rank::Darkening>,
    /// Whether slot files may hold what an unclean stop left.
    pub(crate) is_unswept: AtomicBool,
    /// What the seal file says.
    pub(crate) sealed: Mutex<SealRecord, rank::SealFile>,
    /// Wakes the thread that publishes, drains and reclaims.
    pub(crate) upkeep_bell: Bell,
    /// Whether the host ran low, and what was deleted has not been given back to it since.
    pub(crate) is_compaction_due: AtomicBool,
    /// Wakes the thread that compacts.
    pub(crate) compact_bell: Bell,
    /// Wakes the thread that watches the CMK's state.
    pub(crate) key_bell: Bell,
    /// Work for the thread that fetches keys ahead of their use.
    pub(crate) fetches: SyncSender<Fetch>,
    /// Holds the volume's exclusive flock(2).
    pub(crate) _lock: File,
}

/// A job for the thread that fetches keys ahead of their use.
#[derive(Debug)]
pub(crate) enum Fetch {
    /// Fresh DEKs for inodes not yet born.
    Nursery,
    /// The DEKs of files that a directory listing showed.
    Files(Vec<Ino>),
    /// The volume is being closed.
    Stop,
}

/// A volume whose keys are there, for the length of one operation.
pub(crate) struct Access<'c> {
    core: &'c Core,
    admission: Admission<'c>,
}

impl Deref for Access<'_> {
    type Target = Core;

    fn deref(&self) -> &Core {
        self.core
    }
}

impl Core {
    /// Access for an operation that shows something to a program.
    pub(crate) fn serve(&self) -> Result<Access<'_>> {
        self.access(Purpose::Serve)
    }

    /// Access for an operation that a program makes to change something.
    pub(crate) fn change(&self) -> Result<Access<'_>> {
        self.refuse_read_only()?;
        self.access(Purpose::Serve)
    }

    /// Access for an operation that takes in what was accepted before the key was revoked.
    pub(crate) fn drain(&self) -> Result<Access<'_>> {
        self.refuse_read_only()?;
        self.access(Purpose::Drain)
    }

    fn access(&self, purpose: Purpose) -> Result<Access<'_>> {
        Ok(self.with_keys(self.keyring.admit(purpose)?))
    }

    pub(crate) fn with_keys<'c>(&'c self, admission: Admission<'c>) -> Access<'c> {
        Access {
            core: self,
            admission,
        }
    }

    fn refuse_read_only(&self) -> Result<()> {
        if self.options.read_only {
            Err(Error::Posix(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// Takes room on the host for `bytes`, and says how much there was.
    pub(crate) fn take_room(&self, bytes: usize) -> Result<Room> {
        self.space.take(bytes as u64, self.active.pending_bytes())
    }

    /// Takes room for something new that is small.
    ///
    /// # Errors
    /// ENOSPC if only what frees space, or changes what is there, may have what is left.
    pub(crate) fn take_room_to_grow(&self) -> Result<()> {
        match self.take_room(RECORDS_BYTES)? {
            Room::Plenty => Ok(()),
            Room::Low | Room::Reserve => Err(Error::Posix(libc::ENOSPC)),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Hands a job to the fetching thread; with its queue full the keys are fetched when they are needed.
    pub(crate) fn fetch_ahead(&self, job: Fetch) {
        if let Err(error) = self.fetches.try_send(job) {
            tracing::debug!(%error, "no key is fetched ahead");
        }
    }
}

impl Access<'_> {
    pub(crate) fn keys(&self) -> &DomainKeys {
        self.admission.keys()
    }

    /// Whether this is of what was accepted before the key was revoked.
    pub(crate) fn is_draining(&self) -> bool {
        self.admission.is_draining()
    }

    /// The opened row of the family `meta` under `key`, which belongs to `ino`.
    pub(crate) fn row(&self, ino: Ino, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let sealed = self.store.get(Family::Meta, key)?;
        sealed.map(|sealed| self.open_row(ino, key, &sealed)).transpose()
    }

    pub(crate) fn open_row(&self, ino: Ino, key: &[u8], sealed: &[u8]) -> Result<Vec<u8>> {
        self.keys()
            .open_row(Family::Meta, key, sealed)
            .ok_or_else(|| Error::corrupt_inode(ino))
    }

    pub(crate) fn put_row(&self, batch: &mut Batch, key: Vec<u8>, plain: &[u8]) -> Result<()> {
        let sealed = self.keys().seal_row(Family::Meta, &key, plain)?;
        batch.put(Family::Meta, key, sealed);
        Ok(())
    }

    pub(crate) fn put_inode(&self, batch: &mut Batch, ino: Ino, record: &InodeRecord) -> Result<()> {
        self.put_row(batch, rowkey::inode(ino), &record.encode())
    }

    pub(crate) fn commit(&self, batch: Batch) -> Result<Seq> {
        self.committer.commit(self.keys(), batch)
    }

    /// The stored record of an inode that may not be there.
    pub(crate) fn stored_record(&self, ino: Ino) -> Result<Option<InodeRecord>> {
        let plain = self.row(ino, &rowkey::inode(ino))?;
        plain.map(|plain| decode_record(ino, &plain)).transpose()
    }

    /// The node of an inode.
    ///
    /// # Errors
    /// ESTALE if there is no such inode.
    pub(crate) fn node(&self, ino: Ino) -> Result<Arc<Node>> {
        loop {
            let seen = match self.nodes.find(ino) {
                Ok(node) => return Ok(node),
                Err(seen) => seen,
            };
            let record = self.stored_record(ino)?.ok_or(Error::Posix(libc::ESTALE))?;
            let node = Node::new(ino, record, self.poisoned.lock().contains(&ino));
            if let Some(node) = self.nodes.insert(node, seen) {
                return Ok(node);
            }
        }
    }

    /// The node of a directory.
    ///
    /// # Errors
    /// ENOTDIR if it is none.
    pub(crate) fn directory(&self, ino: Ino) -> Result<Arc<Node>> {
        let node = self.node(ino)?;
        let kind = node.state.read().record.kind;
        if kind == FileKind::Directory {
            Ok(node)
        } else {
            Err(Error::Posix(libc::ENOTDIR))
        }
    }

    /// The node of a regular file.
    ///
    /// # Errors
    /// EISDIR for a directory, EINVAL for other kinds.
    pub(crate) fn regular(&self, ino: Ino) -> Result<Arc<Node>> {
        let node = self.node(ino)?;
        let kind = node.state.read().record.kind;
        match kind {
            FileKind::Regular => Ok(node),
            FileKind::Directory => Err(Error::Posix(libc::EISDIR)),
            _ => Err(Error::Posix(libc::EINVAL)),
        }
    }
}

pub(crate) fn decode_record(ino: Ino, plain: &[u8]) -> Result<InodeRecord> {
    InodeRecord::decode(plain).map_err(|_| Error::corrupt_inode(ino))
}
