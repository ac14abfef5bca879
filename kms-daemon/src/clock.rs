//! Time, injected: what depends on days can be tested in milliseconds, and a production daemon cannot shift its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The two clocks that kmsd reads.
pub trait Clock: Send + Sync {
    /// Wall-clock time, in milliseconds since the Unix epoch, UTC.
    fn now_ms(&self) -> i64;

    /// CLOCK_BOOTTIME, in milliseconds: it counts suspended time and nobody sets it.
    fn boot_ms(&self) -> u64;

    /// Names the boot that CLOCK_BOOTTIME counts from; empty if the host does not say.
    fn boot_id(&self) -> String {
        std::fs::read_to_string(BOOT_ID).map_or_else(|_| String::new(), |id| id.trim().to_owned())
    }

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

/// Clocks that AdvanceClock shifts, of a keystore that says so for ever.
pub(crate) struct DrillClock {
    inner: Arc<dyn Clock>,
    shift_ms: AtomicU64,
}

impl DrillClock {
    pub(crate) fn new(inner: Arc<dyn Clock>, shift_ms: u64) -> Self {
        Self {
            inner,
            shift_ms: AtomicU64::new(shift_ms),
        }
    }

    pub(crate) fn shift_ms(&self) -> u64 {
        self.shift_ms.load(Ordering::Acquire)
    }

    /// Shifts both clocks on to `shift_ms`, never back.
    pub(crate) fn shift_to(&self, shift_ms: u64) {
        self.shift_ms.fetch_max(shift_ms, Ordering::AcqRel);
    }
}

impl Clock for DrillClock {
    fn now_ms(&self) -> i64 {
        self.inner.now_ms().saturating_add_unsigned(self.shift_ms())
    }

    fn boot_ms(&self) -> u64 {
        self.inner.boot_ms().saturating_add(self.shift_ms())
    }

    fn boot_id(&self) -> String {
        self.inner.boot_id()
    }

    fn is_test(&self) -> bool {
        true
    }
}
