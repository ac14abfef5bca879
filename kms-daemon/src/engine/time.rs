//! The keystore's time: what was observed of it, and what may shift it.

use super::call::{Call, Trail};
use super::{Effect, Engine};
use crate::observed::Reading;
use crate::rows::{TIME_KEY, TimeRow};
use crate::store::{Change, Table};
use kms_api::{Code, KmsError};
use prost::Message;

/// A drill may shift its clock by so much at once, in seconds: ten years.
const ADVANCE_SECONDS_MAX: u64 = 10 * 366 * 24 * 3600;

impl Engine {
    /// Counts the time that has passed, and compares the clocks.
    pub(super) fn observe(&self) {
        let now = Reading {
            wall_ms: self.clock.now_ms(),
            boot_ms: self.clock.boot_ms(),
        };
        self.time.lock().observe(now);
    }

    /// The time that was observed so far, in milliseconds.
    pub(super) fn observed_ms(&self) -> u64 {
        self.observe();
        self.time.lock().observed_ms()
    }

    /// Whether nothing is destroyed until the clock is confirmed.
    pub(crate) fn is_suspended(&self) -> bool {
        self.observe();
        self.time.lock().is_suspended()
    }

    /// Makes a suspension last, and says so once.
    pub(super) fn record_suspension(&self) -> Result<(), KmsError> {
        if !self.time.lock().is_newly_suspended() {
            return Ok(());
        }
        tracing::warn!(
            "the host's clock was set by more than an hour: nothing is destroyed until it is confirmed"
        );
        let call = Self::own_call("SuspendKeyDestruction")?;
        self.run(&call, |trail| {
            self.change_time(&call, trail, || self.time.lock().row().clone())
        })
    }

    /// Takes the clock as it is for right, after which destruction goes on.
    ///
    /// # Errors
    /// `ServiceUnavailable` if it cannot be recorded.
    pub(crate) fn confirm_clock(&self, call: &Call, trail: &mut Trail) -> Result<(), KmsError> {
        self.observe();
        self.change_time(call, trail, || self.time.lock().confirmed())
    }

    /// Shifts both clocks of a keystore for drills, and answers what the wall clock says then, in milliseconds since the
    /// Unix epoch.
    ///
    /// # Errors
    /// `Forbidden.NoPermission` in any other keystore; `InvalidParameter`.
    pub(crate) fn advance_clock(
        &self,
        call: &Call,
        trail: &mut Trail,
        seconds: u64,
    ) -> Result<i64, KmsError> {
        let Some(drill) = &self.drill else {
            return Err(KmsError::new(
                Code::NoPermission,
                "this keystore was not made for drills (kmsd init --drill): its clock cannot be shifted",
            ));
        };
        if !(1..=ADVANCE_SECONDS_MAX).contains(&seconds) {
            return Err(KmsError::invalid("Seconds", "must be 1 to 316224000"));
        }
        self.observe();
        self.change_time(call, trail, || {
            let shift_ms = drill.shift_ms().saturating_add(seconds.saturating_mul(1000));
            self.time.lock().shifted(shift_ms)
        })?;
        Ok(self.clock.now_ms())
    }

    /// Stores what `next` answers, which is asked under the manifest's lock, and takes it over.
    fn change_time(
        &self,
        call: &Call,
        trail: &mut Trail,
        next: impl Fn() -> TimeRow,
    ) -> Result<(), KmsError> {
        let stored = parking_lot::Mutex::new(TimeRow::default());
        let build = |change: &mut Change<'_>| {
            let row = next();
            change.put(Table::Manifest, TIME_KEY, &row.encode_to_vec())?;
            *stored.lock() = row;
            Ok(())
        };
        self.commit(call, trail, Effect::Other, build, |_| {
            let row = std::mem::take(&mut *stored.lock());
            if let Some(drill) = &self.drill {
                drill.shift_to(row.shift_ms);
            }
            self.time.lock().stored(row);
        })
    }

    /// What was observed, to be stored with what depends on it.
    pub(super) fn time_row(&self) -> Vec<u8> {
        self.time.lock().row().encode_to_vec()
    }

    /// Stores the observed time now and then while a key waits for it. Its loss costs time, and nothing else.
    pub(super) fn store_time_lazily(&self) {
        if self.time.lock().is_due() {
            let _manifest = self.manifest.lock();
            self.store_time();
        }
    }

    /// The caller holds the manifest.
    pub(super) fn store_time(&self) {
        let row = self.time.lock().row().clone();
        let mut change = self.store.begin();
        let written = change
            .put(Table::Manifest, TIME_KEY, &row.encode_to_vec())
            .and_then(|()| change.commit(false));
        match written {
            Ok(()) => self.time.lock().stored(row),
            Err(error) => tracing::warn!(%error, "the observed time was not stored"),
        }
    }
}
