//! Anchors: how far each key domain of each volume is known to have come (docs/integrity.md). A volume that has come less far, or
//! elsewhere, was put back as it once was, or is a copy that another has left behind.
//!
//! An anchor moves forward only, from the one that its mount knows. Its rows are in the row set, so that none is put back alone; a
//! keystore that was put back as a whole knows less of a volume than that volume does.

use super::call::{Call, Trail};
use super::sessions::Session;
use super::{Effect, Engine, failed, next_manifest};
use crate::audit::Item;
use crate::rows::{AnchorRow, MANIFEST_KEY};
use crate::store::{Change, StoreError, Table};
use kms_api::{ANCHOR_MAC_LEN, Code, KmsError};
use prost::Message;
use std::sync::Arc;

/// Key domains of volumes that have one, at most.
const ANCHORS_MAX: usize = 65_536;

/// How far a domain has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Anchor {
    /// The number of a durable commit.
    pub(crate) commit_seq: u64,
    /// What the domain's root was then, in a form that only the holder of its keys can tell.
    pub(crate) mac: Vec<u8>,
    /// Inode numbers below this were given out.
    pub(crate) ino_limit: u64,
}

impl Anchor {
    fn check(&self, name: &'static str) -> Result<(), KmsError> {
        match self.mac.len() {
            ANCHOR_MAC_LEN => Ok(()),
            _ => Err(KmsError::invalid(name, "must have a MAC of 32 bytes")),
        }
    }

    /// Whether both say the same of a volume.
    fn agrees(&self, other: &Self) -> bool {
        (self.commit_seq, &self.mac) == (other.commit_seq, &other.mac)
    }

    fn of_row(row: AnchorRow) -> Self {
        Self {
            commit_seq: row.commit_seq,
            mac: row.mac,
            ino_limit: row.ino_limit,
        }
    }
}

/// How an anchor comes to be another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move<'a> {
    /// From this one, or from none.
    From(Option<&'a Anchor>),
    /// Whatever it is: the volume was put back on purpose.
    Restored,
}

impl Engine {
    /// The anchor of the domain that a session serves, if it has one. Not audited: it tells nothing but to whoever has the keys.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`; `Forbidden.NoPermission` for a session that was not given the domain's volume key.
    pub(crate) fn get_anchor(&self, call: &Call, session: &[u8]) -> Result<Option<Anchor>, KmsError> {
        let session = self.anchoring(call, session)?;
        self.anchor_of(&session)
    }

    /// Moves the anchor of the domain that a session serves. Synced; audited where it is the first of the domain, or one of a volume
    /// that was put back, or is refused.
    ///
    /// # Errors
    /// Those of [`Self::get_anchor`]; `InvalidParameter`; `Rejected.AnchorConflict` if the anchor is another than the one that it is
    /// to be moved from, or would not move forward; `Rejected.LimitExceeded` past 65,536 anchors.
    pub(crate) fn move_anchor(
        &self,
        call: &Call,
        session: &[u8],
        how: Move<'_>,
        to: &Anchor,
    ) -> Result<(), KmsError> {
        let _one_at_a_time = self.anchors.lock();
        let (session, stored) = match self.movable(call, session, how, to) {
            Ok(found) => found,
            Err(error) => return self.run(call, |_| Err(error)),
        };
        let is_there = stored.as_ref().is_some_and(|stored| stored.agrees(to));
        let row = AnchorRow {
            commit_seq: to.commit_seq,
            mac: to.mac.clone(),
            ino_limit: to
                .ino_limit
                .max(stored.as_ref().map_or(0, |stored| stored.ino_limit)),
            moved_ms: self.clock.now_ms(),
            key_id: session
                .volume_key()
                .map_or_else(Vec::new, |key| key.as_bytes().to_vec()),
        };
        let put =
            |change: &mut Change<'_>| change.put(Table::Anchors, &row_key(&session), &row.encode_to_vec());
        match (how, &stored) {
            (Move::From(_), Some(_)) => {
                // It is there already if an answer was lost.
                let moved = if is_there {
                    Ok(())
                } else {
                    self.move_silently(&put)
                };
                self.count_unaudited(call, moved.is_ok());
                moved
            }
            (_, stored) => self.move_loudly(call, &session, stored.as_ref(), to, put),
        }
    }

