//! The single committer: operations enqueue their changes, whoever holds the writer drains the queue into one
//! batch with one root record. Syncs are shared, and never made under the writer's lock.

use super::batch::Batch;
use super::error::{Error, Result};
use super::format::domain::Usage;
use super::format::root::{DomainRoot, RootRecord};
use super::format::rowkey::{self, Family};
use super::format::rowsum::RowSum;
use super::format::seal::Seal;
use super::keys::DomainKeys;
use super::space::Space;
use super::store::{Change, Mode, Store, SyncError};
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Mutex, rank};
use super::types::{Domain, Ino};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The number of a commit. Each batch written to the log has the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Seq(pub(crate) u64);

/// Appends of one batch: with what room there is, and with the ballast's.
const APPENDS_MAX: usize = 2;
/// A batch of so many bytes may be tried on a host that may have no room for it: what an append that fails half way leaves
/// in the log is there until the database flushes again.
const TRIED_BYTES_MAX: u64 = 64 << 10;

struct Waiting {
    batch: Batch,
    outcome: Arc<Mutex<Option<Result<Seq>>, rank::LogOutcome>>,
}

/// The root record as of the last commit, and as it is stored: no other commit ends with these bytes.
pub(crate) struct Written {
    pub(crate) root: RootRecord,
    pub(crate) row: Vec<u8>,
    /// What each domain but the first holds.
    pub(crate) usage: BTreeMap<Domain, Counted>,
    /// The root records of all domains but the first.
    pub(crate) roots: BTreeMap<Domain, StoredRoot>,
}

/// What a domain holds, and how that is stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counted {
    pub(crate) usage: Usage,
    pub(crate) seal: Seal,
}

/// A domain's root record.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredRoot {
    pub(crate) seal: Seal,
    /// None until it is needed: it takes the domain's keys to read.
    pub(crate) sum: Option<RowSum>,
}

/// What a commit writes besides the changes that it was given, and what is known once it is there.
struct Ending {
    changes: Vec<Change>,
    root: RootRecord,
    row: Vec<u8>,
    usage: BTreeMap<Domain, Option<Counted>>,
    roots: BTreeMap<Domain, Option<StoredRoot>>,
}

/// Orders commits and knows which of them are durable.
pub(crate) struct Committer {
    store: Arc<Store>,
    space: Arc<Space>,
    queue: Mutex<Vec<Waiting>, rank::LogQueue>,
    writer: Mutex<Written, rank::LogWriter>,
    syncing: Mutex<(), rank::LogSync>,
    committed: AtomicU64,
    durable: AtomicU64,
    /// Commits that deleted something.
    deletions: AtomicU64,
    poisoned: AtomicBool,
}

