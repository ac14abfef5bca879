//! Counters since the daemon started.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Calls of one operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(crate) answered: u64,
    pub(crate) errors: u64,
}

/// Nothing depends on these counters, so their order relative to anything else does not matter.
#[derive(Default)]
pub(crate) struct Metrics {
    operations: Mutex<BTreeMap<&'static str, Calls>>,
    issued: AtomicU64,
    opened: AtomicU64,
}

impl Metrics {
    pub(crate) fn count(&self, operation: &'static str, ok: bool) {
        let mut operations = self.operations.lock();
        let calls = operations.entry(operation).or_default();
        calls.answered += 1;
        calls.errors += u64::from(!ok);
    }

    pub(crate) fn issued(&self, count: usize) {
        self.issued.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn opened(&self, count: usize) {
        self.opened.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn operations(&self) -> Vec<(&'static str, Calls)> {
        let operations = self.operations.lock();
        operations.iter().map(|(&name, &calls)| (name, calls)).collect()
    }

    pub(crate) fn data_keys(&self) -> (u64, u64) {
        (
            self.issued.load(Ordering::Relaxed),
            self.opened.load(Ordering::Relaxed),
        )
    }
}
