//! The background: publishing by timer (rule R5), draining, giving freed space back, reclaiming orphans and what erased domains
//! leave; compacting on a full host; fetching keys ahead of their use. Each has a thread of its own, since each may wait. So has
//! the watch over each domain's key (`watch`).

use super::bell::Wake;
use super::core::{Access, Core, Fetch};
use super::error::{Error, Result};
use super::node::Node;
use super::open::Opened;
use super::seal;
use super::space::Room;
use super::types::{Domain, Ino};
use super::verification::{Verify, verify_in_background};
use super::watch::spawn_watch;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the upkeep thread looks for idle files and orphans, unless it publishes more often than that.
const TICK_MAX: Duration = Duration::from_secs(1);

/// So many files are stored at once when the volume goes dark.
const PUBLISHERS: usize = 8;

/// How long the thread that ends key domains waits if nothing rings.
const DOMAINS_MAX: Duration = Duration::from_secs(60);
/// How long the compacting thread waits if nothing rings.
const COMPACT_MAX: Duration = Duration::from_secs(60);
/// Compacting takes one part in so many of the time.
const COMPACT_SHARE: u32 = 4;

/// Which threads are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// Those of a mount.
    All,
    /// Those that watch the keys.
    KeysAlone,
}

/// The threads of an open volume.
#[derive(Default)]
pub(crate) struct Background {
    /// Those that watch the keys, to the end: a volume that is being put away can be revoked, too.
    pub(crate) watches: Vec<JoinHandle<()>>,
    pub(crate) work: Vec<JoinHandle<()>>,
}

/// Starts the threads. Each holds the core until it is stopped.
pub(crate) fn start(opened: Opened, which: Threads) -> Result<Background> {
    let Opened { core, jobs, sweep } = opened;
    let spawn = |name: &str, work: Box<dyn FnOnce(Arc<Core>) + Send>| {
        let core = Arc::clone(&core);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(core))
            .map_err(|error| Error::io("start a thread", &error))
    };
    let watched = core.domains.all().map(|domain| spawn_watch(&core, domain.id));
    let watches = watched.collect::<Result<Vec<_>>>()?;
    let mut work = Vec::new();
    if which == Threads::All {
        if core.options.verify == Verify::Lazy {
            work.push(spawn("verify", Box::new(|core| verify_in_background(&core)))?);
        }
        work.push(spawn("fetch", Box::new(move |core| fetch(&core, &jobs)))?);
        if !core.options.read_only {
            work.push(spawn("upkeep", Box::new(|core| keep_up(&core)))?);
            work.push(spawn("compact", Box::new(|core| compact(&core)))?);
            work.push(spawn("domains", Box::new(|core| end_domains(&core)))?);
            if let Some(sweep) = sweep {
                work.push(spawn("sweep", Box::new(move |core| core.sweep(&sweep)))?);
            }
        }
    }
    Ok(Background { watches, work })
}

fn keep_up(core: &Core) {
    let mut published = core.clock.monotonic();
    let tick = core.options.publish_interval.min(TICK_MAX);
    while core.upkeep_bell.wait(tick) == Wake::Work {
        let now = core.clock.monotonic();
        let due = now.saturating_duration_since(published) >= core.options.publish_interval;
        if due {
            published = now;
        }
        if let Err(error) = core.tick(due) {
            log_failure("upkeep", &error);
        }
    }
}

/// What is left of key domains that are gone may be much.
fn end_domains(core: &Core) {
    loop {
        if let Err(error) = core.end_domains() {
            log_failure("giving up a key domain", &error);
        }
        if core.domains_bell.wait(DOMAINS_MAX) == Wake::Stop {
            return;
        }
    }
}

/// Once the host has run low, what is deleted is given back to it at once: RocksDB would wait for writes.
fn compact(core: &Core) {
    let mut seen = core.committer.deletions();
    let mut earliest = core.clock.monotonic();
    while core.compact_bell.wait(COMPACT_MAX) == Wake::Work {
        let (deletions, now) = (core.committer.deletions(), core.clock.monotonic());
        if deletions == seen || now < earliest || !core.is_compaction_due.load(Ordering::Acquire) {
            continue;
        }
        let go_on = || match core.compact_bell.is_stopped() {
            true => Err(Error::Posix(libc::EINTR)),
            false => Ok(()),
        };
        match core.store.compact(|| core.space.free(), go_on) {
            Ok(true) => {
                seen = deletions;
                if core.space.room() == Room::Plenty
                    && core.orphans.is_idle(|domain| !core.is_dark(domain))
                    && core.committer.deletions() == seen
                {
                    core.is_compaction_due.store(false, Ordering::Release);
                }
            }
            Ok(false) => {}
            Err(error) => log_failure("compacting", &error),
        }
        let took = core.clock.monotonic().saturating_duration_since(now);
        earliest = now + took * COMPACT_SHARE;
    }
}

fn fetch(core: &Core, jobs: &Receiver<Fetch>) {
    while let Ok(job) = jobs.recv() {
        if core.upkeep_bell.is_stopped() {
            return;
        }
        let done = match job {
            Fetch::Stop => return,
            Fetch::Nursery(domain) => {
                if let Ok(domain) = core.domains.get(domain) {
                    domain.nursery.note_heard();
                }
                let access = core.serve(domain);
                access.and_then(|access| access.refill_nursery_ahead())
            }
            Fetch::Anchor => {
                core.tell_anchor();
                Ok(())
            }
            Fetch::Report(domain) => {
                if let Ok(domain) = core.domains.get(domain) {
                    core.report(domain);
                }
                Ok(())
            }
            Fetch::Files(files) => {
                let domain = files.first().map_or(Domain::FIRST, |ino| ino.domain());
                core.serve(domain).and_then(|access| access.prefetch_keys(&files))
            }
        };
        if let Err(error) = done {
            log_failure("fetching keys ahead", &error);
        }
    }
}

