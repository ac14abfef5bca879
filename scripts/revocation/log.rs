//! What each process logs of its accesses.
use crate::system::{now, shared_words};
use crate::world::{What, World};
use std::io::Result;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// What one process may log before the herd reads it.
pub const RING: u64 = 1 << 20;

/// Where one process logs its accesses: how many there are, how many the herd has read, and then two words for each.
#[derive(Clone, Copy)]
pub struct Log {
    pub words: &'static [AtomicU64],
}

pub struct Entry {
    pub begin: u64,
    /// At the latest.
    pub end: u64,
    pub what: What,
    pub errno: u32,
}

pub const LOG_STALLS: usize = 2;
/// Content that was not what was written there.
pub const LOG_WRONG: usize = 3;
pub const LOG_ENTRIES: usize = 8;

impl Log {
    pub fn of(world: &World, number: usize) -> Result<Self> {
        let words = shared_words(
            &world.state.join(format!("log-{number}")),
            LOG_ENTRIES + RING as usize * 2,
        )?;
        Ok(Self { words })
    }

    /// Makes an access, and logs it.
    pub fn time<T>(&self, what: What, access: impl FnOnce() -> Result<T>) -> Result<T> {
        let count = self.words[0].load(Ordering::Relaxed);
        while count - self.words[1].load(Ordering::Acquire) >= RING {
            self.words[LOG_STALLS].fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
        let begin = now();
        let outcome = access();
        let took_us = (now() - begin) / 1000;
        let errno = match &outcome {
            Ok(_) => 0,
            Err(error) => error.raw_os_error().unwrap_or(0xffff) as u64,
        };
        let place = LOG_ENTRIES + (count % RING) as usize * 2;
        self.words[place].store(begin, Ordering::Relaxed);
        let packed = (took_us.min(u64::from(u32::MAX)) << 32) | ((what as u64) << 16) | errno;
        self.words[place + 1].store(packed, Ordering::Relaxed);
        self.words[0].store(count + 1, Ordering::Release);
        outcome
    }

    pub fn wrong(&self, what: &str) {
        eprintln!("wrong content: {what}");
        self.words[LOG_WRONG].fetch_add(1, Ordering::Relaxed);
    }

    pub fn count(&self) -> u64 {
        self.words[0].load(Ordering::Acquire)
    }

    /// Adds what was logged since this was last asked.
    pub fn drain(&self, to: &mut Vec<Entry>) {
        let (from, until) = (self.words[1].load(Ordering::Relaxed), self.count());
        for number in from..until {
            let place = LOG_ENTRIES + (number % RING) as usize * 2;
            let packed = self.words[place + 1].load(Ordering::Relaxed);
            let begin = self.words[place].load(Ordering::Relaxed);
            to.push(Entry {
                begin,
                end: begin + ((packed >> 32) + 1) * 1000,
                what: if (packed >> 16) & 0xff == 0 {
                    What::Access
                } else {
                    What::Sync
                },
                errno: (packed & 0xffff) as u32,
            });
        }
        self.words[1].store(until, Ordering::Release);
    }
}
