//! Time, injected: what depends on days can be tested in milliseconds, and a production daemon cannot shift its own.

use std::time::{SystemTime, UNIX_EPOCH};

/// The two clocks that kmsd reads.
pub trait Clock: Send + Sync {
    /// Wall-clock time, in milliseconds since the Unix epoch, UTC.
    fn now_ms(&self) -> i64;

    /// CLOCK_BOOTTIME, in milliseconds: it counts suspended time and nobody sets it.
    fn boot_ms(&self) -> u64;

    /// Whether this clock can be shifted. A keystore that was ever opened under such a clock says so for ever.
    fn is_test(&self) -> bool {
        false
    }
}

/// The host's clocks.
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> i64 {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
    }

    fn boot_ms(&self) -> u64 {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        let nanos = u64::try_from(time.tv_nsec).unwrap_or_default();
        seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000)
    }
}
