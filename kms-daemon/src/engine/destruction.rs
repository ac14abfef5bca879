//! Which keys die, and who is told. How is the ratchet's.

use super::call::{Call, Principal};
use super::keys::DAY_MS;
use super::{Effect, Engine, KeyEvent, internal};
use crate::ratchet::{Keystore, RatchetError, Step, Stopped};
use crate::rows::KeyRow;
use crate::store::{Change, Table};
use kms_api::KmsError;
use kms_api::proto::KeyState;
use parking_lot::{ArcRwLockWriteGuard, RawRwLock};
use prost::Message;
use std::collections::BTreeMap;
use std::io;
use uuid::Uuid;

/// The keys that die, locked against everybody, and what becomes of each.
type Dying = BTreeMap<Uuid, (ArcRwLockWriteGuard<RawRwLock, KeyRow>, KeyState)>;

/// A key whose material is to die, as it was when that was decided.
pub(super) struct Candidate {
    id: Uuid,
    revision: u64,
    /// Destroyed, or PendingImport.
    fate: KeyState,
}

impl Engine {
    /// Destroys every key whose window has passed in both clocks, all in one ratchet, unless the clock is to be confirmed;
    /// and finishes what an attempt before could not. Answers the keys that are Destroyed now and were not before. To be
    /// called every minute or so.
    ///
    /// # Errors
    /// `ServiceUnavailable` or `InternalFailure`; the next call tries again.
    pub fn destroy_due(&self) -> Result<Vec<Uuid>, KmsError> {
        self.destroy_due_observed(&mut |_| Ok(()))
    }

