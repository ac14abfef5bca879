//! The background: publishing by timer (rule R5), draining, giving freed space back, reclaiming orphans; compacting on a
//! full host; watching the state of the CMK; fetching keys ahead of their use. Each has a thread of its own, since each
//! may wait.

use super::bell::Wake;
use super::clock::Clock;
use super::core::{Access, Core, Fetch};
use super::error::{Error, Result};
use super::keyring::{KeyState, state_after};
use super::keyservice::{KeyError, Renewal};
use super::node::Node;
use super::open::Opened;
use super::seal;
use super::space::Room;
use super::sync::before_purge;
use super::types::Ino;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the upkeep thread looks for idle files and orphans, unless it publishes more often than that.
const TICK_MAX: Duration = Duration::from_secs(1);

/// A renewal may take so long, and no longer than the lease.
pub(crate) const RENEWAL_MAX: Duration = Duration::from_secs(5);
/// And so long in any case, so that an answer is heard once the KMS is back.
const RENEWAL_MIN: Duration = Duration::from_millis(500);

/// The priority (nice(1)) of the thread that watches the key, and of those that it starts, where that is permitted.
const WATCHER_NICE: i32 = -10;

/// So many files are stored at once when the volume goes dark.
const PUBLISHERS: usize = 8;

/// How long the compacting thread waits if nothing rings.
const COMPACT_MAX: Duration = Duration::from_secs(60);
/// Compacting takes one part in so many of the time.
const COMPACT_SHARE: u32 = 4;

/// How long the KMS may be out of reach. It runs from before it was asked for, so that it never ends later here
/// than there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease {
    pub(crate) asked: Instant,
    pub(crate) length: Duration,
}

impl Lease {
    /// How much of it is left.
    fn left(&self, now: Instant) -> Duration {
        self.length
            .saturating_sub(now.saturating_duration_since(self.asked))
    }
}

/// What the thread that watches the CMK remembers.
struct KeyWatch {
    lease: Lease,
    /// Content was stored since the last renewal, because there may not be another.
    is_flushed: bool,
}

/// How long the steps of going dark took, for the log.
struct Laps<'c> {
    clock: &'c dyn Clock,
    began: Instant,
    last: Instant,
    steps: String,
}

impl<'c> Laps<'c> {
    fn begin(clock: &'c dyn Clock) -> Self {
        let now = clock.monotonic();
        Self {
            clock,
            began: now,
            last: now,
            steps: String::new(),
        }
    }

    fn end(&mut self, step: &str) {
        let now = self.clock.monotonic();
        let took = now.saturating_duration_since(self.last).as_millis();
        self.last = now;
        let comma = if self.steps.is_empty() { "" } else { ", " };
        self.steps.push_str(&format!("{comma}{step} in {took}"));
    }

    fn took(&self) -> Duration {
        self.last.saturating_duration_since(self.began)
    }
}

/// Which threads are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// Those of a mount.
    All,
    /// The one that watches the key.
    KeysAlone,
}

/// Starts the threads. Each holds the core until it is stopped.
pub(crate) fn start(opened: Opened, which: Threads) -> Result<Vec<JoinHandle<()>>> {
    let Opened {
        core,
        jobs,
        lease,
        sweep,
    } = opened;
    let spawn = |name: &str, work: Box<dyn FnOnce(Arc<Core>) + Send>| {
        let core = Arc::clone(&core);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(core))
            .map_err(|error| Error::io("start a thread", &error))
    };
    let mut threads = vec![spawn("keys", Box::new(move |core| watch_key(&core, lease)))?];
    if which == Threads::KeysAlone {
        return Ok(threads);
    }
    threads.push(spawn("fetch", Box::new(move |core| fetch(&core, &jobs)))?);
    if !core.options.read_only {
        threads.push(spawn("upkeep", Box::new(|core| keep_up(&core)))?);
        threads.push(spawn("compact", Box::new(|core| compact(&core)))?);
        if let Some(sweep) = sweep {
            threads.push(spawn("sweep", Box::new(move |core| core.sweep(&sweep)))?);
        }
    }
    Ok(threads)
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
                    && core.orphans.is_idle()
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
        if core.key_bell.is_stopped() {
            return;
        }
        let done = match job {
            Fetch::Stop => return,
            Fetch::Nursery => core.serve().and_then(|access| access.refill_nursery_ahead()),
            Fetch::Files(files) => core.serve().and_then(|access| access.prefetch_keys(&files)),
        };
        if let Err(error) = done {
            log_failure("fetching keys ahead", &error);
        }
    }
}

