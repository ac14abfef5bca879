//! The watch over a domain's key: renewing its lease, going dark when the key may not be used, and coming back. One thread for
//! each domain does all of it, so that none of these overtakes another. docs/revocation.md gives the order, docs/domains.md
//! what one domain's darkness is to the others.

use super::bell::Wake;
use super::clock::Clock;
use super::core::{Access, Core, Fetch};
use super::domains::{KeyDomain, Known};
use super::error::{Error, Result};
use super::format::chunk::BLOCK;
use super::format::domain::DomainState;
use super::keyring::{Admission, KeyState, Purpose, state_after};
use super::keyservice::{Dependants, KeyError, Renewal};
use super::sync::{MutexGuard, before_purge};
use super::types::{Domain, Ino};
use super::upkeep::log_failure;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A renewal may take so long, and no longer than the lease.
pub(crate) const RENEWAL_MAX: Duration = Duration::from_secs(5);
/// And so long in any case, so that an answer is heard once the KMS is back.
const RENEWAL_MIN: Duration = Duration::from_millis(500);

/// The priority (nice(1)) of the thread that watches the key, and of those that it starts, where that is permitted.
const WATCHER_NICE: i32 = -10;

/// How often the KMS is told what depends on a key, at most, if that has changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// How long the KMS may be out of reach. It runs from before it was asked for, so that it never ends later here
/// than there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease {
    pub(crate) asked: Instant,
    pub(crate) length: Duration,
}

impl Lease {
    /// One that is over.
    pub(crate) fn none(now: Instant) -> Self {
        Self {
            asked: now,
            length: Duration::ZERO,
        }
    }

    /// How much of it is left.
    fn left(&self, now: Instant) -> Duration {
        self.length
            .saturating_sub(now.saturating_duration_since(self.asked))
    }
}

/// What the thread that watches a CMK remembers.
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

/// Starts the thread that watches a domain's key.
pub(crate) fn spawn_watch(core: &Arc<Core>, domain: Domain) -> Result<JoinHandle<()>> {
    let core = Arc::clone(core);
    std::thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || {
            if let Ok(domain) = core.domains.get(domain) {
                watch_key(&core, domain);
            }
        })
        .map_err(|error| Error::io("start a thread", &error))
}

/// The thread that nothing may end but the volume's own end: a panic in it must not leave a domain readable for ever.
fn watch_key(core: &Core, domain: &KeyDomain) {
    // What keeps every processor busy may be the very programs that are to see nothing more.
    if let Err(error) = rustix::process::setpriority_process(None, WATCHER_NICE) {
        tracing::debug!(%error, "the thread that watches the key goes before no other");
    }
    let lease = domain.lease.lock().take();
    let mut watch = KeyWatch {
        lease: lease.unwrap_or_else(|| Lease::none(core.clock.monotonic())),
        is_flushed: false,
    };
    while domain.bell.wait(core.options.key_poll_interval) == Wake::Work {
        let poll = AssertUnwindSafe(|| core.poll_key(domain, &mut watch));
        if catch_unwind(poll).is_err() {
            tracing::error!(
                domain = domain.id.0,
                "asking for the state of the key panicked; what is under it goes dark until that is known"
            );
            core.shut_after_panic(domain);
        }
    }
}

impl Access<'_> {
    /// Publishes what came in until the last operation ended, and makes it durable: what waits for that is forgotten.
    fn publish_rest(&self, going: impl Fn(Ino) -> bool) -> Result<()> {
        let mut nodes = self.active.nodes();
        nodes.retain(|node| going(node.ino));
        let mut outcome = Ok(());
        for node in &nodes {
            outcome = outcome.and(self.publish(node).inspect_err(|_| {
                // What it held goes with its node.
                self.poisoned.lock().insert(node.ino);
            }));
        }
        outcome = outcome.and(self.committer.sync_to(self.committer.committed()));
        // What waits for that is forgotten, too, and would be a leak.
        for node in &nodes {
            outcome = outcome.and(self.settle(node).map(|_| ()));
        }
        outcome
    }
}

impl KeyDomain {
    /// Whether an inode can be shown no more while this domain is dark: the first takes every other with it.
    fn darkens(&self, ino: Ino) -> bool {
        self.id == Domain::FIRST || ino.domain() == self.id
    }
}

