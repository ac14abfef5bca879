//! What an open volume consists of, and how an operation gets at it: through an [`Access`], which proves that the
//! keys of a domain, and those of the volume's first, may be used for as long as it is held.

use super::active::Active;
use super::batch::Batch;
use super::bell::Bell;
use super::chunkcache::ChunkCache;
use super::clock::Clock;
use super::commit::{Committer, Seq};
use super::domains::{Domains, KeyDomain};
use super::error::{Error, Result};
use super::filekeys::FileKeys;
use super::format::inode::InodeRecord;
use super::format::root::SealRecord;
use super::format::rowkey::{self, Family};
use super::format::rowsum::RowSum;
use super::format::seal::Seal;
use super::keyring::{Admission, KeyState, Purpose};
use super::keys::DomainKeys;
use super::keyservice::CacheObserver;
use super::node::{Node, NodeTable, Stored};
use super::orphan::Orphans;
use super::slots::Slots;
use super::space::{Room, Space};
use super::store::Store;
use super::sync::{Mutex, rank};
use super::types::{Domain, FileKind, Ino, Timestamp};
use super::verification::VerifierBell;
use super::volume::Options;
use kms_crypto::Nonce;
use std::collections::HashSet;
use std::fs::File;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{SyncSender, TrySendError};

/// What the records of something new take of the host, generously, in bytes.
const RECORDS_BYTES: usize = 4096;

/// The parts of an open volume.
pub(crate) struct Core {
    pub(crate) dir: PathBuf,
    pub(crate) options: Options,
    pub(crate) store: Arc<Store>,
    pub(crate) space: Arc<Space>,
    pub(crate) committer: Committer,
    pub(crate) domains: Domains,
    /// The keys of files, of every domain.
    pub(crate) file_keys: Arc<FileKeys>,
    pub(crate) slots: Slots,
    pub(crate) nodes: NodeTable,
    pub(crate) chunks: ChunkCache,
    pub(crate) active: Active,
    pub(crate) orphans: Orphans,
    /// Files of which a failed sync lost content: they outlive their nodes (rule R6).
    pub(crate) poisoned: Mutex<HashSet<Ino>, rank::Poisoned>,
    /// Held by renames from one directory to another: while it is, no directory's ancestors change.
    pub(crate) rename: Mutex<(), rank::Rename>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) observer: Mutex<Option<Arc<dyn CacheObserver>>, rank::Observer>,
    /// Whether slot files may hold what an unclean stop left.
    pub(crate) is_unswept: AtomicBool,
    /// Whether the volume was put back on purpose, and the KMS has not taken that in yet.
    pub(crate) is_restored: AtomicBool,
    /// What the seal file says.
    pub(crate) sealed: Mutex<SealRecord, rank::SealFile>,
    /// Wakes the thread that publishes, drains and reclaims.
    pub(crate) upkeep_bell: Bell,
    /// Whether the host ran low, and what was deleted has not been given back to it since.
    pub(crate) is_compaction_due: AtomicBool,
    /// Wakes the thread that ends key domains.
    pub(crate) domains_bell: Bell,
    /// Wakes the thread that compacts.
    pub(crate) compact_bell: Bell,
    /// Wakes the thread that verifies.
    pub(crate) verify_bell: VerifierBell,
    /// Wakes whoever waits for what is verified.
    pub(crate) verified_bell: Bell,
    /// Work for the thread that fetches keys ahead of their use.
    pub(crate) fetches: SyncSender<Fetch>,
    /// Holds the volume's exclusive flock(2).
    pub(crate) _lock: File,
}

/// A job for the thread that asks the KMS for what nobody waits for: keys ahead of their use, above all.
#[derive(Debug)]
pub(crate) enum Fetch {
    /// Fresh DEKs for inodes not yet born.
    Nursery(Domain),
    /// The DEKs of files that a directory listing showed.
    Files(Vec<Ino>),
    /// To tell the KMS what depends on the key of a domain.
    Report(Domain),
    /// To tell the KMS how far the volume has come.
    Anchor,
    /// The volume is being closed.
    Stop,
}

