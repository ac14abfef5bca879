//! Where secrets live: memory of this process that is locked against swapping, left out of core dumps, not inherited by
//! a child, between guard pages, and wiped when it is given back.
//!
//! A chunk is one anonymous mapping with a page without access at each end, cut into slots of one size. Chunks are
//! never unmapped, so that a slot's address stays good for as long as the process lives; what is taken is given back
//! to a list, and taken again.

use std::alloc::{Layout, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::process::{Resource, Rlimit};

/// Bytes that the arena grows by; it holds 8192 keys. The first keys and the first larger secret lock 512 KiB.
const CHUNK_BYTES: usize = 256 << 10;
/// Most bytes that the arena maps: 32,768 file keys take 1 MiB, which leaves room within an ordinary user's limit of
/// 8 MiB. A process that needs more than this has lost count of its keys, and is ended.
pub const ARENA_BYTES_MAX: usize = 64 << 20;
/// The largest secret: the answer that carries a whole batch of keys.
const SECRET_BYTES_MAX: usize = 16 << 10;
/// The smallest slot; slots are powers of two.
const SLOT_BYTES_MIN: usize = 32;
const CLASSES: usize = (SECRET_BYTES_MAX / SLOT_BYTES_MIN).ilog2() as usize + 1;
/// More than one page of any host that Linux runs on: 64 KiB pages are the largest.
const GUARD_BYTES: usize = 64 << 10;

static SHELVES: [Mutex<Shelf>; CLASSES] = [const { Mutex::new(Shelf::EMPTY) }; CLASSES];
static MAPPED: AtomicUsize = AtomicUsize::new(0);
static UNPROTECTED: AtomicBool = AtomicBool::new(false);
static LISTENER: OnceLock<fn(&io::Error)> = OnceLock::new();

/// The slots of one size.
struct Shelf {
    free: Vec<Slot>,
    /// What is left of the newest chunk: slots never taken.
    fresh: Option<(Slot, usize)>,
}

/// The address of a slot, which is good for as long as the process lives.
#[derive(Clone, Copy)]
struct Slot(NonNull<u8>);

// SAFETY: a slot is an address of memory that belongs to no thread, and is never unmapped. Who holds one says whether it
// may be used.
unsafe impl Send for Slot {}

impl Shelf {
    const EMPTY: Self = Self {
        free: Vec::new(),
        fresh: None,
    };

    fn take(&mut self, slot_bytes: usize) -> io::Result<Slot> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        let (slot, left) = match self.fresh.take() {
            Some(fresh) => fresh,
            None => (map_chunk()?, CHUNK_BYTES / slot_bytes),
        };
        if left > 1 {
            // SAFETY: `left` slots from here on lie in the chunk, so the next one does.
            let next = Slot(unsafe { slot.0.add(slot_bytes) });
            self.fresh = Some((next, left - 1));
        }
        Ok(slot)
    }
}

/// Names who is told, once, that the host does not let this process protect its secrets in full, and why.
pub fn on_unprotected_memory(tell: fn(&io::Error)) {
    // Whoever comes second hears nothing: a process has one log.
    let _first = LISTENER.set(tell);
}

/// Whether every secret so far lies in memory that is locked and left out of dumps.
#[must_use]
pub fn is_memory_protected() -> bool {
    !UNPROTECTED.load(Ordering::Relaxed)
}

/// Bytes that the arena has mapped for secrets, guard pages aside.
#[must_use]
pub fn arena_bytes() -> usize {
    MAPPED.load(Ordering::Relaxed)
}

