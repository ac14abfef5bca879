//! The root record of a domain, rewritten in every commit; and the seal file that says how far the log reached.

use super::codec::{Malformed, Reader, Writer};
use super::rowsum::RowSum;
use crate::engine::keyservice::{Anchor, Position};

const VERSION: u8 = 1;
/// Of a seal record with anchors.
const VERSION_WITH_ANCHORS: u8 = 2;
/// Of a root record with a sum.
const VERSION_WITH_SUM: u8 = 2;

/// The counters of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RootRecord {
    /// The number of the commit that wrote this record; each commit has the next.
    pub(crate) commit_seq: u64,
    /// The last commit known durable when this record was built.
    pub(crate) durable_seq: u64,
    /// Inode numbers below this are reserved and never given out by a later mount.
    pub(crate) ino_limit: u64,
    /// Inodes.
    pub(crate) inodes: u64,
    /// Blocks of 4 KiB that are not holes.
    pub(crate) blocks: u64,
    /// The sum of the first domain's records, and of the roots of all others; none in a format without.
    pub(crate) sum: Option<RowSum>,
}

impl RootRecord {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(81);
        let version = self.sum.map_or(VERSION, |_| VERSION_WITH_SUM);
        out.u8(version)
            .u64(self.commit_seq)
            .u64(self.durable_seq)
            .u64(self.ino_limit);
        out.u64(self.inodes).u64(self.blocks);
        if let Some(sum) = &self.sum {
            sum.write(&mut out);
        }
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        let version = input.u8()?;
        if version != VERSION && version != VERSION_WITH_SUM {
            return Err(Malformed);
        }
        let root = Self {
            commit_seq: input.u64()?,
            durable_seq: input.u64()?,
            ino_limit: input.u64()?,
            inodes: input.u64()?,
            blocks: input.u64()?,
            sum: match version {
                VERSION_WITH_SUM => Some(RowSum::read(&mut input)?),
                _ => None,
            },
        };
        input.end()?;
        Ok(root)
    }
}

/// The root record of any domain but the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct DomainRoot {
    /// The number of the commit that wrote this record.
    pub(crate) commit_seq: u64,
    /// The sum of the domain's records.
    pub(crate) sum: RowSum,
}

impl DomainRoot {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(49);
        out.u8(VERSION).u64(self.commit_seq);
        self.sum.write(&mut out);
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        if input.u8()? != VERSION {
            return Err(Malformed);
        }
        let root = Self {
            commit_seq: input.u64()?,
            sum: RowSum::read(&mut input)?,
        };
        input.end()?;
        Ok(root)
    }
}

/// What is known of the anchor in the KMS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Anchors {
    /// The KMS is known to have had it.
    pub(crate) accepted: Option<Anchor>,
    /// The KMS was, or is to be, told of it; it may have it already.
    pub(crate) proposed: Option<Anchor>,
}

impl Anchors {
    /// The same with a next anchor to be told, unless one is outstanding, or it is no step forward.
    pub(crate) fn proposing(self, next: Option<Anchor>) -> Self {
        let reached = self.accepted.map(|accepted| accepted.commit_seq);
        let is_step = next.is_some_and(|next| reached.is_none_or(|reached| reached < next.commit_seq));
        match self.outstanding() {
            None if is_step => Self {
                proposed: next,
                ..self
            },
            _ => self,
        }
    }

    /// What the KMS is to be told.
    pub(crate) fn outstanding(&self) -> Option<Anchor> {
        let is_there = |proposed: &Anchor| self.accepted.is_some_and(|accepted| accepted.agrees(proposed));
        self.proposed.filter(|proposed| !is_there(proposed))
    }

    /// The KMS has it now.
    pub(crate) fn accept(&mut self, anchor: Anchor) {
        self.accepted = Some(anchor);
    }
}

/// The content of the seal file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SealRecord {
    /// The volume must hold every commit up to this one, or it lost some.
    pub(crate) durable_seq: u64,
    /// The KMS must have come this far, or it was put back. None until a mount has seen one.
    pub(crate) kms: Option<Position>,
    /// What is known of the anchor; nothing in a format without roots.
    pub(crate) anchors: Anchors,
}

