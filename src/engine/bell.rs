//! Wakes a background thread before its time, or ends it.

use super::sync::{Condvar, Mutex, rank};
use std::time::Duration;

/// Why a waiting thread goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    /// It was rung, or its time has come.
    Work,
    /// It is to end.
    Stop,
}

#[derive(Default)]
struct State {
    rung: bool,
    stopped: bool,
}

/// One thread waits, any thread rings. A ring while it works is not lost.
#[derive(Default)]
pub(crate) struct Bell {
    state: Mutex<State, rank::Bell>,
    changed: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        self.state.lock().rung = true;
        self.changed.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_one();
    }

    /// Whether its thread is to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Waits for a ring, at most `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> Wake {
        let mut state = self.state.lock();
        if !state.rung && !state.stopped {
            state = self.changed.wait_for(state, limit);
        }
        state.rung = false;
        if state.stopped { Wake::Stop } else { Wake::Work }
    }
}
