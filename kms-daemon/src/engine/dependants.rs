//! What depends on a key: what mounts report of the volumes, and of their key domains, that are encrypted under it. It is for
//! whoever is about to take the key away; nothing is decided by it.

use super::call::{Call, Trail};
use super::keys::refusal;
use super::sessions::Session;
use super::{Effect, Engine, failed};
use crate::audit::Item;
use crate::rows::DependantRow;
use crate::store::{Change, StoreError, Table};
use kms_api::proto::KeyState;
use kms_api::{Code, KmsError, LOCATION_BYTES_MAX};
use parking_lot::Mutex;
use prost::Message;
use std::collections::BTreeSet;
use uuid::Uuid;

/// Volumes and domains that one key is known to protect, at most.
const DEPENDANTS_PER_KEY_MAX: usize = 4096;

/// Taken by a report, over what it reads and what it writes.
pub(super) type Reports = Mutex<()>;

/// What ReportUsage is told.
pub(crate) struct Usage<'a> {
    /// An id or an ARN.
    pub(crate) key: &'a str,
    /// Where the volume lies on its host.
    pub(crate) location: &'a str,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// Nothing of the domain is under the key any more.
    pub(crate) removed: bool,
}

/// A domain of a volume that is encrypted under a key.
pub(crate) struct Dependant {
    pub(crate) volume: Uuid,
    pub(crate) domain: u16,
    pub(crate) row: DependantRow,
    /// A session of the domain holds the key now.
    pub(crate) is_mounted: bool,
}

/// What a report comes to.
enum Report {
    /// Nothing is to be written.
    Known,
    /// Its figures are new, and their loss in a crash is none.
    Figures(Named),
    /// The volume lies elsewhere.
    Moved(Named),
    /// The domain was not known to depend on the key.
    First(Named),
    /// And is not to be any more.
    Removed(Named),
}

/// A row, and what it is about.
struct Named {
    key: Uuid,
    volume: Uuid,
    domain: u16,
    row: DependantRow,
}

impl Named {
    fn row_key(&self) -> Vec<u8> {
        [
            self.key.as_bytes().as_slice(),
            self.volume.as_bytes(),
            &self.domain.to_be_bytes(),
        ]
        .concat()
    }

    /// For the audit log, with what is particular to this record.
    fn item(&self, key_arn: String, particular: (&str, &str)) -> Item {
        let entries = [
            ("volume", self.volume.to_string()),
            ("domain", self.domain.to_string()),
            (particular.0, particular.1.to_owned()),
        ];
        Item {
            key_arn,
            context: entries.map(|(name, value)| (name.to_owned(), value)).into(),
            code: String::new(),
        }
    }
}

impl Engine {
    /// Takes in what a mount reports of the domain that its session serves. Like a renewal it is not audited, nor synced: the
    /// next report makes good what a crash loses. The first of a domain is both, so that no volume is ever forgotten, and so
    /// is its removal.
    ///
    /// # Errors
    /// `Rejected.SessionNotFound`; `InvalidParameter`; the key's state if it may not be used and the session was given nothing
    /// under it; `Rejected.LimitExceeded` past 4096 domains for one key.
    pub(crate) fn report_usage(
        &self,
        call: &Call,
        session: &[u8],
        usage: &Usage<'_>,
    ) -> Result<(), KmsError> {
        let _one_at_a_time = self.reports.lock();
        let report = self
            .session(call, session)
            .and_then(|session| self.report(call, &session, usage));
        let outcome = match report {
            Ok(Report::First(named)) => {
                let particular = ("location", usage.location);
                return self.commit_report(call, &named, particular, |change| {
                    change.put(Table::Dependants, &named.row_key(), &named.row.encode_to_vec())
                });
            }
            Ok(Report::Removed(named)) => {
                return self.commit_report(call, &named, ("removed", "true"), |change| {
                    change.delete(Table::Dependants, &named.row_key())
                });
            }
            Ok(Report::Known) => Ok(()),
            Ok(Report::Figures(named)) => self.store_report(&named, false),
            Ok(Report::Moved(named)) => self.store_report(&named, true),
            Err(error) => Err(error),
        };
        self.count_unaudited(call, outcome.is_ok());
        outcome
    }