pub(crate) fn log_failure(what: &str, error: &Error) {
    // The key's state is told where it changes.
    if error.is_of_key() {
        tracing::debug!(%error, "{what} waits for the key");
    } else {
        tracing::error!(%error, "{what} failed");
    }
}

impl Core {
    fn tick(&self, publish: bool) -> Result<()> {
        let mut outcome = self.relieve();
        outcome = outcome.and(self.reclaim_all());
        if publish {
            let free = self.space.free()?;
            outcome = outcome.and(self.publish_each(|access, node| access.publish_if_it_may_fit(node, free)));
            outcome = outcome.and(self.remove_slot_files());
        }
        outcome.and(self.for_active(|access, node| {
            // Ciphertext is moved by records that are known to be the last.
            if self.refuse_lost(node.ino.domain()).is_err() {
                return Ok(());
            }
            if !access.settle(node)? {
                access.drain_if_due(node)?;
            }
            Ok(())
        }))
    }

    /// Looks how much room the host has, and makes the best of it.
    fn relieve(&self) -> Result<()> {
        self.committer.relieve()?;
        if let Err(error) = self.space.restore_ballast() {
            tracing::warn!(%error, "the ballast is not there again");
        }
        if self.space.look(self.active.pending_bytes())? != Room::Plenty {
            self.is_compaction_due.store(true, Ordering::Release);
        }
        if self.is_compaction_due.load(Ordering::Acquire) {
            self.compact_bell.ring();
        }
        Ok(())
    }

    /// Publishes every file, makes the log durable, and notes how far it reached. While going dark, for as long as there is
    /// time.
    pub(crate) fn publish_all(&self) -> Result<()> {
        self.publish_each(|access, node| access.publish(node))
    }

    /// The same for some files, several at once: it waits for the host's storage most of the time, and somebody waits for it.
    pub(crate) fn publish_at_once(&self, which: impl Fn(Ino) -> bool) -> Result<()> {
        let mut inodes = self.active.inodes();
        inodes.retain(|ino| which(*ino));
        let share = inodes.len().div_ceil(PUBLISHERS).max(1);
        let published = std::thread::scope(|scope| {
            let threads: Vec<_> = inodes
                .chunks(share)
                .map(|inodes| {
                    let publish = || self.for_each(inodes, |access, node| access.publish(node));
                    (inodes, std::thread::Builder::new().spawn_scoped(scope, publish))
                })
                .collect();
            let mut outcome = Ok(());
            for (inodes, thread) in threads {
                outcome = outcome.and(match thread {
                    Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                    // A host that gives no more threads is no reason to lose content.
                    Err(_) => self.for_each(inodes, |access, node| access.publish(node)),
                });
            }
            outcome
        });
        published.and(self.sync_and_seal())
    }

    fn publish_each(&self, publish: impl Fn(&Access<'_>, &Arc<Node>) -> Result<()>) -> Result<()> {
        let outcome = self.for_active(publish);
        outcome.and(self.sync_and_seal())
    }

    /// Makes the log durable, and notes how far it reached.
    fn sync_and_seal(&self) -> Result<()> {
        let root = self.committer.root();
        self.committer.sync_to(self.committer.committed())?;
        let access = self.drain(Domain::FIRST)?;
        let kms = self.domains.first().keyring.position();
        let keys = access.keys_of(Domain::FIRST)?;
        let anchor = self.anchor_candidate(keys, &root);
        let durable = self.committer.durable();
        match seal::advance(&self.dir, keys, durable, kms, anchor, &self.sealed) {
            // It says less than it might; what it vouches for is in the log.
            Err(error) if error.is_no_room() => tracing::warn!(%error, "the seal file stays behind"),
            sealed => sealed?,
        }
        drop(access);
        if self.sealed.lock().anchors.outstanding().is_some() {
            self.fetch_ahead(Fetch::Anchor);
        }
        Ok(())
    }

    /// Does something with each active file. One that fails does not keep the others from it.
    pub(crate) fn for_active(&self, work: impl Fn(&Access<'_>, &Arc<Node>) -> Result<()>) -> Result<()> {
        self.for_each(&self.active.inodes(), work)
    }

    fn for_each(&self, inodes: &[Ino], work: impl Fn(&Access<'_>, &Arc<Node>) -> Result<()>) -> Result<()> {
        let mut outcome = Ok(());
        for &ino in inodes {
            // No node is held without access: after a revocation there are others.
            let access = match self.drain(ino.domain()) {
                Ok(access) => access,
                // It is stored when its domain goes dark, if it is not yet.
                Err(error) => {
                    outcome = outcome.and(Err(error));
                    continue;
                }
            };
            let Some(node) = self.active.get(ino) else {
                continue;
            };
            let done = work(&access, &node);
            if let Err(error) = &done
                && *error != Error::Poisoned
            {
                tracing::error!(inode = ino.0, %error, "a file could not be stored");
            }
            outcome = outcome.and(done);
        }
        outcome
    }
}