fn map_chunk() -> io::Result<Slot> {
    let grown = MAPPED.fetch_add(CHUNK_BYTES, Ordering::Relaxed) + CHUNK_BYTES;
    if grown > ARENA_BYTES_MAX {
        return Err(io::ErrorKind::QuotaExceeded.into());
    }
    let whole = GUARD_BYTES + CHUNK_BYTES + GUARD_BYTES;
    // SAFETY: a new private mapping, at an address that the kernel chooses, concerns no other memory.
    let base = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            whole,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    // SAFETY: the guard and the chunk behind it lie in the mapping just made.
    let chunk = unsafe { base.add(GUARD_BYTES) };
    // SAFETY: these pages are the middle of the mapping just made, which nothing refers to yet.
    unsafe { rustix::mm::mprotect(chunk, CHUNK_BYTES, MprotectFlags::READ | MprotectFlags::WRITE) }?;
    if let Err(error) = protect(chunk)
        && !UNPROTECTED.swap(true, Ordering::Relaxed)
        && let Some(tell) = LISTENER.get()
    {
        tell(&error);
    }
    NonNull::new(chunk.cast::<u8>())
        .map(Slot)
        .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// No dumps, no copies in children, no swap. What can be had is had, though something else fails.
fn protect(chunk: *mut std::ffi::c_void) -> io::Result<()> {
    // A child that used a key after all faults, where a wiped one would have it encrypt under zeros.
    let advice = [Advice::LinuxDontDump, Advice::LinuxDontFork].map(|advice| {
        // SAFETY: the advice changes no byte of these pages, and nothing refers to them yet.
        unsafe { rustix::mm::madvise(chunk, CHUNK_BYTES, advice) }
    });
    // SAFETY: mlock changes no byte of these pages.
    let mut locked = unsafe { rustix::mm::mlock(chunk, CHUNK_BYTES) };
    if locked.is_err() && raise_limit() {
        // SAFETY: as above.
        locked = unsafe { rustix::mm::mlock(chunk, CHUNK_BYTES) };
    }
    for outcome in advice.into_iter().chain([locked]) {
        outcome?;
    }
    Ok(())
}

/// Raises the limit of locked memory as far as an ordinary process may.
fn raise_limit() -> bool {
    let limit = rustix::process::getrlimit(Resource::Memlock);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    limit.current != limit.maximum && rustix::process::setrlimit(Resource::Memlock, raised).is_ok()
}

/// `N` bytes of the arena: zero to begin with, at one address until they are dropped, wiped then.
///
/// It has neither `Debug`, `Display` nor `Clone`: a secret is not printed, and a second copy is made on purpose only.
pub struct Secret<const N: usize>(NonNull<[u8; N]>);

// SAFETY: it owns its bytes as a box does, and they belong to no thread.
unsafe impl<const N: usize> Send for Secret<N> {}
// SAFETY: shared references to it give shared references to bytes, and nothing else.
unsafe impl<const N: usize> Sync for Secret<N> {}

impl<const N: usize> Secret<N> {
    const CLASS: usize = {
        assert!(
            N > 0 && N <= SECRET_BYTES_MAX,
            "the arena has slots of 1 to 16,384 bytes"
        );
        (Self::SLOT_BYTES / SLOT_BYTES_MIN).ilog2() as usize
    };
    const SLOT_BYTES: usize = if N <= SLOT_BYTES_MIN {
        SLOT_BYTES_MIN
    } else {
        N.next_power_of_two()
    };

    /// Zeros, to be filled in place. Without memory the process ends, as with any other allocation.
    #[must_use]
    pub fn zeroed() -> Self {
        let taken = shelf::<N>().and_then(|shelf| {
            let mut shelf = shelf.lock().unwrap_or_else(PoisonError::into_inner);
            shelf.take(Self::SLOT_BYTES).ok()
        });
        match taken {
            // A fresh slot is zero because the kernel made it so, another one because it was wiped.
            Some(slot) => Self(slot.0.cast()),
            None => handle_alloc_error(Layout::new::<[u8; N]>()),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn expose(&self) -> &[u8; N] {
        // SAFETY: the slot has at least N bytes, which are initialized, mapped for ever and given to this value alone;
        // bytes need no alignment.
        unsafe { self.0.as_ref() }
    }

    /// The bytes, to be written.
    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as in `expose`, and `self` is borrowed exclusively.
        unsafe { self.0.as_mut() }
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(self.expose_mut().as_mut_slice());
        compiler_fence(Ordering::SeqCst);
        if let Some(shelf) = shelf::<N>() {
            let mut shelf = shelf.lock().unwrap_or_else(PoisonError::into_inner);
            shelf.free.push(Slot(self.0.cast()));
        }
    }
}

/// Its class is in range, which the compiler has checked; `None` is for the type alone.
fn shelf<const N: usize>() -> Option<&'static Mutex<Shelf>> {
    SHELVES.get(Secret::<N>::CLASS)
}

/// Zeroes what calls that have returned left on the stack below the caller: copies of keys that a library, or the
/// compiler, moved about.
#[inline(never)]
pub fn wipe_stack<const BYTES: usize>() {
    let mut below = std::mem::MaybeUninit::<[u8; BYTES]>::uninit();
    // SAFETY: the array is this frame's own, and zeros are bytes.
    unsafe { below.as_mut_ptr().write_bytes(0, 1) };
    // The zeros are read, for all that the compiler knows.
    std::hint::black_box(below.as_mut_ptr());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn slots_do_not_overlap_and_are_zero_when_taken_again() {
        let mut seen = HashSet::new();
        for round in 0..3_u8 {
            let mut taken: Vec<Secret<48>> = (0..10_000).map(|_| Secret::zeroed()).collect();
            let mut places = HashSet::new();
            for (index, secret) in taken.iter_mut().enumerate() {
                assert!(places.insert(secret.expose().as_ptr() as usize));
                assert_eq!(*secret.expose(), [0; 48], "round {round}");
                secret.expose_mut().fill(index as u8 | 1);
            }
            for (index, secret) in taken.iter().enumerate() {
                assert_eq!(*secret.expose(), [index as u8 | 1; 48]);
            }
            if round == 0 {
                seen = places;
            } else {
                assert_eq!(seen, places, "what was given back is taken again");
            }
        }
    }

    #[test]
    fn a_batch_of_threads_shares_the_arena() {
        std::thread::scope(|scope| {
            for mark in 1..=4_u8 {
                scope.spawn(move || {
                    for _ in 0..200 {
                        let mut secrets: Vec<Secret<32>> = (0..50).map(|_| Secret::zeroed()).collect();
                        for secret in &mut secrets {
                            assert_eq!(*secret.expose(), [0; 32]);
                            secret.expose_mut().fill(mark);
                        }
                        assert!(secrets.iter().all(|secret| *secret.expose() == [mark; 32]));
                    }
                });
            }
        });
    }

    /// What the kernel says of the mapping that an address lies in.
    fn mapping_of(address: usize) -> (Vec<String>, Vec<String>) {
        let table = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let bounds = |line: &str| -> Option<(usize, usize)> {
            let (from, to) = line.split_whitespace().next()?.split_once('-')?;
            Some((
                usize::from_str_radix(from, 16).ok()?,
                usize::from_str_radix(to, 16).ok()?,
            ))
        };
        let mut headers = Vec::new();
        let mut details = Vec::new();
        let mut inside = false;
        for line in table.lines() {
            if let Some((from, to)) = bounds(line) {
                inside = from <= address && address < to;
                // The mapping, and those that touch it.
                if from <= address + CHUNK_BYTES && address <= to + CHUNK_BYTES {
                    headers.push(line.to_owned());
                }
            } else if inside {
                details.push(line.to_owned());
            }
        }
        (headers, details)
    }

    #[test]
    fn secrets_are_locked_left_out_of_dumps_and_forks_and_guarded() {
        let secret = Secret::<32>::zeroed();
        let (headers, details) = mapping_of(secret.expose().as_ptr() as usize);
        let flags = details.iter().find(|line| line.starts_with("VmFlags:")).unwrap();
        for flag in [" dd", " dc"] {
            assert!(flags.contains(flag), "{flags}");
        }
        assert!(!is_memory_protected() || flags.contains(" lo"), "{flags}");
        assert!(headers.iter().any(|line| line.contains(" ---p ")), "{headers:?}");
    }

    #[test]
    fn reading_past_a_chunk_is_fatal() {
        let secret = Secret::<32>::zeroed();
        let address = secret.expose().as_ptr() as usize;
        // Whatever slot it is, this lies in the guard behind its chunk or before the next.
        let (headers, _) = mapping_of(address);
        let end = headers
            .iter()
            .filter_map(|line| line.split_whitespace().next()?.split_once('-'))
            .map(|(from, to)| {
                (
                    usize::from_str_radix(from, 16).unwrap(),
                    usize::from_str_radix(to, 16).unwrap(),
                )
            })
            .find(|(from, to)| (*from..*to).contains(&address))
            .unwrap()
            .1;
        // The kernel refuses to read there for us: no process has to die for this.
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the kernel checks the address before it writes, and refuses.
        let read = unsafe {
            libc::read(
                std::os::fd::AsRawFd::as_raw_fd(&zero),
                end as *mut libc::c_void,
                1,
            )
        };
        assert_eq!(read, -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    }
}
