//! The engine's face: an open volume, and every operation on it.

use super::core::{Core, Fetch};
use super::domain::DomainStatus;
use super::error::{Error, Result};
use super::keyring::KeyState;
use super::keyservice::{CacheObserver, InodeLedger};
use super::sweep;
use super::sync::{Mutex, assert_unbroken, rank};
use super::types::{
    Attr, Cookie, DirEntry, Domain, Fallocate, FileKind, Ino, Kill, NewNode, RenameFlags, Seek, SetAttr,
    SetXattr, StatFs, Taken,
};
use super::upkeep::Background;
use super::verification::Verify;
use super::watch::spawn_watch;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub use super::open::{CreateParams, OpenError};

/// How a volume is opened.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Refuse every change with EROFS.
    pub read_only: bool,
    /// How often pending content is published and the log synced.
    pub publish_interval: Duration,
    /// How often the state of the CMK is asked for.
    pub key_poll_interval: Duration,
    /// How long it may take to store what was written before the volume goes dark; the rest is dropped.
    pub drain_max: Duration,
    /// Mount though the KMS knows less than it once did: its keystore was put back on purpose.
    pub accept_kms_restore: bool,
    /// Have the KMS know how far the volume has come, and refuse one that has come less far.
    pub anchor: bool,
    /// Mount though the volume has come less far than the KMS knows, or elsewhere: it was put back on purpose.
    pub accept_restore: bool,
    /// When what storage holds is compared with what was last written.
    pub verify: Verify,
    /// Memory for RocksDB's block cache and memtables together, in bytes.
    pub block_cache_bytes: usize,
    /// File keys kept in memory.
    pub dek_cache_entries_max: usize,
    /// Inodes kept in memory, beside those with content not yet published.
    pub node_cache_entries_max: usize,
    /// DEKs fetched ahead in one call, 1 to 256.
    pub dek_prefetch: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            publish_interval: Duration::from_secs(5),
            key_poll_interval: Duration::from_secs(1),
            drain_max: Duration::from_secs(5),
            accept_kms_restore: false,
            anchor: true,
            accept_restore: false,
            verify: Verify::default(),
            block_cache_bytes: 128 << 20,
            dek_cache_entries_max: 32_768,
            node_cache_entries_max: 65_536,
            dek_prefetch: 256,
        }
    }
}

/// What an operator wants to know of an open volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Whether the keys may be used.
    pub key_state: KeyState,
    /// Inodes.
    pub inodes: u64,
    /// Blocks of 4 KiB that are not holes.
    pub blocks: u64,
    /// The number of the last commit.
    pub commit_seq: u64,
    /// The last commit known durable.
    pub durable_seq: u64,
    /// Content in memory that storage does not hold yet, with its administration, in bytes.
    pub pending_bytes: u64,
    /// Files with such content, or with something that waits to be durable.
    pub active_files: usize,
    /// File keys in memory.
    pub cached_deks: usize,
    /// Calls made to the KMS, renewals aside.
    pub kms_calls: u64,
    /// Whether slot files may still hold what an unclean stop left.
    pub is_unswept: bool,
    /// Whether a log failure has put an end to changes.
    pub failed: bool,
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Reading alone.
    ToRead,
    /// Writing, too.
    ToWrite,
}

/// An open volume. Dropping it without [`Volume::close`] is a crash: what was not synced is lost.
///
/// Every method may wait for storage, and for the KMS as long as the [`KeyService`](super::KeyService) lets it.
/// Besides what is noted, each fails with [`Error::KeyRevoked`] and its kin while the keys may not be used, with
/// ESTALE for an inode that does not exist, and with [`Error::Corrupt`] when storage holds what was not written.
pub struct Volume {
    pub(super) core: Arc<Core>,
    pub(super) background: Mutex<Background, rank::Threads>,
    pub(super) closed: AtomicBool,
}

impl Volume {
    /// Has `observer` told when the kernel's caches must go.
    pub fn set_observer(&self, observer: Arc<dyn CacheObserver>) {
        *self.core.observer.lock() = Some(observer);
    }

    /// Has nobody told any more.
    pub fn clear_observer(&self) {
        *self.core.observer.lock() = None;
    }

    /// Has every inode listed that the kernel learns of from now on: to be called before it learns of any.
    pub fn set_ledger(&self, ledger: Arc<dyn InodeLedger>) {
        self.core.nodes.set_ledger(ledger);
    }

