//! The single committer: operations enqueue their changes, whoever holds the writer drains the queue into one
//! batch with one root record. Syncs are shared, and never made under the writer's lock.

use super::error::{Error, Result};
use super::format::root::RootRecord;
use super::format::rowkey::{self, Family};
use super::keys::DomainKeys;
use super::store::{Change, Store};
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Mutex, rank};
use std::sync::Arc;

/// The number of a commit. Each batch written to the log has the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Seq(pub(crate) u64);

/// The changes of one operation, sealed, with what they add to the root's counters.
#[derive(Default)]
pub(crate) struct Batch {
    changes: Vec<Change>,
    inodes: i64,
    blocks: i64,
}

impl Batch {
    pub(crate) fn put(&mut self, family: Family, key: Vec<u8>, value: Vec<u8>) {
        self.changes.push(Change::Put(family, key, value));
    }

    pub(crate) fn delete(&mut self, family: Family, key: Vec<u8>) {
        self.changes.push(Change::Delete(family, key));
    }

    pub(crate) fn delete_range(&mut self, family: Family, from: Vec<u8>, to: Vec<u8>) {
        self.changes.push(Change::DeleteRange(family, from, to));
    }

    pub(crate) fn count_inodes(&mut self, delta: i64) {
        self.inodes = self.inodes.saturating_add(delta);
    }

    pub(crate) fn count_blocks(&mut self, before: u64, after: u64) {
        let delta = i128::from(after) - i128::from(before);
        self.blocks = self.blocks.saturating_add(i64::try_from(delta).unwrap_or(0));
    }
}

struct Waiting {
    batch: Batch,
    outcome: Arc<Mutex<Option<Result<Seq>>, rank::LogOutcome>>,
}

/// Orders commits and knows which of them are durable.
pub(crate) struct Committer {
    store: Arc<Store>,
    queue: Mutex<Vec<Waiting>, rank::LogQueue>,
    writer: Mutex<RootRecord, rank::LogWriter>,
    syncing: Mutex<(), rank::LogSync>,
    committed: AtomicU64,
    durable: AtomicU64,
    poisoned: AtomicBool,
}

impl Committer {
    /// Goes on after `root`, all of which is durable.
    pub(crate) fn new(store: Arc<Store>, root: RootRecord) -> Self {
        Self {
            store,
            queue: Mutex::default(),
            committed: AtomicU64::new(root.commit_seq),
            durable: AtomicU64::new(root.commit_seq),
            writer: Mutex::new(root),
            syncing: Mutex::default(),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Commits `batch`: visible and ordered when this returns, durable only after [`Self::sync_to`].
    pub(crate) fn commit(&self, keys: &DomainKeys, batch: Batch) -> Result<Seq> {
        let outcome = Arc::new(Mutex::new(None));
        self.queue.lock().push(Waiting {
            batch,
            outcome: Arc::clone(&outcome),
        });
        let mut root = self.writer.lock();
        if let Some(outcome) = outcome.lock().take() {
            return outcome;
        }
        let group = std::mem::take(&mut *self.queue.lock());
        let result = self.write(keys, &mut root, &group);
        for waiting in group {
            *waiting.outcome.lock() = Some(result.clone());
        }
        result
    }

    fn write(&self, keys: &DomainKeys, root: &mut RootRecord, group: &[Waiting]) -> Result<Seq> {
        self.check()?;
        let mut next = RootRecord {
            commit_seq: root.commit_seq.saturating_add(1),
            durable_seq: self.durable.load(Ordering::Acquire),
            ..*root
        };
        for waiting in group {
            next.inodes = next.inodes.saturating_add_signed(waiting.batch.inodes);
            next.blocks = next.blocks.saturating_add_signed(waiting.batch.blocks);
        }
        let key = rowkey::root(keys.domain());
        let value = keys.seal_row(Family::Meta, &key, &next.encode())?;
        let root_change = Change::Put(Family::Meta, key, value);
        let changes = group.iter().flat_map(|waiting| &waiting.batch.changes);
        self.poison_on_error(self.store.write(changes.chain(std::iter::once(&root_change))))?;
        *root = next;
        self.committed.store(next.commit_seq, Ordering::Release);
        Ok(Seq(next.commit_seq))
    }

    /// Reserves `count` inode numbers, durably, and returns the first.
    pub(crate) fn reserve_inodes(&self, keys: &DomainKeys, count: u64) -> Result<u64> {
        let first = {
            let mut root = self.writer.lock();
            let first = root.ino_limit;
            let limit = first.checked_add(count).filter(|limit| *limit < 1 << 48);
            root.ino_limit = limit.ok_or(Error::Posix(libc::ENOSPC))?;
            first
        };
        let seq = self.commit(keys, Batch::default())?;
        self.sync_to(seq)?;
        Ok(first)
    }

    /// Makes every commit up to `seq` durable; concurrent callers share one sync of the log.
    pub(crate) fn sync_to(&self, seq: Seq) -> Result<()> {
        if self.is_durable(seq) {
            return self.check();
        }
        let _one_at_a_time = self.syncing.lock();
        self.check()?;
        if self.is_durable(seq) {
            return Ok(());
        }
        let reached = self.committed.load(Ordering::Acquire);
        self.poison_on_error(self.store.sync_log())?;
        self.durable.fetch_max(reached, Ordering::AcqRel);
        Ok(())
    }

    /// The last commit.
    pub(crate) fn committed(&self) -> Seq {
        Seq(self.committed.load(Ordering::Acquire))
    }

    /// The last commit that is known durable.
    pub(crate) fn durable(&self) -> Seq {
        Seq(self.durable.load(Ordering::Acquire))
    }

    pub(crate) fn is_durable(&self, seq: Seq) -> bool {
        self.durable() >= seq
    }

    /// The counters as of the last commit.
    pub(crate) fn root(&self) -> RootRecord {
        *self.writer.lock()
    }

    /// Rule R6: after a failed append or sync of the log nobody may claim success.
    pub(crate) fn check(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            Err(Error::Poisoned)
        } else {
            Ok(())
        }
    }

    fn poison_on_error(&self, result: Result<()>) -> Result<()> {
        if let Err(error) = &result {
            self.poisoned.store(true, Ordering::Release);
            tracing::error!(%error, "the log failed; the volume accepts no more changes");
        }
        result
    }
}