impl Core {
    /// Asks for the state of a CMK, and brings its domain into the state that follows.
    fn poll_key(&self, domain: &KeyDomain, watch: &mut KeyWatch) {
        let asked = self.clock.monotonic();
        let answer = domain
            .keyring
            .renew(watch.lease.left(asked).clamp(RENEWAL_MIN, RENEWAL_MAX));
        match answer {
            Ok(Renewal {
                lease, state: Ok(()), ..
            }) => {
                watch.lease = Lease { asked, length: lease };
                watch.is_flushed = false;
                self.relight(domain);
                if self.due_report(domain).is_some() {
                    self.fetch_ahead(Fetch::Report(domain.id));
                }
            }
            Ok(Renewal {
                epoch,
                state: Err(error),
                ..
            }) => {
                // An answer that says no, for whatever reason, is no leave to go on.
                self.darken(domain, state_after(&error).unwrap_or(KeyState::Revoked));
                // Each time: a KMS that was started anew has not heard it, and would end this process.
                if let Err(error) = domain.keyring.acknowledge(epoch) {
                    tracing::warn!(%error, "the KMS was not told that what it revoked is dark");
                }
                self.note_destroyed(domain, &error);
            }
            Err(error) => match state_after(&error) {
                Some(state) => self.darken(domain, state),
                None => self.bear_outage(domain, watch, &error),
            },
        }
    }

    /// What is under a destroyed key is given up; not the first domain, whose volume is of no use without it.
    fn note_destroyed(&self, domain: &KeyDomain, error: &KeyError) {
        if *error == KeyError::Destroyed && domain.id != Domain::FIRST && !domain.is_destroyed() {
            domain.note_destroyed();
            self.domains_bell.ring();
        }
    }

    /// What the KMS is to be told that depends on a key, if that is not what it was told.
    fn due_report(&self, domain: &KeyDomain) -> Option<Dependants> {
        let now = self.clock.monotonic();
        let holds = self.committer.holds(domain.id);
        let known = self.domains.known(domain.id);
        let is_removed = known.is_some_and(|known| known.state == DomainState::Removed);
        let dependants = match is_removed {
            true => Dependants::NONE,
            false => Dependants {
                inodes: holds.inodes,
                bytes: holds.blocks.saturating_mul(BLOCK as u64),
                is_removed,
            },
        };
        let is_due = match *domain.reported.lock() {
            Some((told, when)) => {
                let is_time = now.saturating_duration_since(when) >= REPORT_INTERVAL;
                told != dependants && (is_time || is_removed)
            }
            None => true,
        };
        is_due.then_some(dependants)
    }

    /// Tells the KMS what depends on a key. Not on the thread that watches it: a revocation waits for that one.
    pub(crate) fn report(&self, domain: &KeyDomain) {
        let Some(dependants) = self.due_report(domain) else {
            return;
        };
        match domain.keyring.service().report(dependants) {
            Ok(()) => *domain.reported.lock() = Some((dependants, self.clock.monotonic())),
            Err(error) => tracing::debug!(%error, "the KMS was not told what depends on the key"),
        }
    }

    /// The KMS does not answer: the keys may be used until the lease ends. What was written is stored while there is
    /// time, and is all stored before it ends.
    fn bear_outage(&self, domain: &KeyDomain, watch: &mut KeyWatch, error: &KeyError) {
        let left = watch.lease.left(self.clock.monotonic());
        if left <= self.options.drain_max.min(watch.lease.length / 4) {
            self.darken(domain, KeyState::Unreachable);
            return;
        }
        tracing::warn!(%error, left_ms = left.as_millis(), "the lease was not renewed");
        if left <= watch.lease.length / 2
            && !watch.is_flushed
            && domain.keyring.state() == KeyState::Live
            && !self.options.read_only
        {
            watch.is_flushed = true;
            if let Err(error) = self.publish_all() {
                log_failure("storing content before the lease ends", &error);
            }
        }
    }

    /// -> dark, from whatever state.
    fn darken(&self, domain: &KeyDomain, state: KeyState) {
        let _one_at_a_time = domain.is_shut_by_hand.lock();
        self.darken_alone(domain, state);
    }

    fn darken_alone(&self, domain: &KeyDomain, state: KeyState) {
        match domain.keyring.state() {
            KeyState::Live | KeyState::Draining => self.revoke(domain, state),
            dark if dark != state => domain.keyring.restate(state),
            _ => {}
        }
    }