/// The thread that nothing may end but the volume's own end: a panic in it must not leave the volume readable for ever.
fn watch_key(core: &Core, lease: Lease) {
    // What keeps every processor busy may be the very programs that are to see nothing more.
    if let Err(error) = rustix::process::setpriority_process(None, WATCHER_NICE) {
        tracing::debug!(%error, "the thread that watches the key goes before no other");
    }
    let mut watch = KeyWatch {
        lease,
        is_flushed: false,
    };
    while core.key_bell.wait(core.options.key_poll_interval) == Wake::Work {
        let poll = AssertUnwindSafe(|| core.poll_key(&mut watch));
        if catch_unwind(poll).is_err() {
            tracing::error!(
                "asking for the state of the key panicked; the volume goes dark until that is known"
            );
            core.shut_after_panic();
        }
    }
}

fn log_failure(what: &str, error: &Error) {
    match error {
        // The key's state is told where it changes.
        Error::KeyRevoked | Error::KeyErased | Error::KeyDenied | Error::KeyUnavailable => {
            tracing::debug!(%error, "{what} waits for the key");
        }
        _ => tracing::error!(%error, "{what} failed"),
    }
}

impl Access<'_> {
    /// Publishes what came in until the last operation ended, and makes it durable: what waits for that is forgotten.
    fn publish_rest(&self) -> Result<()> {
        let mut outcome = Ok(());
        for node in self.active.nodes() {
            outcome = outcome.and(self.publish(&node).inspect_err(|_| {
                // What it held goes with its node.
                self.poisoned.lock().insert(node.ino);
            }));
        }
        outcome = outcome.and(self.committer.sync_to(self.committer.committed()));
        // What waits for that is forgotten, too, and would be a leak.
        for node in self.active.nodes() {
            outcome = outcome.and(self.settle(&node).map(|_| ()));
        }
        outcome
    }
}

