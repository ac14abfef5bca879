//! Refusals of strangers, aggregated, so that nobody fills the disk by being refused.

use crate::audit::Record;
use kms_api::Code;
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// A user's refusals within this long of the last record are counted, and reported with the next.
const RECORD_INTERVAL_MS: u64 = 10_000;
/// Users that are told apart, at most; the others share one line, under the overflow uid.
const USERS_MAX: usize = 256;
/// The kernel's name for a user that it cannot name.
pub(crate) const OVERFLOW_UID: u32 = 65_534;

struct Tally {
    recorded_boot_ms: u64,
    unrecorded: u32,
}

#[derive(Default)]
pub(super) struct Refusals(Mutex<BTreeMap<u32, Tally>>);

impl Refusals {
    /// Counts one refusal. `Some(n)` if a record is due now, which stands for n refusals.
    pub(super) fn count(&self, uid: u32, boot_ms: u64) -> Option<u32> {
        let mut tallies = self.0.lock();
        let known = tallies.contains_key(&uid) || tallies.len() < USERS_MAX;
        let tally = tallies
            .entry(if known { uid } else { OVERFLOW_UID })
            .or_insert(Tally {
                recorded_boot_ms: boot_ms.saturating_sub(RECORD_INTERVAL_MS),
                unrecorded: 0,
            });
        tally.unrecorded = tally.unrecorded.saturating_add(1);
        if boot_ms.saturating_sub(tally.recorded_boot_ms) < RECORD_INTERVAL_MS
            && boot_ms >= RECORD_INTERVAL_MS
        {
            return None;
        }
        tally.recorded_boot_ms = boot_ms;
        Some(std::mem::take(&mut tally.unrecorded))
    }

    /// A record for each user whose last refusals are in none.
    pub(super) fn drain(&self, time_ms: i64) -> Vec<Record> {
        let tallies = std::mem::take(&mut *self.0.lock());
        let unrecorded = tallies.into_iter().filter(|(_, tally)| tally.unrecorded > 0);
        unrecorded
            .map(|(uid, tally)| Record {
                time_ms,
                uid,
                operation: "Refusals".to_owned(),
                code: Code::NoPermission.as_str().to_owned(),
                count: tally.unrecorded,
                ..Record::default()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_record_in_ten_seconds_counts_them_all() {
        let refusals = Refusals::default();
        let start = 1_000_000;
        assert_eq!(refusals.count(7, start), Some(1));
        for after in 1..100 {
            assert_eq!(refusals.count(7, start + after), None);
        }
        assert_eq!(refusals.count(8, start), Some(1));
        assert_eq!(refusals.count(7, start + RECORD_INTERVAL_MS), Some(100));
        assert_eq!(refusals.count(7, start + RECORD_INTERVAL_MS + 1), None);
        let left = refusals.drain(0);
        assert_eq!(
            left.iter()
                .map(|record| (record.uid, record.count))
                .collect::<Vec<_>>(),
            [(7, 1)]
        );
    }

    #[test]
    fn many_users_share_one_line() {
        let refusals = Refusals::default();
        for uid in 0..10_000 {
            let _ = refusals.count(uid, 1_000_000);
        }
        assert!(refusals.0.lock().len() <= USERS_MAX + 1);
    }
}