    /// Goes dark because somebody here wants it, without asking the KMS, and stays so until that is taken back. Returns when
    /// it is dark, or when it is live again as far as the KMS permits.
    pub(crate) fn shut_by_hand(&self, shut: bool) {
        let first = self.domains.first();
        let mut is_shut = first.is_shut_by_hand.lock();
        *is_shut = shut;
        if shut {
            self.darken_alone(first, KeyState::Revoked);
        } else {
            drop(is_shut);
            first.bell.ring();
        }
    }

    /// Dark -> live.
    fn relight(&self, domain: &KeyDomain) {
        let is_shut_by_hand = domain.is_shut_by_hand.lock();
        if *is_shut_by_hand || domain.keyring.state() == KeyState::Live || self.is_unverified(domain) {
            return;
        }
        let is_erased = |known: Known| known.state == DomainState::Erased;
        if self.domains.known(domain.id).is_some_and(is_erased) {
            return;
        }
        {
            // Held until it is lit: the first, going dark, finds what it has to wipe.
            let first = self.domains.first();
            let hold = (domain.id != Domain::FIRST).then(|| first.keyring.hold());
            let is_first_live = |hold| first.keyring.admit_held(hold, Purpose::Serve).is_ok();
            if !hold.as_ref().is_none_or(is_first_live) {
                return;
            }
            match domain.keyring.relight() {
                Ok(()) => tracing::info!(domain = domain.id.0, "the key may be used again"),
                Err(error) => {
                    tracing::warn!(domain = domain.id.0, %error, "the volume key could not be opened");
                    return;
                }
            }
        }
        drop(is_shut_by_hand);
        self.verify_bell.ring();
        if domain.id == Domain::FIRST {
            for other in self.domains.others() {
                other.bell.ring();
            }
        } else if let Err(error) = self.know_orphans(domain) {
            log_failure("noting unlinked files", &error);
        }
    }