    /// The same; `reached` is told each step, and may fail it.
    pub(super) fn destroy_due_observed(
        &self,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<Vec<Uuid>, KmsError> {
        let mut destroyed = self.settle(reached)?;
        self.observe();
        self.record_suspension()?;
        self.expire()?;
        if !self.candidates(is_pending).is_empty() {
            self.store_time_lazily();
        }
        if self.is_suspended() {
            return Ok(destroyed);
        }
        self.extend_unobserved()?;
        let due = self.candidates(|row| {
            if self.is_due(row) {
                return Some(KeyState::Destroyed);
            }
            let is_over = row.state() == KeyState::Disabled && self.is_expired(row);
            is_over.then_some(KeyState::PendingImport)
        });
        destroyed.extend(self.destroy(due, reached)?);
        destroyed.retain(|&id| self.key_state(id) == KeyState::Destroyed);
        Ok(destroyed)
    }

    /// The daemon's own call.
    pub(super) fn own_call(operation: &'static str) -> Result<Call, KmsError> {
        let principal = Principal {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            exe: "kmsd".to_owned(),
        };
        Call::new(principal, operation)
    }

    fn is_due(&self, row: &KeyRow) -> bool {
        row.state() == KeyState::PendingDeletion
            && row.destroying.is_none()
            && row.delete_ms.is_some_and(|due| due <= self.clock.now_ms())
            && row
                .delete_observed_ms
                .is_some_and(|due| due <= self.observed_ms())
    }

    /// The keys that `fate` has something in store for.
    pub(super) fn candidates(&self, fate: impl Fn(&KeyRow) -> Option<KeyState>) -> Vec<Candidate> {
        let keys: Vec<_> = {
            let keys = self.keys.read();
            keys.iter().map(|(&id, lock)| (id, lock.clone())).collect()
        };
        let each = keys.into_iter().filter_map(|(id, lock)| {
            let row = lock.read();
            fate(&row).map(|fate| Candidate {
                id,
                revision: row.revision,
                fate,
            })
        });
        each.collect()
    }

    /// Locks those that are still as they were.
    fn lock(&self, candidates: &[Candidate]) -> Dying {
        let each = candidates.iter().filter_map(|candidate| {
            let row = self.lock_of(candidate.id).ok()?.write_arc();
            (row.revision == candidate.revision).then_some((candidate.id, (row, candidate.fate)))
        });
        // In the order of their ids, as candidates are.
        each.collect()
    }

    /// Keys that were scheduled before time was observed wait for the least window once more.
    fn extend_unobserved(&self) -> Result<(), KmsError> {
        let unobserved = self.candidates(|row| is_pending(row).filter(|_| row.delete_observed_ms.is_none()));
        let due = self.observed_ms().saturating_add(7 * DAY_MS.unsigned_abs());
        for (id, (mut row, _)) in self.lock(&unobserved) {
            let next = KeyRow {
                revision: row.revision + 1,
                delete_observed_ms: Some(due),
                ..row.clone()
            };
            let build =
                |change: &mut Change<'_>| change.put(Table::Keys, id.as_bytes(), &next.encode_to_vec());
            let call = Self::own_call("ExtendKeyDeletion")?;
            self.run(&call, |trail| {
                trail.note(self.arn(id));
                self.commit(&call, trail, Effect::Other, build, |_| *row = next.clone())
            })?;
        }
        Ok(())
    }

    /// Step 0 of a ratchet: returns when nothing can show any more what was encrypted under a key. It was revoked before;
    /// its holders are to say so again.
    ///
    /// # Errors
    /// `RevocationIncomplete`
    fn fence_holders(&self, id: Uuid) -> Result<(), KmsError> {
        let turn = self.turns.of(id);
        let _turn = turn.lock();
        let epoch = self.revocation_epoch();
        self.tell_again(id, self.key_state(id), epoch);
        self.clear_holders(id, epoch)
    }

    /// Destroys the material of those that nobody holds and that are still as they were. None of them may be Enabled.
    /// Answers those whose material is gone.
    pub(super) fn destroy(
        &self,
        mut candidates: Vec<Candidate>,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<Vec<Uuid>, KmsError> {
        // Not under their locks: a holder may need them to answer. A key that is not Enabled gets no new one.
        candidates.retain(|candidate| match self.fence_holders(candidate.id) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(key = %candidate.id, %error, "the key is not destroyed yet");
                false
            }
        });
        let mut dying = self.lock(&candidates);
        if dying.is_empty() {
            return Ok(Vec::new());
        }
        let call = Self::own_call("BeginKeyDestruction")?;
        self.run(&call, |trail| {
            for &id in dying.keys() {
                trail.note(self.arn(id));
            }
            self.commit(&call, trail, Effect::Other, |_| Ok(()), |_| {})
        })?;
        reached(Step::Intended).map_err(|error| stopped(&error.into()))?;
        self.leave_behind(&mut dying, reached)?;
        reached(Step::Committed).map_err(|error| stopped(&error.into()))?;
        self.finish(dying, reached)
    }

    /// Steps 1 to 3.
    fn leave_behind(
        &self,
        dying: &mut Dying,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<(), KmsError> {
        let mut manifest = self.manifest.lock();
        let rows: BTreeMap<Uuid, KeyRow> = dying
            .iter()
            .map(|(&id, (row, fate))| {
                let next = KeyRow {
                    revision: row.revision + 1,
                    destroying: Some((*fate).into()),
                    left_epoch: match row.lacks_material() {
                        true => row.left_epoch,
                        false => Some(manifest.epoch),
                    },
                    ..(**row).clone()
                };
                (id, next)
            })
            .collect();
        let mut next = manifest.clone();
        next.revision += 1;
        next.state_seq += 1;
        let next = self
            .keystore()
            .advance(&next, &rows, reached)
            .map_err(|error| match error {
                Stopped::Before(error) => stopped(&error),
                Stopped::Unknown(error) => {
                    tracing::error!("which root slot the disk selects is unknown: start kmsd anew");
                    stopped(&error)
                }
            })?;
        self.state_seq
            .store(next.state_seq, std::sync::atomic::Ordering::Release);
        tracing::info!(
            epoch = next.epoch,
            keys = rows.len(),
            "the keystore has left keys behind"
        );
        *manifest = next;
        for (id, row) in rows {
            self.drop_materials(id);
            if let Some((dying, _)) = dying.get_mut(&id) {
                **dying = row;
            }
        }
        Ok(())
    }

    fn keystore(&self) -> Keystore<'_> {
        Keystore {
            home: &self.home,
            store: &self.store,
            keeper: &self.keeper,
        }
    }

