//! Writing the ledger of the inodes that the kernel may cache; `kms_api::ledger` gives its layout.

use kms_api::ledger::{MAGIC, OVERFLOW_OFFSET, PLACES_MAX, PLACES_OFFSET, USED_OFFSET};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

const BYTES: usize = PLACES_OFFSET + PLACES_MAX * 8;

/// A list of inodes in memory that another process may read at any moment, also when this one is stopped or killed.
pub struct Ledger {
    memfd: OwnedFd,
    map: NonNull<AtomicU64>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    places: Vec<u32>,
    used: u32,
}

// SAFETY: what `map` points to is shared memory that is accessed as atomics alone, and lives as long as the ledger.
unsafe impl Send for Ledger {}
// SAFETY: as above.
unsafe impl Sync for Ledger {}

impl Drop for Ledger {
    fn drop(&mut self) {
        // SAFETY: the whole mapping that `new` made, to which no reference is left.
        let unmapped = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), BYTES) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

impl Ledger {
    /// An empty list. It takes memory as it is used, 8 bytes for an inode.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn new() -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("cmkfs-inodes", flags)?;
        rustix::fs::ftruncate(&memfd, BYTES as u64)?;
        // No touch of the mapping can come to lie behind its end.
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let map = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                BYTES,
                protection,
                MapFlags::SHARED,
                &memfd,
                0,
            )
        }?;
        let map = NonNull::new(map.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        let ledger = Self {
            memfd,
            map,
            free: Mutex::default(),
        };
        ledger.word(0).store(u64::from_ne_bytes(MAGIC), Ordering::Release);
        Ok(ledger)
    }

    /// Adds an inode, and says which place it has. To be called before the kernel learns of it.
    pub fn add(&self, inode: u64) -> u32 {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match free.places.pop() {
            Some(place) => place,
            None if (free.used as usize) < PLACES_MAX => {
                free.used += 1;
                free.used - 1
            }
            None => {
                // Whoever reads it must not take it for the whole.
                self.word(OVERFLOW_OFFSET).store(1, Ordering::Release);
                return u32::MAX;
            }
        };
        self.word(place_offset(place)).store(inode, Ordering::Release);
        self.word(USED_OFFSET).store(free.used.into(), Ordering::Release);
        place
    }

    /// Takes an inode away of which the kernel caches nothing any more.
    pub fn remove(&self, place: u32) {
        if place as usize >= PLACES_MAX {
            return;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        self.word(place_offset(place)).store(0, Ordering::Release);
        free.places.push(place);
    }

    /// The word at an offset, which is a multiple of 8 below `BYTES`.
    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset < BYTES);
        // SAFETY: within the mapping, aligned, and the memfd is sealed against shrinking.
        unsafe { self.map.add(offset / 8).as_ref() }
    }
}

fn place_offset(place: u32) -> usize {
    PLACES_OFFSET + place as usize * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(ledger: &Ledger, count: usize) -> Vec<u64> {
        let mut bytes = vec![0; count * 8];
        let read = rustix::io::pread(ledger, &mut bytes, PLACES_OFFSET as u64).unwrap();
        assert_eq!(read, bytes.len());
        bytes
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(u64::from_ne_bytes)
            .collect()
    }

    #[test]
    fn another_process_reads_what_was_added_and_not_taken_away() {
        let ledger = Ledger::new().unwrap();
        let places: Vec<_> = (10..20).map(|inode| ledger.add(inode)).collect();
        ledger.remove(places[3]);
        ledger.remove(places[7]);
        assert_eq!(words(&ledger, 11), [10, 11, 12, 0, 14, 15, 16, 0, 18, 19, 0]);
        // Places are used again.
        ledger.add(99);
        assert_eq!(words(&ledger, 11), [10, 11, 12, 0, 14, 15, 16, 99, 18, 19, 0]);
    }
}