    /// Has the state of a domain's CMK asked for at once.
    pub fn ask_for_key_state(&self, domain: Domain) {
        if let Ok(domain) = self.core.domains.get(domain) {
            domain.bell.ring();
        }
    }

    /// Puts an empty directory, `name` in `parent`, under another CMK of the same KMS: a new directory takes its place, with its
    /// attributes, and what is made below it is of a key domain of its own. Durable when this returns.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENOTEMPTY; EINVAL below another domain; EEXIST for the root of one, unless that is erased; the KMS's
    /// refusal.
    pub fn set_key(&self, parent: Ino, name: &[u8], cmk_arn: &str) -> Result<Domain> {
        let (domain, seq) = self.core.set_key(parent, name, cmk_arn)?;
        let watched = spawn_watch(&self.core, domain);
        let watched = watched.inspect_err(|_| self.core.shut_unwatched(domain))?;
        self.background.lock().watches.push(watched);
        self.forget_name(parent, name);
        self.core.committer.sync_to(seq)?;
        Ok(domain)
    }

    /// Removes the name of a key domain that is erased. Durable when this returns.
    ///
    /// # Errors
    /// ENOENT; EBUSY for a domain that is not erased; EINVAL for what begins none.
    pub fn remove_erased(&self, parent: Ino, name: &[u8]) -> Result<()> {
        self.core.remove_erased(parent, name)?;
        self.forget_name(parent, name);
        Ok(())
    }

    fn forget_name(&self, parent: Ino, name: &[u8]) {
        let observer = self.core.observer.lock().clone();
        if let Some(observer) = observer {
            observer.forget_name(parent, name);
        }
    }

    /// The key domains that are in use, or whose name is still there; the volume's own first.
    #[must_use]
    pub fn domains(&self) -> Vec<DomainStatus> {
        let access = self.core.serve(Domain::FIRST).ok();
        self.core.domain_statuses(access.as_ref())
    }

    /// Goes dark at once, as if the CMK were disabled, without asking the KMS, and stays so until that is taken back, by
    /// `false`. Returns when it is dark.
    pub fn revoke_by_hand(&self, dark: bool) {
        self.core.shut_by_hand(dark);
    }