    /// Steps 4 and 5 for keys that were left behind and not finished with. Answers them.
    pub(super) fn settle(
        &self,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<Vec<Uuid>, KmsError> {
        let left = self.candidates(|row| row.destroying.map(|_| row.destroying()));
        self.finish(self.lock(&left), reached)
    }

    /// Steps 4 and 5.
    fn finish(
        &self,
        mut dying: Dying,
        reached: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> Result<Vec<Uuid>, KmsError> {
        if dying.is_empty() {
            return Ok(Vec::new());
        }
        {
            let _manifest = self.manifest.lock();
            let keystore = self.keystore();
            let closed = keystore.close_past(reached).and_then(|()| {
                reached(Step::SlotGone)?;
                keystore.discard()?;
                Ok(reached(Step::RowsDropped)?)
            });
            closed.map_err(|error| stopped(&error))?;
        }
        self.record_destroyed(&mut dying)?;
        Ok(dying.into_keys().collect())
    }

    fn record_destroyed(&self, dying: &mut Dying) -> Result<(), KmsError> {
        let now_ms = self.clock.now_ms();
        let next: BTreeMap<Uuid, KeyRow> = dying
            .iter()
            .map(|(&id, (row, fate))| (id, without_material(row, *fate, now_ms)))
            .collect();
        let build = |change: &mut Change<'_>| {
            for (id, row) in &next {
                change.put(Table::Keys, id.as_bytes(), &row.encode_to_vec())?;
            }
            Ok(())
        };
        let call = Self::own_call("DestroyKeyMaterial")?;
        let before: Vec<KeyRow> = dying.values().map(|(row, _)| (**row).clone()).collect();
        let recorded = self.run(&call, |trail| {
            for &id in dying.keys() {
                trail.note(self.arn(id));
            }
            self.commit(&call, trail, Effect::Restrictive, build, |revocation_epoch| {
                for (&id, (row, _)) in dying.iter_mut() {
                    let Some(next) = next.get(&id) else { continue };
                    (**row).clone_from(next);
                    // Nobody may be watching.
                    let _ = self.events.send(KeyEvent {
                        key_id: id,
                        state: next.state(),
                        revocation_epoch,
                    });
                }
            })
        });
        if recorded.is_err() {
            // It is not stored, so it is done again.
            for ((row, _), before) in dying.values_mut().zip(before) {
                **row = before;
            }
        }
        recorded
    }
}

fn is_pending(row: &KeyRow) -> Option<KeyState> {
    let state = row.state();
    (state == KeyState::PendingDeletion).then_some(state)
}

/// The row of a key whose material is gone.
fn without_material(row: &KeyRow, fate: KeyState, now_ms: i64) -> KeyRow {
    let is_destroyed = fate == KeyState::Destroyed;
    let mut next = KeyRow {
        revision: row.revision + 1,
        state: fate.into(),
        destroying: None,
        scheduled_ms: row.scheduled_ms.filter(|_| is_destroyed),
        delete_ms: row.delete_ms.filter(|_| is_destroyed),
        delete_observed_ms: None,
        imported: false,
        material_expires_ms: None,
        ..row.clone()
    };
    if is_destroyed {
        next.destroyed_ms = Some(now_ms);
        next.fingerprint.clear();
        next.fingerprint_key.clear();
    }
    next
}

fn stopped(error: &RatchetError) -> KmsError {
    tracing::error!(%error, "the destruction of keys has stopped; it goes on at the next attempt");
    internal()
}
