//! How much time has passed for certain, and whether the wall clock can be believed. Pure: it is told what the clocks say.

use crate::rows::TimeRow;

/// The wall clock may be set by so much, in milliseconds, before nothing is destroyed until somebody has looked.
const JUMP_MAX_MS: u64 = 60 * 60 * 1000;
/// The row may lag behind by so much observed time, in milliseconds, while a key is pending.
const WRITE_EVERY_MS: u64 = 10 * 60 * 1000;

/// What both clocks say at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    /// Milliseconds since the Unix epoch.
    pub(crate) wall_ms: i64,
    /// CLOCK_BOOTTIME in milliseconds.
    pub(crate) boot_ms: u64,
}

impl Reading {
    fn offset_ms(self) -> i64 {
        self.wall_ms.saturating_sub_unsigned(self.boot_ms)
    }
}

/// The observed time of one keystore.
pub(crate) struct Observed {
    row: TimeRow,
    written_ms: u64,
    written_suspended: bool,
}

impl Observed {
    /// Goes on from what was stored: within the same boot CLOCK_BOOTTIME has counted since; over a boot nothing did.
    pub(crate) fn resume(stored: Option<TimeRow>, boot_id: &str, now: Reading) -> Self {
        let written_suspended = stored.as_ref().is_some_and(|row| row.suspended);
        let mut row = match stored {
            Some(row) if !boot_id.is_empty() && row.boot_id == boot_id => row,
            Some(row) => TimeRow {
                suspended: row.suspended || is_jump(now.wall_ms, row.wall_ms) && now.wall_ms < row.wall_ms,
                offset_ms: now.offset_ms(),
                boot_ms: now.boot_ms,
                ..row
            },
            None => TimeRow {
                offset_ms: now.offset_ms(),
                boot_ms: now.boot_ms,
                ..TimeRow::default()
            },
        };
        boot_id.clone_into(&mut row.boot_id);
        let mut observed = Self {
            written_ms: row.observed_ms,
            written_suspended,
            row,
        };
        observed.observe(now);
        observed
    }

    /// Counts the time since the last reading, and compares the clocks.
    pub(crate) fn observe(&mut self, now: Reading) {
        let passed = now.boot_ms.saturating_sub(self.row.boot_ms);
        self.row.observed_ms = self.row.observed_ms.saturating_add(passed);
        self.row.boot_ms = self.row.boot_ms.max(now.boot_ms);
        self.row.wall_ms = now.wall_ms;
        self.row.suspended |= is_jump(now.offset_ms(), self.row.offset_ms);
    }

    /// In milliseconds, as of the last reading.
    pub(crate) fn observed_ms(&self) -> u64 {
        self.row.observed_ms
    }

    /// Whether destruction waits for somebody to confirm the clock.
    pub(crate) fn is_suspended(&self) -> bool {
        self.row.suspended
    }

    /// What is to be stored.
    pub(crate) fn row(&self) -> &TimeRow {
        &self.row
    }

    /// What is to be stored if the clock is believed as it is now.
    pub(crate) fn confirmed(&self) -> TimeRow {
        TimeRow {
            offset_ms: self.row.wall_ms.saturating_sub_unsigned(self.row.boot_ms),
            suspended: false,
            ..self.row.clone()
        }
    }

    /// What is to be stored when both clocks are shifted on.
    pub(crate) fn shifted(&self, shift_ms: u64) -> TimeRow {
        let by_ms = shift_ms.saturating_sub(self.row.shift_ms);
        TimeRow {
            shift_ms,
            observed_ms: self.row.observed_ms.saturating_add(by_ms),
            boot_ms: self.row.boot_ms.saturating_add(by_ms),
            wall_ms: self.row.wall_ms.saturating_add_unsigned(by_ms),
            ..self.row.clone()
        }
    }

    /// Takes over what was stored.
    pub(crate) fn stored(&mut self, row: TimeRow) {
        self.written_ms = row.observed_ms;
        self.written_suspended = row.suspended;
        self.row = row;
    }

    /// Whether it was suspended since it was last stored.
    pub(crate) fn is_newly_suspended(&self) -> bool {
        self.row.suspended && !self.written_suspended
    }

    /// Whether so much was observed since it was last stored that it should be again.
    pub(crate) fn is_due(&self) -> bool {
        self.row.observed_ms.saturating_sub(self.written_ms) >= WRITE_EVERY_MS
    }
}