    /// The session of a mount, and the anchor that it may move.
    fn movable(
        &self,
        call: &Call,
        session: &[u8],
        how: Move<'_>,
        to: &Anchor,
    ) -> Result<(Arc<Session>, Option<Anchor>), KmsError> {
        to.check("Anchor")?;
        let session = self.anchoring(call, session)?;
        let stored = self.anchor_of(&session)?;
        let Move::From(from) = how else {
            return Ok((session, stored));
        };
        match (&stored, from) {
            (Some(stored), _) if stored.agrees(to) => {}
            (Some(stored), Some(from)) if stored.agrees(from) && stored.commit_seq < to.commit_seq => {}
            (None, None) => {
                let count = self.store.count_below(Table::Anchors, &[]);
                if count.map_err(failed)? >= ANCHORS_MAX {
                    let message = format!("{ANCHORS_MAX} key domains have anchors, which is the limit");
                    return Err(KmsError::new(Code::LimitExceeded, message));
                }
            }
            (stored, _) => return Err(conflict(stored.as_ref())),
        }
        Ok((session, stored))
    }

    /// The session of a mount that has the volume key of its domain.
    fn anchoring(&self, call: &Call, session: &[u8]) -> Result<Arc<Session>, KmsError> {
        let session = self.session(call, session)?;
        match session.volume_key() {
            Some(_) => Ok(session),
            None => Err(refused(
                "an anchor is for a session that was given the volume key of its key domain",
            )),
        }
    }

    fn anchor_of(&self, session: &Session) -> Result<Option<Anchor>, KmsError> {
        let row = self
            .store
            .get(Table::Anchors, &row_key(session))
            .map_err(failed)?;
        let Some(row) = row else {
            return Ok(None);
        };
        let row = AnchorRow::decode(row.as_slice());
        let row = row.map_err(|_| failed(StoreError::Damaged(Table::Anchors.name())))?;
        // Whoever may use another CMK can have a key made under it that is said to be this volume's.
        if session
            .volume_key()
            .is_none_or(|key| key.as_bytes() != row.key_id.as_slice())
        {
            return Err(refused("the volume's anchor is under another key"));
        }
        Ok(Some(Anchor::of_row(row)))
    }

    /// As a change that is audited.
    fn move_loudly(
        &self,
        call: &Call,
        session: &Session,
        from: Option<&Anchor>,
        to: &Anchor,
        put: impl Fn(&mut Change<'_>) -> Result<(), StoreError>,
    ) -> Result<(), KmsError> {
        let number = |anchor: Option<&Anchor>| anchor.map_or(0, |anchor| anchor.commit_seq).to_string();
        let entries = [
            ("volume", session.facts.volume.to_string()),
            ("domain", session.facts.domain.to_string()),
            ("from", number(from)),
            ("to", number(Some(to))),
        ];
        self.run(call, |trail: &mut Trail| {
            trail.items.push(Item {
                context: entries
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), value.clone()))
                    .collect(),
                ..Item::default()
            });
            self.commit(call, trail, Effect::Other, put, |_| {})
        })
    }

    /// As one that comes every few seconds.
    fn move_silently(&self, put: &dyn Fn(&mut Change<'_>) -> Result<(), StoreError>) -> Result<(), KmsError> {
        let mut manifest = self.manifest.lock();
        let written = || {
            let mut change = self.store.begin();
            put(&mut change)?;
            let next = next_manifest(&manifest, change.delta(), Effect::Other);
            change.put(Table::Manifest, MANIFEST_KEY, &next.encode_to_vec())?;
            change.commit(true)?;
            Ok(next)
        };
        match written() {
            Ok(next) => {
                *manifest = next;
                Ok(())
            }
            Err(error) => {
                // The mount tries again at its next anchor.
                self.recover(Effect::Other, &error, &mut manifest);
                Err(failed(error))
            }
        }
    }
}

fn row_key(session: &Session) -> Vec<u8> {
    let volume = session.facts.volume.as_bytes().as_slice();
    [volume, &session.facts.domain.to_be_bytes()].concat()
}

fn refused(message: &str) -> KmsError {
    KmsError::new(Code::NoPermission, message)
}

fn conflict(stored: Option<&Anchor>) -> KmsError {
    let message = match stored {
        None => "no anchor of the key domain is known here".to_owned(),
        Some(stored) => format!(
            "the anchor of the key domain is another: it stands at commit {}",
            stored.commit_seq
        ),
    };
    KmsError::new(Code::AnchorConflict, message)
}
