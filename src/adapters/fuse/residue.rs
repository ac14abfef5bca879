//! What served requests leave behind in the loops: fuser's buffer, where a request lies until the next one is read over
//! it, and the stack. A loop alone knows when nothing of its own is in use: it is sent a request for that.

use fuser::Request;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a request may leave on the stack: the engine's and the database's frames.
const STACK_BYTES: usize = 128 << 10;
/// The kernel reads nothing into a buffer shorter than this (FUSE_MIN_READ_BUFFER): every request has as much room.
const BUFFER_BYTES_MIN: usize = 8192;
/// Names and targets end before that; what may be longer is noted.
const GETATTR_BYTES: usize = size_of::<Request>() + 16;
/// Requests that each of those sends who ask. The path may lead elsewhere by now: they are not sent for ever.
const REQUESTS_MAX: usize = 1000;
/// Longest wait for the loops: revocation does not hang on them.
const WAIT_MAX: Duration = Duration::from_secs(1);

thread_local! {
    /// The end of what this loop's buffer ever held.
    static FILLED_TO: Cell<usize> = const { Cell::new(0) };
    /// The round in which this loop last wiped.
    static WIPED_IN: Cell<u64> = const { Cell::new(0) };
}

/// Has every loop wipe what it left behind.
pub(super) struct Residue {
    mountpoint: PathBuf,
    loops: usize,
    /// The round, and how many loops have wiped in it: key domains that go dark at the same time ask one over the other.
    state: AtomicU64,
}

/// Where the round begins in the state.
const ROUND_SHIFT: u32 = 16;

fn round_of(state: u64) -> u64 {
    state >> ROUND_SHIFT
}

impl Residue {
    pub(super) fn new(mountpoint: PathBuf, loops: usize) -> Self {
        Self {
            mountpoint,
            loops,
            state: AtomicU64::new(0),
        }
    }

    /// A new round, in which no loop has wiped.
    fn begin(&self) {
        let next = |state| Some((round_of(state) + 1) << ROUND_SHIFT);
        let begun = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        debug_assert!(begun.is_ok());
    }

    /// Counts a loop that has wiped in a round, unless there is a later one by now, in which it wipes again.
    fn count(&self, round: u64) {
        let next = |state| (round_of(state) == round).then_some(state + 1);
        // Not counted is as good.
        let _counted = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// Whether every loop has wiped in the present round, and so since the one before began.
    fn is_done(&self) -> bool {
        let wiped = self.state.load(Ordering::Acquire) & ((1 << ROUND_SHIFT) - 1);
        wiped >= self.loops as u64
    }

    /// Notes a long part of a request, in the loop's buffer.
    pub(super) fn note(&self, part: &[u8]) {
        let end = part.as_ptr_range().end as usize;
        FILLED_TO.with(|filled| filled.set(filled.get().max(end)));
    }

    /// Called by a loop for each GETATTR: once a round it wipes its buffer behind this request, and its stack.
    pub(super) fn wipe_here(&self, request: &Request) {
        let round = round_of(self.state.load(Ordering::Acquire));
        if WIPED_IN.with(|wiped| wiped.replace(round)) == round {
            return;
        }
        // `Request` is the header itself, where the kernel put it.
        let start = std::ptr::from_ref(request).expose_provenance();
        let filled = FILLED_TO.with(Cell::get).saturating_sub(start);
        let behind = filled.max(BUFFER_BYTES_MIN) - GETATTR_BYTES;
        // SAFETY: the loop's buffer is one allocation, that is not freed while the loop runs, and reaches beyond both ends that
        // are wiped to: the kernel insists on the one, and has written up to the other. What lies behind this request is
        // read by nobody: fuser looks at no more of its buffer than read(2) says it filled, and this thread, which alone
        // uses it, has no reference to those bytes that it uses again before the next read(2) writes them.
        unsafe {
            // The address goes through a black box: to the compiler these writes are not made through `request`, which it
            // takes for read-only, but come from outside, as the kernel's do.
            let address = std::hint::black_box(start + GETATTR_BYTES);
            let behind_request = std::ptr::with_exposed_provenance_mut::<u8>(address);
            behind_request.write_bytes(0, behind);
            std::hint::black_box(behind_request);
        }
        kms_crypto::wipe_stack::<STACK_BYTES>();
        self.count(round);
    }

    /// Asks every loop to wipe, and waits for it. Called from a thread that serves no request and holds no lock.
    pub(super) fn wipe_all(self: &std::sync::Arc<Self>) {
        let (residue, (done, wait)) = (std::sync::Arc::clone(self), std::sync::mpsc::channel());
        // The path may lead elsewhere by now, to a filesystem that does not answer.
        let asking = std::thread::Builder::new()
            .name("wipe".to_owned())
            .spawn(move || {
                // Nobody listens any more if it took too long.
                let _heard = done.send(residue.ask_all());
            });
        let wiped = asking.is_ok() && matches!(wait.recv_timeout(WAIT_MAX), Ok(true));
        if !wiped {
            tracing::warn!(
                "buffers of past requests are not wiped yet: the mount is not at its mount point any more, or busy"
            );
        }
    }

    /// As many ask as there are loops: one that is at work already would take each request before another has woken up, if
    /// they came one by one.
    fn ask_all(&self) -> bool {
        self.begin();
        std::thread::scope(|scope| {
            for _ in 1..self.loops {
                if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, || self.ask()) {
                    tracing::debug!(%error, "one less asks the loops to wipe");
                }
            }
            self.ask();
        });
        self.is_done()
    }

    fn ask(&self) {
        for _ in 0..REQUESTS_MAX {
            if self.is_done() {
                return;
            }
            // That it is refused is as good an answer as any.
            let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
            let _refused = rustix::fs::statx(CWD, &self.mountpoint, flags, StatxFlags::BASIC_STATS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_wiped_in_an_earlier_round_does_not_count_in_a_later_one() {
        let residue = Residue::new(PathBuf::from("/nowhere"), 2);
        residue.begin();
        let first = round_of(residue.state.load(Ordering::Acquire));
        residue.count(first);
        assert!(!residue.is_done());
        residue.begin();
        residue.count(first);
        residue.count(first + 1);
        assert!(!residue.is_done());
        residue.count(first + 1);
        assert!(residue.is_done());
    }
}