impl Core {
    fn tick(&self, publish: bool) -> Result<()> {
        let mut outcome = self.relieve();
        outcome = outcome.and(self.reclaim_all());
        if publish {
            let free = self.space.free()?;
            outcome = outcome.and(self.publish_each(|access, node| access.publish_if_it_may_fit(node, free)));
            outcome = outcome.and(self.drain()?.remove_slot_files());
        }
        outcome.and(self.for_active(|access, node| {
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

    /// The same, several files at once: it waits for the host's storage most of the time, and somebody waits for it.
    fn publish_all_at_once(&self) -> Result<()> {
        let inodes = self.active.inodes();
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
        self.committer.sync_to(self.committer.committed())?;
        let access = self.drain()?;
        let (durable, kms) = (self.committer.durable(), self.keyring.position());
        match seal::advance(&self.dir, access.keys(), durable, kms, &self.sealed) {
            // It says less than it might; what it vouches for is in the log.
            Err(error) if error.is_no_room() => tracing::warn!(%error, "the seal file stays behind"),
            sealed => sealed?,
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
            let access = self.drain()?;
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

    /// Asks for the state of the CMK, and brings the volume into the state that follows.
    fn poll_key(&self, watch: &mut KeyWatch) {
        let asked = self.clock.monotonic();
        let answer = self
            .keyring
            .renew(watch.lease.left(asked).clamp(RENEWAL_MIN, RENEWAL_MAX));
        match answer {
            Ok(Renewal {
                lease, state: Ok(()), ..
            }) => {
                watch.lease = Lease { asked, length: lease };
                watch.is_flushed = false;
                self.relight();
            }
            Ok(Renewal {
                epoch,
                state: Err(error),
                ..
            }) => {
                // An answer that says no, for whatever reason, is no leave to go on.
                self.darken(state_after(&error).unwrap_or(KeyState::Revoked));
                // Each time: a KMS that was started anew has not heard it, and would end this process.
                if let Err(error) = self.keyring.acknowledge(epoch) {
                    tracing::warn!(%error, "the KMS was not told that the volume is dark");
                }
            }
            Err(error) => match state_after(&error) {
                Some(state) => self.darken(state),
                None => self.bear_outage(watch, &error),
            },
        }
    }

    /// The KMS does not answer: the keys may be used until the lease ends. What was written is stored while there is
    /// time, and is all stored before it ends.
    fn bear_outage(&self, watch: &mut KeyWatch, error: &KeyError) {
        let left = watch.lease.left(self.clock.monotonic());
        if left <= self.options.drain_max.min(watch.lease.length / 4) {
            self.darken(KeyState::Unreachable);
            return;
        }
        tracing::warn!(%error, left_ms = left.as_millis(), "the lease was not renewed");
        if left <= watch.lease.length / 2
            && !watch.is_flushed
            && self.keyring.state() == KeyState::Live
            && !self.options.read_only
        {
            watch.is_flushed = true;
            if let Err(error) = self.publish_all() {
                log_failure("storing content before the lease ends", &error);
            }
        }
    }

    /// -> dark, from whatever state.
    fn darken(&self, state: KeyState) {
        let _one_at_a_time = self.is_shut_by_hand.lock();
        self.darken_alone(state);
    }

    fn darken_alone(&self, state: KeyState) {
        match self.keyring.state() {
            KeyState::Live | KeyState::Draining => self.revoke(state),
            dark if dark != state => self.keyring.restate(state),
            _ => {}
        }
    }

    /// Goes dark because somebody here wants it, without asking the KMS, and stays so until that is taken back. Returns when
    /// it is dark, or when it is live again as far as the KMS permits.
    pub(crate) fn shut_by_hand(&self, shut: bool) {
        let mut is_shut = self.is_shut_by_hand.lock();
        *is_shut = shut;
        if shut {
            self.darken_alone(KeyState::Revoked);
        } else {
            drop(is_shut);
            self.key_bell.ring();
        }
    }

    /// Dark -> live.
    fn relight(&self) {
        let is_shut_by_hand = self.is_shut_by_hand.lock();
        if *is_shut_by_hand || self.keyring.state() == KeyState::Live {
            return;
        }
        match self.keyring.relight() {
            Ok(()) => tracing::info!("the key may be used again"),
            Err(error) => tracing::warn!(%error, "the volume key could not be opened"),
        }
    }

    /// Live -> dark, in the order that docs/ARCHITECTURE.md gives.
    fn revoke(&self, state: KeyState) {
        tracing::warn!(?state, "the key may not be used any more; the volume goes dark");
        let mut laps = Laps::begin(&*self.clock);
        self.keyring.begin_draining();
        laps.end("refused");
        std::thread::scope(|scope| {
            let (done, is_done) = std::sync::mpsc::channel::<()>();
            let timer = std::thread::Builder::new().spawn_scoped(scope, move || {
                // The purge waits for write-backs: once they are refused, it ends.
                if is_done.recv_timeout(self.options.drain_max) == Err(RecvTimeoutError::Timeout) {
                    self.keyring.end_draining();
                }
            });
            if let Err(error) = timer {
                tracing::warn!(%error, "no thread to keep the time: kmsd alone limits how long storing may take");
            }
            self.purge();
            laps.end("purged");
            if !self.options.read_only
                && let Err(error) = self.publish_all_at_once()
            {
                tracing::debug!(%error, "content is to be stored once more before the keys go");
            }
            drop(done);
        });
        laps.end("stored");
        self.keyring.go_dark(state, |admission| {
            if self.options.read_only {
                return;
            }
            if self.keyring.is_drain_over() {
                tracing::error!("the time to store what was written is over");
                self.lose_pending();
            } else if let Err(error) = self.with_keys(admission).publish_rest() {
                tracing::error!(%error, "content written before the revocation is lost");
            }
        });
        laps.end("shut");
        self.forget_secrets(&mut laps);
        tracing::info!(
            took_ms = laps.took().as_millis(),
            steps_ms = laps.steps,
            "the volume is dark"
        );
    }

    /// -> dark without an attempt to store anything more.
    fn shut_after_panic(&self) {
        let _one_at_a_time = self.is_shut_by_hand.lock();
        self.keyring.go_dark(KeyState::Unreachable, |_| ());
        // What a commit freed may be written again by the nodes that come after these: not before it is durable.
        if let Err(error) = self.committer.sync_to(self.committer.committed()) {
            tracing::error!(%error, "content written before is lost");
        }
        self.lose_pending();
        self.forget_secrets(&mut Laps::begin(&*self.clock));
    }

    /// What is not stored goes with the nodes: no later fsync of those files may claim otherwise (rule R6).
    fn lose_pending(&self) {
        for node in self.active.nodes() {
            let state = node.state.read();
            if state.file.dirty || !state.file.pending.is_empty() {
                tracing::error!(inode = node.ino.0, chunks = ?state.file.pending.keys().collect::<Vec<_>>(), "content is lost");
                self.poisoned.lock().insert(node.ino);
            }
        }
    }

    /// Drops what was decrypted, here and in the kernel, once the gate is shut.
    fn forget_secrets(&self, laps: &mut Laps<'_>) {
        // No operation is under way, and none begins: nothing refers to these any more.
        self.active.clear();
        self.nodes.clear();
        self.chunks.clear();
        self.nursery.clear();
        laps.end("forgot");
        self.purge();
        laps.end("purged again");
        let observer = self.observer.lock().clone();
        if let Some(observer) = observer {
            observer.wipe();
        }
        laps.end("wiped");
    }

    fn purge(&self) {
        let observer = self.observer.lock().clone();
        if let Some(observer) = observer {
            let known: Vec<Ino> = self.nodes.known();
            before_purge();
            observer.purge(&known);
        }
    }
}