/// A volume with keys of one domain, and of the first in any case, for the length of one operation.
pub(crate) struct Access<'c> {
    core: &'c Core,
    /// Where the operation is at home.
    home: &'c KeyDomain,
    purpose: Purpose,
    first: Admission<'c>,
    /// To other domains, in ascending order.
    others: Vec<Admission<'c>>,
}

impl Deref for Access<'_> {
    type Target = Core;

    fn deref(&self) -> &Core {
        self.core
    }
}

impl Core {
    /// Access for an operation that shows something to a program.
    pub(crate) fn serve(&self, domain: Domain) -> Result<Access<'_>> {
        self.access(domain, Purpose::Serve)
    }

    /// Access for an operation that a program makes to change something.
    ///
    /// # Errors
    /// EROFS, too, where what is there was found not to be what was last written.
    pub(crate) fn change(&self, domain: Domain) -> Result<Access<'_>> {
        self.refuse_read_only()?;
        self.refuse_lost(domain)?;
        self.access(domain, Purpose::Serve)
    }

    /// Access for an operation that takes in what was accepted before the key was revoked.
    pub(crate) fn drain(&self, domain: Domain) -> Result<Access<'_>> {
        self.refuse_read_only()?;
        self.access(domain, Purpose::Drain)
    }

    /// Access for what looks at the whole volume: to every domain whose keys may be used.
    pub(crate) fn serve_all(&self) -> Result<Access<'_>> {
        let home = self.domains.first();
        let first = home.keyring.admit(Purpose::Serve)?;
        let others = self.domains.others();
        let others = others.filter_map(|domain| domain.keyring.admit(Purpose::Serve).ok());
        Ok(self.with_keys(home, Purpose::Serve, first, others.collect()))
    }

    fn access(&self, domain: Domain, purpose: Purpose) -> Result<Access<'_>> {
        let home = self.domains.get(domain)?;
        let first = self.domains.first().keyring.admit(purpose)?;
        let others = match domain {
            Domain::FIRST => Vec::new(),
            _ => vec![home.keyring.admit(purpose)?],
        };
        Ok(self.with_keys(home, purpose, first, others))
    }

    /// Access by admissions that were had before: to the first domain and to others in ascending order, `home` among them.
    pub(crate) fn with_keys<'c>(
        &'c self,
        home: &'c KeyDomain,
        purpose: Purpose,
        first: Admission<'c>,
        others: Vec<Admission<'c>>,
    ) -> Access<'c> {
        Access {
            core: self,
            home,
            purpose,
            first,
            others,
        }
    }

    /// # Errors
    /// EROFS where what is there was found not to be what was last written: of a domain, or of the first, which has the roots of all.
    pub(crate) fn refuse_lost(&self, domain: Domain) -> Result<()> {
        let is_lost = |domain| {
            self.domains
                .get(domain)
                .is_ok_and(|domain| domain.trust.is_lost())
        };
        match is_lost(domain) || is_lost(Domain::FIRST) {
            true => Err(Error::Posix(libc::EROFS)),
            false => Ok(()),
        }
    }

    fn refuse_read_only(&self) -> Result<()> {
        if self.options.read_only {
            Err(Error::Posix(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// Whether the keys of a domain that is open may not be used.
    pub(crate) fn is_dark(&self, domain: Domain) -> bool {
        let found = self.domains.get(domain);
        found.is_ok_and(|domain| domain.keyring.state() != KeyState::Live)
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
        let Err(error) = self.fetches.try_send(job) else {
            return;
        };
        tracing::debug!(%error, "no key is fetched ahead");
        let (TrySendError::Full(job) | TrySendError::Disconnected(job)) = error;
        if let Fetch::Nursery(domain) = job
            && let Ok(domain) = self.domains.get(domain)
        {
            domain.nursery.note_heard();
        }
    }
}

impl<'c> Access<'c> {
    /// The domain that the operation is at home in.
    pub(crate) fn home(&self) -> &'c KeyDomain {
        self.home
    }

    /// The same, and access to another domain: what leads from one to another begins in the first, so that gates are taken in
    /// their order. To be called where no lock is held.
    ///
    /// # Errors
    /// Why the keys of that domain may not be used.
    pub(crate) fn reach(&self, domain: Domain) -> Result<Access<'_>> {
        let mut others: Vec<_> = self.others.iter().map(Admission::share).collect();
        if self.keys_of(domain).is_err() {
            others.push(self.core.domains.get(domain)?.keyring.admit(self.purpose)?);
        }
        let first = self.first.share();
        Ok(self.core.with_keys(self.home, self.purpose, first, others))
    }

    /// The same, and access to a domain that nobody else knows of yet.
    pub(crate) fn reach_new(&self, keys: Arc<DomainKeys>) -> Access<'_> {
        let (first, others) = (self.first.share(), vec![Admission::to_new(keys)]);
        self.core.with_keys(self.home, self.purpose, first, others)
    }

    fn admissions(&self) -> impl Iterator<Item = &Admission<'c>> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// The domains that this gives access to, in ascending order.
    pub(crate) fn reached(&self) -> Vec<Domain> {
        let keys = self.admissions().map(Admission::keys);
        keys.map(|keys| keys.domain()).collect()
    }

    /// The keys of a domain.
    ///
    /// # Errors
    /// EXDEV if this gives no access to it.
    pub(crate) fn keys_of(&self, domain: Domain) -> Result<&Arc<DomainKeys>> {
        let mut keys = self.admissions().map(Admission::keys);
        keys.find(|keys| keys.domain() == domain)
            .ok_or(Error::Posix(libc::EXDEV))
    }

    /// A nonce for what is sealed at home.
    pub(crate) fn nonce(&self) -> Result<Nonce> {
        self.keys_of(self.home.id)?.nonce()
    }

    /// Whether this is of what was accepted before a key was revoked.
    pub(crate) fn is_draining(&self) -> bool {
        self.admissions().any(Admission::is_draining)
    }

    /// To be asked now and then by an operation that may take long.
    ///
    /// # Errors
    /// That the keys are going, and the operation is to end.
    pub(crate) fn go_on(&self) -> Result<()> {
        self.admissions().try_for_each(|admission| {
            let domain = self.core.domains.get(admission.keys().domain())?;
            domain.keyring.go_on()
        })
    }

    /// The opened row of the family `meta` under `key`, which belongs to `ino`.
    pub(crate) fn row(&self, ino: Ino, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let sealed = self.store.get(Family::Meta, key)?;
        sealed.map(|sealed| self.open_row(ino, key, &sealed)).transpose()
    }

    pub(crate) fn open_row(&self, ino: Ino, key: &[u8], sealed: &[u8]) -> Result<Vec<u8>> {
        self.keys_of_row(key)?
            .open_row(Family::Meta, key, sealed)
            .ok_or_else(|| Error::corrupt_inode(ino))
    }

    fn keys_of_row(&self, key: &[u8]) -> Result<&Arc<DomainKeys>> {
        self.keys_of(rowkey::domain_of(key).unwrap_or(Domain::FIRST))
    }

    /// The seal of the row that is stored under `key`.
    pub(crate) fn stored_seal(&self, key: &[u8]) -> Result<Option<Seal>> {
        let row = self.store.get(Family::Meta, key)?;
        Ok(row.and_then(|row| Seal::of_row(&row)))
    }

    /// Puts a row in the place of the one that is stored under its key, whose seal is `old`, if there is one. Whoever changes a
    /// row holds the lock that keeps others from it until the commit. Returns the new row's seal.
    pub(crate) fn put_row(
        &self,
        batch: &mut Batch,
        key: Vec<u8>,
        plain: &[u8],
        old: Option<&Seal>,
    ) -> Result<Seal> {
        let keys = self.keys_of_row(&key)?;
        let sealed = keys.seal_row(Family::Meta, &key, plain)?;
        let new = Seal::of_row(&sealed).ok_or_else(|| Error::corrupt_inode(Ino::default()))?;
        self.note_replaced(batch, &key, old, Some(&new))?;
        batch.put(Family::Meta, key, sealed);
        Ok(new)
    }

    /// Deletes the row that is stored under `key`, whose seal is `old`.
    pub(crate) fn delete_row(&self, batch: &mut Batch, key: Vec<u8>, old: Option<&Seal>) -> Result<()> {
        self.note_replaced(batch, &key, old, None)?;
        batch.delete(Family::Meta, key);
        Ok(())
    }

    /// Notes in the sums that a row takes the place of another, one of which may be absent.
    pub(crate) fn note_replaced(
        &self,
        batch: &mut Batch,
        key: &[u8],
        old: Option<&Seal>,
        new: Option<&Seal>,
    ) -> Result<()> {
        let keys = self.keys_of_row(key)?;
        debug_assert!(
            !keys.has_roots()
                || self
                    .stored_seal(key)
                    .map_or(true, |stored| stored.as_ref() == old),
            "what is said to be stored under {key:?} is not"
        );
        batch.note_replaced(keys, key, old, new);
        Ok(())
    }

    /// Puts an inode's record in the place of the one that is stored, with what the batch changes of the inode's other rows,
    /// all of which is in the batch. What it is stored as once that is committed.
    pub(crate) fn put_inode(
        &self,
        batch: &mut Batch,
        ino: Ino,
        record: &InodeRecord,
        old: Option<&Stored>,
    ) -> Result<Stored> {
        let mut rows = match old {
            Some(old) => old.rows,
            None => self.keys_of(ino.domain())?.has_roots().then(RowSum::default),
        };
        let change = batch.take_change_of(ino);
        if let Some(rows) = &mut rows {
            rows.merge(change);
        }
        let plain = record.encode(rows.as_ref());
        let seal = self.put_row(batch, rowkey::inode(ino), &plain, old.map(|old| &old.seal))?;
        Ok(Stored { seal, rows })
    }

    pub(crate) fn commit(&self, mut batch: Batch) -> Result<Seq> {
        debug_assert!(
            !batch.has_loose_change(),
            "an inode's rows change without its record"
        );
        let domains: Vec<_> = batch.summed_domains().collect();
        for domain in domains {
            batch.seal_with(Arc::clone(self.keys_of(domain)?));
        }
        self.committer.commit(self.first.keys(), batch)
    }

    /// The record of an inode that may not be there, and how it is stored.
    pub(crate) fn stored_record(&self, ino: Ino) -> Result<Option<(InodeRecord, Stored)>> {
        let key = rowkey::inode(ino);
        let Some(sealed) = self.store.get(Family::Meta, &key)? else {
            return Ok(None);
        };
        self.open_record(ino, &key, &sealed).map(Some)
    }

    /// Opens an inode's record.
    pub(crate) fn open_record(&self, ino: Ino, key: &[u8], sealed: &[u8]) -> Result<(InodeRecord, Stored)> {
        let plain = self.open_row(ino, key, sealed)?;
        let seal = Seal::of_row(sealed).ok_or_else(|| Error::corrupt_inode(ino))?;
        let (record, rows) = InodeRecord::decode(&plain).map_err(|_| Error::corrupt_inode(ino))?;
        // A record without a sum in a volume with sums is of no program that made it.
        if rows.is_some() != self.keys_of(ino.domain())?.has_roots() {
            return Err(Error::corrupt_inode(ino));
        }
        Ok((record, Stored { seal, rows }))
    }

    /// The node of an inode.
    ///
    /// # Errors
    /// ESTALE if there is no such inode; EXDEV if this gives no access to its domain.
    pub(crate) fn node(&self, ino: Ino) -> Result<Arc<Node>> {
        // One in memory may be another domain's.
        self.keys_of(ino.domain())?;
        loop {
            let seen = match self.nodes.find(ino) {
                Ok(node) => return Ok(node),
                Err(seen) => seen,
            };
            let (record, stored) = self.stored_record(ino)?.ok_or(Error::Posix(libc::ESTALE))?;
            let node = Node::new(ino, record, stored, self.poisoned.lock().contains(&ino));
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