impl Committer {
    /// Goes on after `last`, all of which is durable.
    pub(crate) fn new(store: Arc<Store>, space: Arc<Space>, last: Written) -> Self {
        Self {
            store,
            space,
            queue: Mutex::default(),
            committed: AtomicU64::new(last.root.commit_seq),
            durable: AtomicU64::new(last.root.commit_seq),
            writer: Mutex::new(last),
            syncing: Mutex::default(),
            deletions: AtomicU64::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Commits `batch`: visible and ordered when this returns, durable only after [`Self::sync_to`].
    ///
    /// # Errors
    /// ENOSPC if the host has no room for it: nothing has changed then. All else is the end of changes.
    pub(crate) fn commit(&self, keys: &DomainKeys, batch: Batch) -> Result<Seq> {
        let outcome = Arc::new(Mutex::new(None));
        self.queue.lock().push(Waiting {
            batch,
            outcome: Arc::clone(&outcome),
        });
        let mut last = self.writer.lock();
        if let Some(outcome) = outcome.lock().take() {
            return outcome;
        }
        let group = std::mem::take(&mut *self.queue.lock());
        self.write_all(keys, &mut last, &group);
        let own = outcome.lock().take();
        own.unwrap_or(Err(Error::Poisoned))
    }

    /// Commits all batches in one; or, if there is no room for that, or a root cannot be read, each by itself, so that a large one keeps none from
    /// freeing space. What waits at the same time comes in no order.
    fn write_all(&self, keys: &DomainKeys, last: &mut Written, group: &[Waiting]) {
        let all: Vec<&Batch> = group.iter().map(|waiting| &waiting.batch).collect();
        let together = self.write(keys, last, &all);
        // What one of them finds damaged, or too large, is no matter of the others.
        let is_of_one = |error: &Error| error.is_no_room() || matches!(error, Error::Corrupt { .. });
        let is_of_one = together.as_ref().is_err_and(is_of_one);
        let mut waiting: Vec<&Waiting> = group.iter().collect();
        waiting.sort_by_key(|waiting| waiting.batch.bytes());
        for one in waiting {
            let outcome = match is_of_one && group.len() > 1 {
                true => self.write(keys, last, &[&one.batch]),
                false => together.clone(),
            };
            *one.outcome.lock() = Some(outcome);
        }
    }

    fn write(&self, keys: &DomainKeys, last: &mut Written, group: &[&Batch]) -> Result<Seq> {
        self.check()?;
        let ending = self.ending(keys, last, group)?;
        let changes = || {
            let changes = group.iter().flat_map(|batch| &batch.changes);
            changes.chain(&ending.changes)
        };
        let has_room = || self.has_room(group);
        let expected: [&[u8]; 2] = [&ending.row, &last.row];
        let key = rowkey::root(keys.domain());
        let root = ending.root;
        self.append(&expected, &key, root.commit_seq, has_room, || {
            self.store.write(changes())
        })?;
        let deletes = changes().any(|change| !matches!(change, Change::Put(..)));
        last.root = root;
        last.row = ending.row;
        update(&mut last.usage, ending.usage);
        update(&mut last.roots, ending.roots);
        if deletes {
            self.deletions.fetch_add(1, Ordering::Relaxed);
        }
        self.committed.store(root.commit_seq, Ordering::Release);
        Ok(Seq(root.commit_seq))
    }

    /// What ends the commit of these batches: the counts of the domains that they count for, the roots of those whose records
    /// change, and the root record.
    fn ending(&self, keys: &DomainKeys, last: &Written, group: &[&Batch]) -> Result<Ending> {
        let mut root = RootRecord {
            commit_seq: last.root.commit_seq.saturating_add(1),
            durable_seq: self.durable.load(Ordering::Acquire),
            ..last.root
        };
        let mut touched = BTreeMap::new();
        let mut sums = BTreeMap::<Domain, RowSum>::new();
        for batch in group {
            root.inodes = root.inodes.saturating_add_signed(batch.inodes);
            root.blocks = root.blocks.saturating_add_signed(batch.blocks);
            batch.note_usage(&last.usage, &mut touched);
            for (domain, change) in &batch.sums.domains {
                sums.entry(*domain).or_default().merge(*change);
            }
        }
        let mut first = sums.remove(&Domain::FIRST).unwrap_or_default();
        let mut changes = Vec::new();
        let mut put =
            |first: &mut RowSum, sealer: &DomainKeys, key: Vec<u8>, old: Option<&Seal>, plain: &[u8]| {
                let row = sealer.seal_row(Family::Meta, &key, plain)?;
                let seal = Seal::of_row(&row).ok_or_else(short_row)?;
                keys.replace_in(first, &key, old, Some(&seal));
                changes.push(Change::Put(Family::Meta, key, row));
                Ok::<_, Error>(seal)
            };
        let mut roots = BTreeMap::new();
        for (domain, change) in sums {
            let sealer = group.iter().flat_map(|batch| &batch.keys);
            let sealer = sealer.rev().find(|sealer| sealer.domain() == domain);
            let sealer = sealer.ok_or_else(|| missing_keys(domain))?;
            let stored = last.roots.get(&domain);
            let mut sum = self.sum_of(sealer, stored)?;
            sum.merge(change);
            let record = DomainRoot {
                commit_seq: root.commit_seq,
                sum,
            };
            let old = stored.map(|stored| &stored.seal);
            let seal = put(&mut first, sealer, rowkey::root(domain), old, &record.encode())?;
            roots.insert(domain, Some(StoredRoot { seal, sum: Some(sum) }));
        }
        let mut usage = BTreeMap::new();
        for (domain, held) in touched {
            let key = rowkey::usage(domain);
            let old = last.usage.get(&domain).map(|counted| &counted.seal);
            let counted = match held {
                Some(held) => {
                    let seal = put(&mut first, keys, key, old, &held.encode())?;
                    Some(Counted { usage: held, seal })
                }
                None => {
                    keys.replace_in(&mut first, &key, old, None);
                    None
                }
            };
            usage.insert(domain, counted);
        }
        for (domain, _) in usage.iter().filter(|(_, counted)| counted.is_none()) {
            changes.push(Change::Delete(Family::Meta, rowkey::usage(*domain)));
        }
        for ended in group.iter().filter_map(|batch| batch.ended) {
            let old = last.roots.get(&ended).map(|stored| &stored.seal);
            keys.replace_in(&mut first, &rowkey::root(ended), old, None);
            roots.insert(ended, None);
        }
        if let Some(sum) = &mut root.sum {
            sum.merge(first);
        }
        let key = rowkey::root(keys.domain());
        let row = keys.seal_row(Family::Meta, &key, &root.encode())?;
        changes.push(Change::Put(Family::Meta, key, row.clone()));
        Ok(Ending {
            changes,
            root,
            row,
            usage,
            roots,
        })
    }

    /// The sum of a domain's records, of which there are none yet if it has no root.
    fn sum_of(&self, keys: &DomainKeys, stored: Option<&StoredRoot>) -> Result<RowSum> {
        match stored {
            None => Ok(RowSum::default()),
            Some(StoredRoot { sum: Some(sum), .. }) => Ok(*sum),
            Some(StoredRoot { seal, sum: None }) => {
                let key = rowkey::root(keys.domain());
                let row = self.store.get(Family::Meta, &key)?.unwrap_or_default();
                let plain = keys.open_row(Family::Meta, &key, &row);
                let root = plain.and_then(|plain| DomainRoot::decode(&plain).ok());
                let root = root.filter(|_| Seal::of_row(&row).as_ref() == Some(seal));
                root.map(|root| root.sum).ok_or_else(|| Error::Corrupt {
                    what: format!("the root record of key domain {}", keys.domain().0),
                })
            }
        }
    }

    /// Whether batches may be tried. What is large must find room, and leave some for what frees space; so must content that
    /// is to be stored in the ballast's room.
    fn has_room(&self, group: &[&Batch]) -> Result<bool> {
        let bytes: u64 = group.iter().map(|batch| batch.bytes()).sum();
        let is_tight = self.store.mode() != Mode::Roomy;
        match bytes > TRIED_BYTES_MAX || is_tight && group.iter().any(|batch| batch.has_content()) {
            true => self.space.has_room_for_log(bytes),
            false => Ok(true),
        }
    }

    /// Appends the batch of commit `seq` by `write`, in the ballast's room if there is no other. `expected`: the root records
    /// that the log ends with if it is there, and if it is not.
    fn append(
        &self,
        expected: &[&[u8]; 2],
        key: &[u8],
        seq: u64,
        has_room: impl Fn() -> Result<bool>,
        write: impl Fn() -> Result<()>,
    ) -> Result<()> {
        if !has_room()? {
            return Err(Error::Posix(libc::ENOSPC));
        }
        if self.store.mode() == Mode::ReadOnly {
            self.reopen(&expected[1..], key, Mode::Tight)?;
        }
        for _ in 0..APPENDS_MAX {
            if self.store.mode() != Mode::ReadOnly {
                match write() {
                    Err(error) if error.is_no_room() => {
                        tracing::warn!(%error, "there is no room for a commit")
                    }
                    outcome => return self.poison_on_error(outcome),
                }
            }
            // An append that failed took room, and so do others.
            let goes_on = has_room().unwrap_or(false);
            if goes_on {
                self.space.give_up_ballast();
            }
            if self.reopen(expected, key, Mode::Tight)? == 0 {
                // The last append got there all the same, and is durable now, as all is that was committed before.
                self.durable.fetch_max(seq, Ordering::AcqRel);
                return Ok(());
            }
            if !goes_on {
                break;
            }
        }
        Err(Error::Posix(libc::ENOSPC))
    }

    /// Opens the database again, which makes everything committed durable, and says which of the `expected` root records
    /// it ends with.
    fn reopen(&self, expected: &[&[u8]], key: &[u8], mode: Mode) -> Result<usize> {
        let reopened = self.store.reopen(mode);
        let stored = reopened.and_then(|()| self.store.get(Family::Meta, key));
        let stored = self.poison_on_error(stored)?.unwrap_or_default();
        let missing = || Error::Storage {
            errno: libc::EIO,
            message: "commits are missing from the log".to_owned(),
        };
        let found = expected.iter().position(|row| **row == stored);
        let found = self.poison_on_error(found.ok_or_else(missing))?;
        self.durable
            .fetch_max(self.committed.load(Ordering::Acquire), Ordering::AcqRel);
        Ok(found)
    }

    /// Lets the database flush and compact again if there is room for that.
    pub(crate) fn relieve(&self) -> Result<()> {
        if self.store.mode() == Mode::Roomy || self.check().is_err() {
            return Ok(());
        }
        let last = self.writer.lock();
        if self.space.free()? < self.store.flush_bytes() {
            return Ok(());
        }
        let key = rowkey::root(Domain::FIRST);
        self.reopen(&[&last.row], &key, Mode::Roomy).map(|_| ())
    }

    /// How many commits deleted something.
    pub(crate) fn deletions(&self) -> u64 {
        self.deletions.load(Ordering::Relaxed)
    }

    /// Reserves `count` inode numbers of a domain, durably, and returns the first. `keys` are the first domain's.
    pub(crate) fn reserve_inodes(&self, keys: &DomainKeys, domain: Domain, count: u64) -> Result<u64> {
        let first = {
            let mut last = self.writer.lock();
            let limit = match domain {
                Domain::FIRST => &mut last.root.ino_limit,
                // A domain that is gone gives no numbers.
                _ => match last.usage.get_mut(&domain) {
                    Some(counted) => &mut counted.usage.ino_limit,
                    None => return Err(Error::Posix(libc::ESTALE)),
                },
            };
            let first = *limit;
            let raised = first.checked_add(count);
            let raised = raised.filter(|limit| Ino(*limit).domain() == domain);
            *limit = raised.ok_or(Error::Posix(libc::ENOSPC))?;
            first
        };
        let mut batch = Batch::default();
        // Has the raised limit written.
        batch.count_inodes(domain, 0);
        let seq = self.commit(keys, batch)?;
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
        match self.store.sync_log() {
            Ok(()) => {
                self.durable.fetch_max(reached, Ordering::AcqRel);
                Ok(())
            }
            Err(SyncError::AppendFailed) => {
                // Whoever appended holds the writer until it is known what is there, and that is durable.
                drop(self.writer.lock());
                match self.is_durable(seq) {
                    true => self.check(),
                    false => self.poison_on_error(Err(Error::Poisoned)),
                }
            }
            Err(SyncError::Failed(error)) => self.poison_on_error(Err(error)),
        }
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
        self.writer.lock().root
    }

    /// What a domain but the first holds, as of the last commit; `None` once it is gone.
    pub(crate) fn usage(&self, domain: Domain) -> Option<Usage> {
        let last = self.writer.lock();
        last.usage.get(&domain).map(|counted| counted.usage)
    }

    /// What a domain holds, the first too: of the whole volume what is no other's.
    pub(crate) fn holds(&self, domain: Domain) -> Usage {
        let last = self.writer.lock();
        match domain {
            Domain::FIRST => {
                let sum =
                    |count: fn(&Usage) -> u64| last.usage.values().map(|other| count(&other.usage)).sum();
                let (inodes, blocks): (u64, u64) = (sum(|usage| usage.inodes), sum(|usage| usage.blocks));
                Usage {
                    ino_limit: last.root.ino_limit,
                    inodes: last.root.inodes.saturating_sub(inodes),
                    blocks: last.root.blocks.saturating_sub(blocks),
                }
            }
            _ => last
                .usage
                .get(&domain)
                .map_or_else(Usage::default, |counted| counted.usage),
        }
    }

    /// Rule R6: after a failed append or sync of the log nobody may claim success.
    pub(crate) fn check(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            Err(Error::Poisoned)
        } else {
            Ok(())
        }
    }

    fn poison_on_error<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.poisoned.store(true, Ordering::Release);
            tracing::error!(%error, "the log failed; the volume accepts no more changes");
        }
        result
    }
}

/// Takes in what a commit changed.
fn update<T>(known: &mut BTreeMap<Domain, T>, changed: BTreeMap<Domain, Option<T>>) {
    for (domain, now) in changed {
        match now {
            Some(now) => known.insert(domain, now),
            None => known.remove(&domain),
        };
    }
}

fn short_row() -> Error {
    Error::Storage {
        errno: libc::EIO,
        message: "a row was sealed without a seal".to_owned(),
    }
}

fn missing_keys(domain: Domain) -> Error {
    Error::Storage {
        errno: libc::EIO,
        message: format!("nothing seals the root of key domain {}", domain.0),
    }
}
