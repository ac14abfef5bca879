//! The clock, injected: tests choose the time.

use super::types::Timestamp;
use std::time::Instant;

/// Gives the time of day for file times, and a monotonic one for intervals.
pub trait Clock: Send + Sync {
    /// Wall-clock time.
    fn now(&self) -> Timestamp;
    /// Monotonic time.
    fn monotonic(&self) -> Instant;
}

/// The host's clock. File times come from `CLOCK_REALTIME_COARSE`, as the kernel stamps its own inodes, so that
/// the kernel finds no difference to write back after a create.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        Timestamp {
            secs: time.tv_sec,
            nanos: u32::try_from(time.tv_nsec).unwrap_or(0),
        }
    }

    fn monotonic(&self) -> Instant {
        Instant::now()
    }
}
