//! The root record of a domain, rewritten in every commit; and the seal file that says how far the log reached.

use super::codec::{Malformed, Reader, Writer};
use super::rowsum::RowSum;
use crate::engine::keyservice::Position;

const VERSION: u8 = 1;
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

/// The content of the seal file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SealRecord {
    /// The volume must hold every commit up to this one, or it lost some.
    pub(crate) durable_seq: u64,
    /// The KMS must have come this far, or it was put back. None until a mount has seen one.
    pub(crate) kms: Option<Position>,
}

impl SealRecord {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = Writer::with_capacity(81);
        out.u8(VERSION).u64(self.durable_seq);
        if let Some(kms) = self.kms {
            out.bytes(&kms.keystore).u64(kms.epoch).u64(kms.state_seq);
            out.u64(kms.audit_records).bytes(&kms.audit_head);
        }
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        if input.u8()? != VERSION {
            return Err(Malformed);
        }
        let durable_seq = input.u64()?;
        let kms = match input.is_empty() {
            true => None,
            false => Some(Position {
                keystore: input.array()?,
                epoch: input.u64()?,
                state_seq: input.u64()?,
                audit_records: input.u64()?,
                audit_head: input.array()?,
            }),
        };
        input.end()?;
        Ok(Self { durable_seq, kms })
    }
}
