//! What domain 0 keeps of each other domain: what it is, and what it holds.

use super::codec::{Malformed, Reader, Writer};
use crate::engine::types::Ino;

const VERSION: u8 = 1;

/// Whether a domain is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum DomainState {
    /// It is.
    InUse = 1,
    /// Its root was removed, when it was empty.
    Removed = 2,
    /// Its CMK was destroyed, and what was sealed under it given up. Its name is still there.
    Erased = 3,
}

impl DomainState {
    fn from_u8(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::InUse,
            2 => Self::Removed,
            3 => Self::Erased,
            _ => return None,
        })
    }
}

/// What a domain is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DomainRecord {
    pub(crate) state: DomainState,
    /// The directory that has the entry of its root, and that entry's name.
    pub(crate) parent: Ino,
    pub(crate) name: Vec<u8>,
    /// The CMK.
    pub(crate) cmk_arn: String,
    /// The volume key as kmsd wrapped it.
    pub(crate) wrapped_vk: Vec<u8>,
}

impl DomainRecord {
    /// The same without a name.
    pub(crate) fn without_name(self) -> Self {
        Self {
            parent: Ino::default(),
            name: Vec::new(),
            ..self
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out =
            Writer::with_capacity(64 + self.name.len() + self.cmk_arn.len() + self.wrapped_vk.len());
        out.u8(VERSION).u8(self.state as u8).u64(self.parent.0);
        out.field(&self.name)
            .field(self.cmk_arn.as_bytes())
            .field(&self.wrapped_vk);
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        if input.u8()? != VERSION {
            return Err(Malformed);
        }
        let record = Self {
            state: DomainState::from_u8(input.u8()?).ok_or(Malformed)?,
            parent: Ino(input.u64()?),
            name: input.field()?.to_vec(),
            cmk_arn: String::from_utf8(input.field()?.to_vec()).map_err(|_| Malformed)?,
            wrapped_vk: input.field()?.to_vec(),
        };
        input.end()?;
        Ok(record)
    }
}

/// What a domain holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    /// Inode numbers below this, the domain in their high bits, are reserved and never given out by a later mount.
    pub(crate) ino_limit: u64,
    /// Inodes.
    pub(crate) inodes: u64,
    /// Blocks of 4 KiB that are not holes.
    pub(crate) blocks: u64,
}

impl Usage {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(25);
        out.u8(VERSION)
            .u64(self.ino_limit)
            .u64(self.inodes)
            .u64(self.blocks);
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        if input.u8()? != VERSION {
            return Err(Malformed);
        }
        let usage = Self {
            ino_limit: input.u64()?,
            inodes: input.u64()?,
            blocks: input.u64()?,
        };
        input.end()?;
        Ok(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_nothing_else_is_taken_for_one() {
        let record = DomainRecord {
            state: DomainState::Erased,
            parent: Ino(7),
            name: vec![0xff, b'a'],
            cmk_arn: "acs:kms:local:1:key/x".to_owned(),
            wrapped_vk: vec![9; 100],
        };
        let bytes = record.encode();
        assert_eq!(DomainRecord::decode(&bytes), Ok(record));
        for cut in 0..bytes.len() {
            assert_eq!(DomainRecord::decode(&bytes[..cut]), Err(Malformed));
        }
        assert_eq!(DomainRecord::decode(&[bytes, vec![0]].concat()), Err(Malformed));
        let usage = Usage {
            ino_limit: 1 << 48 | 9,
            inodes: 8,
            blocks: 7,
        };
        assert_eq!(Usage::decode(&usage.encode()), Ok(usage));
        assert_eq!(Usage::decode(&usage.encode()[1..]), Err(Malformed));
    }
}