    /// Publishes, drains and syncs everything, and ends the volume: only [`Self::status`] means anything afterwards.
    /// To be called when the kernel has let go of it.
    ///
    /// # Errors
    /// What kept content from being stored.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.stop_work();
        self.core.forget_all();
        let put_away = match self.core.options.read_only {
            true => Ok(()),
            false => self.core.put_away(),
        };
        if put_away.is_ok() && !self.core.options.read_only {
            self.core.tell_anchor();
        }
        self.stop_watches();
        put_away?;
        match self.core.options.read_only || self.core.is_unswept.load(Ordering::Acquire) {
            true => Ok(()),
            false => sweep::end(&self.core.dir),
        }
    }

    fn stop_work(&self) {
        self.core.upkeep_bell.stop();
        self.core.compact_bell.stop();
        self.core.domains_bell.stop();
        self.core.verify_bell.stop();
        self.core.verified_bell.stop();
        let work = std::mem::take(&mut self.background.lock().work);
        if !work.is_empty() && self.core.fetches.send(Fetch::Stop).is_err() {
            tracing::debug!("the fetching thread has ended before");
        }
        join(work);
    }

    fn stop_watches(&self) {
        for domain in self.core.domains.all() {
            domain.bell.stop();
        }
        let watches = std::mem::take(&mut self.background.lock().watches);
        join(watches);
        assert_unbroken();
    }

    /// What an operator wants to know.
    #[must_use]
    pub fn status(&self) -> Status {
        let core = &self.core;
        let root = core.committer.root();
        let calls = core.domains.all().map(|domain| domain.keyring.calls());
        Status {
            key_state: core.domains.first().keyring.state(),
            inodes: root.inodes,
            blocks: root.blocks,
            commit_seq: core.committer.committed().0,
            durable_seq: core.committer.durable().0,
            pending_bytes: core.active.pending_bytes(),
            active_files: core.active.inodes().len(),
            cached_deks: core.file_keys.len(),
            kms_calls: calls.sum(),
            is_unswept: core.is_unswept.load(Ordering::Acquire),
            failed: core.committer.check().is_err(),
        }
    }

    /// Whether the keys of an inode's domain may be used.
    ///
    /// # Errors
    /// Why not.
    pub fn check_key(&self, ino: Ino) -> Result<()> {
        self.core.serve(ino.domain()).map(|_| ())
    }

    /// Finds `name`, `.` and `..` included. Counts one reference of the kernel's to the inode.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENAMETOOLONG; ESTALE for `.` in what has no name any more.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr> {
        self.core.serve(parent.domain())?.lookup(parent, name)
    }

    /// Takes back `count` references of the kernel's. An inode without names goes with the last.
    pub fn forget(&self, ino: Ino, count: u64) {
        self.core.forget(ino, count);
    }

    /// mknod(2), mkdir(2), creat(2). Counts one reference of the kernel's to the new inode.
    ///
    /// # Errors
    /// EEXIST, ENOENT for a removed directory, EINVAL for a symlink, which [`Self::symlink`] makes.
    pub fn make(&self, parent: Ino, name: &[u8], node: &NewNode) -> Result<Attr> {
        if node.kind == FileKind::Symlink {
            return Err(Error::Posix(libc::EINVAL));
        }
        self.core.change(parent.domain())?.make(parent, name, node, &[])
    }

    /// symlink(2). Counts one reference of the kernel's to the new inode.
    ///
    /// # Errors
    /// EEXIST; ENAMETOOLONG for targets beyond 4095 bytes.
    pub fn symlink(&self, parent: Ino, name: &[u8], target: &[u8], uid: u32, gid: u32) -> Result<Attr> {
        let node = NewNode {
            kind: FileKind::Symlink,
            perm: 0o777,
            umask: 0,
            uid,
            gid,
            rdev: 0,
        };
        self.core
            .change(parent.domain())?
            .make(parent, name, &node, target)
    }

    /// readlink(2).
    ///
    /// # Errors
    /// EINVAL for what is no symlink.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.core.serve(ino.domain())?.readlink(ino)
    }

    /// link(2). Counts one reference of the kernel's to the inode.
    ///
    /// # Errors
    /// EEXIST, EMLINK, EPERM for a directory, ENOENT for an inode without names.
    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr> {
        self.core.change(parent.domain())?.link(ino, parent, name)
    }

    /// unlink(2).
    ///
    /// # Errors
    /// ENOENT; EISDIR for a directory.
    pub fn unlink(&self, parent: Ino, name: &[u8]) -> Result<()> {
        self.core.change(parent.domain())?.unlink(parent, name)
    }

    /// rmdir(2).
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENOTEMPTY.
    pub fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<()> {
        self.core.change(parent.domain())?.rmdir(parent, name)
    }

    /// renameat2(2).
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        self.core
            .change(parent.domain())?
            .rename(parent, name, new_parent, new_name, flags)
    }

    /// Shows the entries behind `from` until `take` is full, `.` and `..` first.
    ///
    /// # Errors
    /// ENOTDIR.
    pub fn readdir(
        &self,
        dir: Ino,
        from: Cookie,
        take: &mut dyn FnMut(&DirEntry<'_>) -> Taken,
    ) -> Result<()> {
        self.core.serve(dir.domain())?.readdir(dir, from, take)
    }

    /// The same with attributes, but of the root of another key domain whose keys may not be used. Every entry taken, but `.` and `..`, counts one reference of the kernel's.
    ///
    /// # Errors
    /// ENOTDIR.
    pub fn readdirplus(
        &self,
        dir: Ino,
        from: Cookie,
        take: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> Taken,
    ) -> Result<()> {
        self.core.serve(dir.domain())?.readdirplus(dir, from, take)
    }

    /// stat(2).
    ///
    /// # Errors
    /// Only those of every method.
    pub fn getattr(&self, ino: Ino) -> Result<Attr> {
        self.core.serve(ino.domain())?.attr(ino)
    }

    /// chmod(2), chown(2), truncate(2), utimensat(2) in one.
    ///
    /// # Errors
    /// EISDIR and EINVAL for a size of what has none, EFBIG.
    pub fn setattr(&self, ino: Ino, set: &SetAttr) -> Result<Attr> {
        // The times of what was written back come behind it.
        let access = if set.is_of_times() {
            self.core.drain(ino.domain())?
        } else {
            self.core.change(ino.domain())?
        };
        access.setattr(ino, set)
    }

    /// getxattr(2).
    ///
    /// # Errors
    /// ENODATA; EOPNOTSUPP for names in no namespace of xattr(7), and for those in `system.` that are no POSIX ACLs; EINVAL
    /// for a namespace alone.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.core.serve(ino.domain())?.getxattr(ino, name)
    }

    /// setxattr(2). Setting an access ACL changes the mode; with `kill_sgid` its sgid bit goes, as it does when the
    /// caller is neither privileged nor in the file's group.
    ///
    /// # Errors
    /// EEXIST, ENODATA, ERANGE for a name beyond 255 bytes, E2BIG for a value beyond 65,536, EINVAL for an ACL that is
    /// none, EACCES for a default ACL of what is no directory, EOPNOTSUPP and EINVAL as for [`Self::getxattr`].
    pub fn setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: SetXattr,
        kill_sgid: bool,
    ) -> Result<()> {
        self.core
            .change(ino.domain())?
            .setxattr(ino, name, value, how, kill_sgid)
    }

    /// listxattr(2), in no particular order.
    ///
    /// # Errors
    /// Only those of every method.
    pub fn listxattr(&self, ino: Ino) -> Result<Vec<Vec<u8>>> {
        self.core.serve(ino.domain())?.listxattr(ino)
    }

    /// removexattr(2).
    ///
    /// # Errors
    /// ENODATA; EOPNOTSUPP and EINVAL as for [`Self::getxattr`].
    pub fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.core.change(ino.domain())?.removexattr(ino, name)
    }

    /// Prepares reading, and writing if that is `wanted`: an open that succeeds has its key.
    ///
    /// # Errors
    /// EISDIR and EINVAL for what has no content; EROFS for writing where nothing more is changed.
    pub fn open_file(&self, ino: Ino, wanted: Opening) -> Result<()> {
        if wanted == Opening::ToWrite {
            self.core.refuse_lost(ino.domain())?;
        }
        let access = self.core.serve(ino.domain())?;
        let node = access.regular(ino)?;
        access.file_key(&node).map(|_| ())
    }

    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// EISDIR and EINVAL for what has no content.
    pub fn read(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let access = self.core.serve(ino.domain())?;
        access.read(&access.regular(ino)?, offset, buffer)
    }

    /// Clears suid, sgid and capabilities as far as `kill` says, before a change of content. True if the mode changed, of
    /// which the kernel does not know.
    ///
    /// # Errors
    /// EISDIR and EINVAL for what has no content.
    pub fn drop_privileges(&self, ino: Ino, kill: Kill) -> Result<bool> {
        let access = self.core.change(ino.domain())?;
        access.drop_privileges(&access.regular(ino)?, kill)
    }

    /// Writes for a program at `offset`, extending the size; returns how many bytes, fewer than given only when
    /// storage refused the rest.
    ///
    /// # Errors
    /// EFBIG, ENOSPC; [`Error::Poisoned`] after a failed sync.
    pub fn write(&self, ino: Ino, offset: u64, data: &[u8]) -> Result<usize> {
        let access = self.core.change(ino.domain())?;
        let written = access.write(&access.regular(ino)?, offset, data, Some(access.now()))?;
        Ok(written.count)
    }

    /// Takes in what the kernel's page cache held, all of it or with an error: the kernel takes a short answer for the
    /// whole (fuse_writepage_end). The times stay: the kernel keeps them with the pages, and sends them by
    /// [`Self::setattr`]. Accepted while the volume goes dark, too, and then stamped, since what the kernel sends
    /// later is refused.
    ///
    /// # Errors
    /// Those of [`Self::write`]; what was taken in before stays. The file counts as damaged from then on if it is the key
    /// that is lacking.
    pub fn write_back(&self, ino: Ino, offset: u64, data: &[u8]) -> Result<()> {
        let access = self.core.drain(ino.domain());
        // What is stored while keys go is not refused: it was accepted before.
        let access = access.and_then(|access| match access.is_draining() {
            true => Ok(access),
            false => self.core.refuse_lost(ino.domain()).map(|()| access),
        });
        let access = access.inspect_err(|error| {
            // The kernel has no other copy, and no later fsync may claim that there is one (rule R6).
            tracing::error!(inode = ino.0, offset, length = data.len(), %error, "content is lost");
            self.core.poisoned.lock().insert(ino);
        })?;
        let stamp = access.is_draining().then(|| access.now());
        let written = access.write(&access.regular(ino)?, offset, data, stamp)?;
        written.stopped.map_or(Ok(()), Err)
    }

    /// fallocate(2).
    ///
    /// # Errors
    /// EFBIG, ENOSPC, EINVAL for a length of 0.
    pub fn fallocate(&self, ino: Ino, how: Fallocate, offset: u64, length: u64) -> Result<()> {
        let access = self.core.change(ino.domain())?;
        access.fallocate(&access.regular(ino)?, how, offset, length)
    }

    /// lseek(2) for data and holes; what the kernel has not written back is not seen.
    ///
    /// # Errors
    /// ENXIO behind the end, or behind the last data.
    pub fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let access = self.core.serve(ino.domain())?;
        access.seek(&access.regular(ino)?, offset, what)
    }

    /// copy_file_range(2): returns the bytes copied, fewer than asked for at the end of the source.
    ///
    /// # Errors
    /// EINVAL for overlapping ranges of one file; EXDEV between key domains.
    pub fn copy_range(
        &self,
        from: Ino,
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        length: u64,
    ) -> Result<u64> {
        if from.domain() != to.domain() {
            return Err(Error::Posix(libc::EXDEV));
        }
        let access = self.core.change(to.domain())?;
        access.copy_range(
            (&access.regular(from)?, from_offset),
            (&access.regular(to)?, to_offset),
            length,
        )
    }

    /// fsync(2), fdatasync(2) and fsync(2) of a directory: what was done to `ino` before is there after a crash.
    ///
    /// # Errors
    /// [`Error::Poisoned`] from the first failed sync on.
    pub fn fsync(&self, ino: Ino) -> Result<()> {
        if self.core.options.read_only {
            return Ok(());
        }
        let seq = {
            let access = self.core.drain(ino.domain())?;
            access.publish(&access.node(ino)?)?;
            self.core.committer.committed()
        };
        self.core.committer.sync_to(seq)
    }

    /// statfs(2).
    ///
    /// # Errors
    /// Storage's own.
    pub fn statfs(&self) -> Result<StatFs> {
        let host = rustix::fs::statvfs(&self.core.dir)?;
        let root = self.core.committer.root();
        let bytes = |count: u64| count.saturating_mul(host.f_frsize);
        let in_blocks = |bytes: u64| bytes / u64::from(StatFs::BLOCK_BYTES);
        // What is in memory alone will take its room.
        let pending = self.core.active.pending_bytes();
        let usable = |count: u64| in_blocks(self.core.space.usable(bytes(count)).saturating_sub(pending));
        // Every file needs a record of a few hundred bytes, no inode of the host's.
        let files_free = usable(host.f_bavail).saturating_mul(4);
        Ok(StatFs {
            block_size: StatFs::BLOCK_BYTES,
            blocks: in_blocks(bytes(host.f_blocks)),
            blocks_free: usable(host.f_bfree),
            blocks_available: usable(host.f_bavail),
            files: root.inodes.saturating_add(files_free),
            files_free,
            name_max: super::table::NAME_BYTES_MAX as u32,
        })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.stop_work();
        self.stop_watches();
    }
}