    /// The domains that are encrypted under a key in any state, ordered by volume and domain, as they were last reported.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`
    pub(crate) fn list_dependants(&self, trail: &mut Trail, key: &str) -> Result<Vec<Dependant>, KmsError> {
        let id = self.resolve(key)?;
        trail.note(self.arn(id));
        let rows = self.store.scan_below(Table::Dependants, id.as_bytes());
        let mounted: BTreeSet<_> = self
            .sessions
            .holders(Some(id))
            .iter()
            .map(|holder| (holder.facts.volume, holder.facts.domain))
            .collect();
        let each = rows.map_err(failed)?.into_iter().map(|(row_key, plain)| {
            let (volume, domain) = named_by(&row_key).ok_or_else(damaged)?;
            Ok(Dependant {
                volume,
                domain,
                row: DependantRow::decode(plain.as_slice()).map_err(|_| damaged())?,
                is_mounted: mounted.contains(&(volume, domain)),
            })
        });
        each.collect()
    }

    fn report(&self, call: &Call, session: &Session, usage: &Usage<'_>) -> Result<Report, KmsError> {
        // Not by an alias, which may have come to name another key.
        let key = self.resolve_id(usage.key)?;
        let state = self.key_state(key);
        if state != KeyState::Enabled && !session.uses(key) {
            return Err(refusal(state));
        }
        if state == KeyState::Destroyed {
            // What depended on it stays with its tombstone: a mount gives up what it cannot read, and counts nothing then.
            return Ok(Report::Known);
        }
        if !usage.removed && !(1..=LOCATION_BYTES_MAX).contains(&usage.location.len()) {
            return Err(KmsError::invalid("Location", "must be 1 to 4096 bytes"));
        }
        let named = Named {
            key,
            volume: session.facts.volume,
            domain: session.facts.domain,
            row: DependantRow {
                location: usage.location.to_owned(),
                files: usage.files,
                bytes: usage.bytes,
                reported_ms: self.clock.now_ms(),
                uid: call.principal.uid,
            },
        };
        let stored = self
            .store
            .get(Table::Dependants, &named.row_key())
            .map_err(failed)?;
        let Some(stored) = stored else {
            if usage.removed {
                return Ok(Report::Known);
            }
            let known = self.store.count_below(Table::Dependants, key.as_bytes());
            if known.map_err(failed)? >= DEPENDANTS_PER_KEY_MAX {
                let message = format!(
                    "{DEPENDANTS_PER_KEY_MAX} volumes and domains depend on the key, which is the limit"
                );
                return Err(KmsError::new(Code::LimitExceeded, message));
            }
            return Ok(Report::First(named));
        };
        if usage.removed {
            return Ok(Report::Removed(named));
        }
        let stored = DependantRow::decode(stored.as_slice()).map_err(|_| damaged())?;
        if stored.location == named.row.location {
            Ok(Report::Figures(named))
        } else {
            Ok(Report::Moved(named))
        }
    }

    fn commit_report(
        &self,
        call: &Call,
        named: &Named,
        particular: (&str, &str),
        build: impl Fn(&mut Change<'_>) -> Result<(), StoreError>,
    ) -> Result<(), KmsError> {
        self.run(call, |trail| {
            trail.items.push(named.item(self.arn(named.key), particular));
            self.commit(call, trail, Effect::Other, build, |_| {})
        })
    }

    fn store_report(&self, named: &Named, sync: bool) -> Result<(), KmsError> {
        // Not while the keystore goes to its next epoch, which would leave it behind.
        let _manifest = self.manifest.lock();
        let mut change = self.store.begin();
        let stored = change
            .put(Table::Dependants, &named.row_key(), &named.row.encode_to_vec())
            .and_then(|()| change.commit(sync));
        stored.map_err(failed)
    }
}

/// The volume and the domain that a row is about.
fn named_by(row_key: &[u8]) -> Option<(Uuid, u16)> {
    let (_, rest) = row_key.split_first_chunk::<16>()?;
    let (volume, domain) = rest.split_first_chunk::<16>()?;
    Some((
        Uuid::from_bytes(*volume),
        u16::from_be_bytes(domain.try_into().ok()?),
    ))
}

fn damaged() -> KmsError {
    failed(StoreError::Damaged(Table::Dependants.name()))
}