fn is_jump(now_ms: i64, before_ms: i64) -> bool {
    now_ms.abs_diff(before_ms) > JUMP_MAX_MS
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = JUMP_MAX_MS;
    const START: Reading = Reading {
        wall_ms: 1_800_000_000_000,
        boot_ms: 500_000,
    };

    /// Both clocks, so much later.
    fn after(ms: u64) -> Reading {
        set(ms, 0)
    }

    /// The same, with the wall clock set by `by_ms`.
    fn set(ms: u64, by_ms: i64) -> Reading {
        Reading {
            wall_ms: START.wall_ms.saturating_add_unsigned(ms) + by_ms,
            boot_ms: START.boot_ms + ms,
        }
    }

    fn hours(count: i64) -> i64 {
        count * HOUR as i64
    }

    #[test]
    fn time_counts_while_it_is_seen_and_within_a_boot() {
        let mut time = Observed::resume(None, "a", START);
        assert_eq!(time.observed_ms(), 0, "the uptime of the host is not ours");
        time.observe(after(HOUR));
        time.observe(after(3 * HOUR));
        assert_eq!(time.observed_ms(), 3 * HOUR);
        let stored = time.row().clone();
        let time = Observed::resume(Some(stored.clone()), "a", after(10 * HOUR));
        assert_eq!(time.observed_ms(), 10 * HOUR);
        for boot_id in ["b", ""] {
            // Another boot, or another host that is up for a year.
            let long_up = Reading {
                wall_ms: after(10 * HOUR).wall_ms,
                boot_ms: 365 * 24 * HOUR,
            };
            let time = Observed::resume(Some(stored.clone()), boot_id, long_up);
            assert_eq!(time.observed_ms(), 3 * HOUR);
            assert!(!time.is_suspended());
        }
    }

    #[test]
    fn a_clock_of_boots_that_goes_back_takes_nothing_away() {
        let mut time = Observed::resume(None, "a", after(HOUR));
        time.observe(after(2 * HOUR));
        time.observe(START);
        assert_eq!(time.observed_ms(), HOUR);
        time.observe(after(3 * HOUR));
        assert_eq!(time.observed_ms(), 2 * HOUR);
    }

    #[test]
    fn a_clock_that_was_set_suspends_until_confirmed() {
        for by_ms in [hours(1) + 1, -hours(1) - 1, hours(24 * 30)] {
            let mut time = Observed::resume(None, "a", START);
            time.observe(set(1000, by_ms));
            assert!(time.is_suspended(), "{by_ms}");
            assert!(time.is_newly_suspended());
            time.stored(time.row().clone());
            assert!(!time.is_newly_suspended());
            time.observe(after(2000));
            assert!(time.is_suspended(), "set back, and still to be looked at");
            let resumed = Observed::resume(Some(time.row().clone()), "a", after(3000));
            assert!(resumed.is_suspended());
            assert!(Observed::resume(Some(time.row().clone()), "b", after(3000)).is_suspended());
            time.observe(set(4000, by_ms));
            let confirmed = time.confirmed();
            time.stored(confirmed);
            time.observe(set(5000, by_ms));
            assert!(!time.is_suspended());
            time.observe(after(6000));
            assert!(time.is_suspended(), "setting it back is a jump, too");
        }
        let mut time = Observed::resume(None, "a", START);
        time.observe(set(1000, hours(1)));
        assert!(!time.is_suspended(), "an hour is not more than an hour");
    }

    #[test]
    fn small_steps_add_up() {
        let mut time = Observed::resume(None, "a", START);
        time.observe(set(1000, hours(1) / 2));
        assert!(!time.is_suspended());
        time.observe(set(2000, hours(1) + 1));
        assert!(time.is_suspended());
    }

    #[test]
    fn over_a_boot_only_a_clock_that_went_back_is_seen() {
        let time = Observed::resume(None, "a", START);
        let later = |by_ms| Reading {
            wall_ms: START.wall_ms + by_ms,
            boot_ms: 10,
        };
        let resumed = |by_ms| Observed::resume(Some(time.row().clone()), "b", later(by_ms));
        assert!(!resumed(hours(1000)).is_suspended());
        assert!(!resumed(-hours(1)).is_suspended());
        assert!(resumed(-hours(1) - 1).is_suspended());
    }

    #[test]
    fn it_is_stored_every_ten_minutes() {
        let mut time = Observed::resume(None, "a", START);
        time.observe(after(WRITE_EVERY_MS - 1));
        assert!(!time.is_due());
        time.observe(after(WRITE_EVERY_MS));
        assert!(time.is_due());
        time.stored(time.row().clone());
        assert!(!time.is_due());
    }
}