/// Which parts of a seal record are there.
const HAS_KMS: u8 = 1;
const HAS_ACCEPTED: u8 = 2;
const HAS_PROPOSED: u8 = 4;

impl SealRecord {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = Writer::with_capacity(178);
        let Anchors { accepted, proposed } = self.anchors;
        let is_plain = accepted.is_none() && proposed.is_none();
        let version = if is_plain { VERSION } else { VERSION_WITH_ANCHORS };
        out.u8(version).u64(self.durable_seq);
        if !is_plain {
            let flag = |is_there: bool, flag: u8| if is_there { flag } else { 0 };
            let kms = flag(self.kms.is_some(), HAS_KMS);
            let accepted = flag(accepted.is_some(), HAS_ACCEPTED);
            out.u8(kms | accepted | flag(proposed.is_some(), HAS_PROPOSED));
        }
        if let Some(kms) = self.kms {
            out.bytes(&kms.keystore).u64(kms.epoch).u64(kms.state_seq);
            out.u64(kms.audit_records).bytes(&kms.audit_head);
        }
        for anchor in [accepted, proposed].into_iter().flatten() {
            out.u64(anchor.commit_seq)
                .bytes(&anchor.mac)
                .u64(anchor.ino_limit);
        }
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        let version = input.u8()?;
        let durable_seq = input.u64()?;
        let flags = match version {
            VERSION if input.is_empty() => 0,
            VERSION => HAS_KMS,
            VERSION_WITH_ANCHORS => input.u8()?,
            _ => return Err(Malformed),
        };
        let kms = part(flags, HAS_KMS, || {
            Ok(Position {
                keystore: input.array()?,
                epoch: input.u64()?,
                state_seq: input.u64()?,
                audit_records: input.u64()?,
                audit_head: input.array()?,
            })
        })?;
        let mut anchor = |flag| {
            part(flags, flag, || {
                Ok(Anchor {
                    commit_seq: input.u64()?,
                    mac: input.array()?,
                    ino_limit: input.u64()?,
                })
            })
        };
        let anchors = Anchors {
            accepted: anchor(HAS_ACCEPTED)?,
            proposed: anchor(HAS_PROPOSED)?,
        };
        input.end()?;
        Ok(Self {
            durable_seq,
            kms,
            anchors,
        })
    }
}

fn part<T>(flags: u8, flag: u8, read: impl FnOnce() -> Result<T, Malformed>) -> Result<Option<T>, Malformed> {
    match flags & flag {
        0 => Ok(None),
        _ => read().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anchor(number: u8) -> Anchor {
        Anchor {
            commit_seq: number.into(),
            mac: [number; 32],
            ino_limit: 1 << number,
        }
    }

    #[test]
    fn a_seal_record_comes_back_whatever_of_it_is_there() {
        let kms = Position {
            keystore: [1; 16],
            audit_records: 7,
            ..Position::NONE
        };
        for kms in [None, Some(kms)] {
            for accepted in [None, Some(anchor(3))] {
                for proposed in [None, Some(anchor(4))] {
                    let record = SealRecord {
                        durable_seq: 9,
                        kms,
                        anchors: Anchors { accepted, proposed },
                    };
                    let bytes = record.encode();
                    assert_eq!(SealRecord::decode(&bytes), Ok(record));
                    assert_eq!(SealRecord::decode(&[bytes, vec![0]].concat()), Err(Malformed));
                }
            }
        }
    }

    #[test]
    fn an_anchor_is_proposed_once_the_one_before_is_known_to_be_there() {
        let mut anchors = Anchors::default().proposing(Some(anchor(3)));
        assert_eq!(anchors.outstanding(), Some(anchor(3)));
        // Whether the KMS has that is not known.
        assert_eq!(anchors.proposing(Some(anchor(4))), anchors);
        anchors.accept(anchor(3));
        assert_eq!(anchors.outstanding(), None);
        assert_eq!(anchors.proposing(Some(anchor(3))), anchors);
        assert_eq!(anchors.proposing(None), anchors);
        assert_eq!(anchors.proposing(Some(anchor(4))).outstanding(), Some(anchor(4)));
    }
}