impl Core {
    /// An orderly end. While dark there is nothing in memory that storage does not hold, or what was lost was said to be.
    pub(super) fn put_away(&self) -> Result<()> {
        match self.put_away_live() {
            Err(error) if error.is_of_key() => self.committer.sync_to(self.committer.committed()),
            put_away => put_away,
        }
    }

    fn put_away_live(&self) -> Result<()> {
        // Everything is stored with the first; the rest is order, which on a full host waits for another mount.
        let mut outcome = self.publish_all();
        let drained = self.for_active(|access, node| {
            access.settle(node)?;
            access.drain_file(node)
        });
        outcome = outcome.and(unless_full("draining", drained));
        outcome = outcome.and(unless_full("reclaiming", self.reclaim_all()));
        // Twice: what becomes durable in the first round lets slot files and runs go, which the second records.
        for _ in 0..2 {
            outcome = outcome.and(self.publish_all());
            outcome = outcome.and(unless_full("reclaiming", self.remove_slot_files()));
            outcome = outcome.and(self.for_active(|access, node| access.settle(node).map(|_| ())));
        }
        // The log stays, and is durable.
        outcome.and(unless_full("a flush", self.store.flush()))
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a background thread panicked");
        }
    }
}

/// What may be left for want of room.
fn unless_full(what: &str, outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.is_no_room() => {
            tracing::warn!(%error, "there is no room for {what}");
            Ok(())
        }
        outcome => outcome,
    }
}
