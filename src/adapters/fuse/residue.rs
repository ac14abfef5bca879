//! What served requests leave behind in the loops: fuser's buffer, where a request lies until the next one is read over
//! it, and the stack. A loop alone knows when nothing of its own is in use: it is sent a request for that.

use fuser::Request;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// What a request may leave on the stack: the engine's and the database's frames.
const STACK_BYTES: usize = 128 << 10;
/// The kernel reads nothing into a buffer shorter than this (FUSE_MIN_READ_BUFFER): every request has as much room.
const BUFFER_BYTES_MIN: usize = 8192;
/// Names and targets end before that; what may be longer is noted.
const GETATTR_BYTES: usize = size_of::<Request>() + 16;
/// Requests sent for each loop, at most. They wait in line, so that one each is nearly enough.
const REQUESTS_PER_LOOP_MAX: usize = 50;
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
    round: AtomicU64,
    wiped: AtomicUsize,
}

impl Residue {
    pub(super) fn new(mountpoint: PathBuf, loops: usize) -> Self {
        Self {
            mountpoint,
            loops,
            round: AtomicU64::new(0),
            wiped: AtomicUsize::new(0),
        }
    }

    /// Notes a long part of a request, in the loop's buffer.
    pub(super) fn note(&self, part: &[u8]) {
        let end = part.as_ptr_range().end as usize;
        FILLED_TO.with(|filled| filled.set(filled.get().max(end)));
    }

    /// Called by a loop for each GETATTR: once a round it wipes its buffer behind this request, and its stack.
    pub(super) fn wipe_here(&self, request: &Request) {
        let round = self.round.load(Ordering::Acquire);
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
        self.wiped.fetch_add(1, Ordering::AcqRel);
    }

    /// Asks every loop to wipe, and waits for it. Called from a thread that serves no request and holds no lock.
    pub(super) fn wipe_all(self: &std::sync::Arc<Self>) {
        let (residue, (done, wait)) = (std::sync::Arc::clone(self), std::sync::mpsc::channel());
        // The path may lead elsewhere by now, to a filesystem that does not answer.
        let asking = std::thread::Builder::new()
            .name("wipe".to_owned())
            .spawn(move || {
                // Nobody listens any more if it took too long.
                let _heard = done.send(residue.ask());
            });
        let wiped = asking.is_ok() && matches!(wait.recv_timeout(WAIT_MAX), Ok(true));
        if !wiped {
            tracing::warn!(
                "buffers of past requests could not be wiped: the mount is not at its mount point any more, or busy"
            );
        }
    }

    fn ask(&self) -> bool {
        self.wiped.store(0, Ordering::Release);
        self.round.fetch_add(1, Ordering::AcqRel);
        for _ in 0..self.loops * REQUESTS_PER_LOOP_MAX {
            // Each goes to the loop that has waited longest. That it is refused is as good an answer as any.
            let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
            let _refused = rustix::fs::statx(CWD, &self.mountpoint, flags, StatxFlags::BASIC_STATS);
            if self.wiped.load(Ordering::Acquire) >= self.loops {
                return true;
            }
        }
        false
    }
}