    /// Live -> dark, in the order that docs/revocation.md gives.
    fn revoke(&self, domain: &KeyDomain, state: KeyState) {
        tracing::warn!(
            ?state,
            domain = domain.id.0,
            "the key may not be used any more; what is under it goes dark"
        );
        let mut laps = Laps::begin(&*self.clock);
        let going = |ino: Ino| domain.darkens(ino);
        {
            let _broken_off = self.break_off_others(domain);
            domain.keyring.begin_draining();
        }
        laps.end("refused");
        std::thread::scope(|scope| {
            let (done, is_done) = std::sync::mpsc::channel::<()>();
            let timer = std::thread::Builder::new().spawn_scoped(scope, move || {
                // The purge waits for write-backs: once they are refused, it ends.
                if is_done.recv_timeout(self.options.drain_max) == Err(RecvTimeoutError::Timeout) {
                    domain.keyring.end_draining();
                }
            });
            if let Err(error) = timer {
                tracing::warn!(%error, "no thread to keep the time: kmsd alone limits how long storing may take");
            }
            self.purge(domain);
            laps.end("purged");
            if !self.options.read_only
                && let Err(error) = self.publish_at_once(going)
            {
                tracing::debug!(%error, "content is to be stored once more before the keys go");
            }
            drop(done);
        });
        laps.end("stored");
        // Until nothing is left of what they held, too: none of them says before that it is dark.
        let _others = self.stop_others(domain);
        self.shut(domain, state, |access| {
            if self.options.read_only {
                return;
            }
            if domain.keyring.is_drain_over() {
                tracing::error!("the time to store what was written is over");
                self.lose_pending(going);
                return;
            }
            match access.map(|access| access.publish_rest(going)) {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::error!(%error, "content written before the revocation is lost");
                    self.lose_pending(going);
                }
                // The first was shut before, and stored everything, or said what was lost.
                None => self.lose_pending(going),
            }
        });
        laps.end("shut");
        self.forget_secrets(domain, &mut laps);
        tracing::info!(
            took_ms = laps.took().as_millis(),
            steps_ms = laps.steps,
            domain = domain.id.0,
            "it is dark"
        );
    }

    /// Has operations of other domains broken off, if this is the first, whose gate they hold, too.
    fn break_off_others(&self, domain: &KeyDomain) -> Vec<impl Drop> {
        match domain.id {
            Domain::FIRST => self
                .domains
                .others()
                .map(|other| other.keyring.break_off())
                .collect(),
            _ => Vec::new(),
        }
    }

    /// Shuts a domain's gate once every operation has ended, lets `last` use its keys alone, and wipes them; with the first
    /// those of every other go, whose states are to be kept as they are. `last` is given no access where the first is dark already, which stored everything.
    fn shut(&self, domain: &KeyDomain, state: KeyState, last: impl FnOnce(Option<Access<'_>>)) {
        if domain.id != Domain::FIRST {
            // Held throughout: gates are shut in their order, and the first needs none of ours to be shut.
            let hold = self.domains.first().keyring.hold();
            domain.keyring.go_dark(state, |own| {
                let first = self.domains.first().keyring.admit_held(&hold, Purpose::Drain);
                let access = |first| self.with_keys(domain, Purpose::Drain, first, vec![own]);
                last(first.ok().map(access));
            });
            return;
        }
        let broken_off = self.break_off_others(domain);
        domain.keyring.go_dark(state, |first| {
            // None is under way any more.
            drop(broken_off);
            let others = self.domains.others();
            let others: Vec<Admission<'_>> = others
                .filter_map(|other| other.keyring.admit(Purpose::Drain).ok())
                .collect();
            last(Some(self.with_keys(domain, Purpose::Drain, first, others)));
        });
        for other in self.domains.others() {
            if matches!(other.keyring.state(), KeyState::Live | KeyState::Draining) {
                other.keyring.go_dark(state, |_| ());
            }
        }
    }

    /// Keeps the state of every other domain as it is, if this is the first, which shuts them.
    fn stop_others(&self, domain: &KeyDomain) -> Vec<MutexGuard<'_, bool>> {
        match domain.id {
            Domain::FIRST => self
                .domains
                .others()
                .map(|other| other.is_shut_by_hand.lock())
                .collect(),
            _ => Vec::new(),
        }
    }

    /// A domain that nobody watches is dark.
    pub(crate) fn shut_unwatched(&self, domain: Domain) {
        if let Ok(domain) = self.domains.get(domain) {
            self.darken(domain, KeyState::Unreachable);
        }
    }

    /// -> dark without an attempt to store anything more.
    fn shut_after_panic(&self, domain: &KeyDomain) {
        let _one_at_a_time = domain.is_shut_by_hand.lock();
        let _others = self.stop_others(domain);
        self.shut(domain, KeyState::Unreachable, |_| ());
        // What a commit freed may be written again by the nodes that come after these: not before it is durable.
        if let Err(error) = self.committer.sync_to(self.committer.committed()) {
            tracing::error!(%error, "content written before is lost");
        }
        self.lose_pending(|ino| domain.darkens(ino));
        self.forget_secrets(domain, &mut Laps::begin(&*self.clock));
    }

    /// What is not stored goes with the nodes: no later fsync of those files may claim otherwise (rule R6).
    fn lose_pending(&self, going: impl Fn(Ino) -> bool) {
        for node in self.active.nodes().iter().filter(|node| going(node.ino)) {
            let state = node.state.read();
            if state.file.dirty || !state.file.pending.is_empty() {
                tracing::error!(inode = node.ino.0, chunks = ?state.file.pending.keys().collect::<Vec<_>>(), "content is lost");
                self.poisoned.lock().insert(node.ino);
            }
        }
    }

    /// Drops what was decrypted, here and in the kernel, once the gate is shut.
    fn forget_secrets(&self, domain: &KeyDomain, laps: &mut Laps<'_>) {
        // No operation is under way, and none begins: nothing refers to these any more.
        let going = |ino: Ino| domain.darkens(ino);
        for node in self.active.take(going) {
            self.take_pending(&mut node.state.write());
        }
        self.nodes.clear(going);
        // Those of other domains are read again.
        self.chunks.clear();
        for other in self.domains.all() {
            if domain.darkens(other.id.root()) {
                other.nursery.clear();
            }
        }
        laps.end("forgot");
        self.purge(domain);
        laps.end("purged again");
        let observer = self.observer.lock().clone();
        if let Some(observer) = observer {
            observer.wipe();
        }
        laps.end("wiped");
    }

    fn purge(&self, domain: &KeyDomain) {
        let observer = self.observer.lock().clone();
        if let Some(observer) = observer {
            let mut known: Vec<Ino> = self.nodes.known();
            known.retain(|ino| domain.darkens(*ino));
            before_purge();
            observer.purge(&known);
        }
    }
}
