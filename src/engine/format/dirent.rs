//! One place of a chained table: a name and what it stands for, or the mark of one that was removed.
//!
//! A name's places are its 56-bit PRF followed by a 6-bit index. A chain has no gaps: a name is looked for from
//! index 0 until an empty place, which is one read unless 56 bits collide. Removing from the middle of a chain
//! leaves a `Removed` mark, so that no attacker-visible count has to be trusted and no later name gets lost.

use super::codec::{Malformed, Reader, Writer};
use crate::engine::types::{FileKind, Ino};

/// Bits of the index within a chain.
pub(crate) const CHAIN_BITS: u32 = 6;
/// Names that can share one PRF value.
pub(crate) const CHAIN_MAX: u64 = 1 << CHAIN_BITS;

const REMOVED: u8 = 0;
const PRESENT: u8 = 1;

/// What a place of a chain holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place<T> {
    /// Something was here, and the chain goes on behind it.
    Removed,
    /// An entry.
    Present(T),
}

/// What a chained table stores under a name.
pub(crate) trait Entry: Sized {
    fn name(&self) -> &[u8];
    fn write(&self, out: &mut Writer);
    fn read(input: &mut Reader<'_>) -> Result<Self, Malformed>;
}

/// A directory entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dirent {
    pub(crate) ino: Ino,
    pub(crate) kind: FileKind,
    pub(crate) name: Vec<u8>,
}

impl Entry for Dirent {
    fn name(&self) -> &[u8] {
        &self.name
    }

    fn write(&self, out: &mut Writer) {
        out.u64(self.ino.0).u8(self.kind as u8).field(&self.name);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            ino: Ino(input.u64()?),
            kind: FileKind::from_u8(input.u8()?).ok_or(Malformed)?,
            name: input.field()?.to_vec(),
        })
    }
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Xattr {
    pub(crate) name: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl Entry for Xattr {
    fn name(&self) -> &[u8] {
        &self.name
    }

    fn write(&self, out: &mut Writer) {
        // A value may have 65,536 bytes, one more than a 16-bit length holds.
        out.field(&self.name)
            .u32(u32::try_from(self.value.len()).unwrap_or(u32::MAX))
            .bytes(&self.value);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = input.field()?.to_vec();
        let length = usize::try_from(input.u32()?).map_err(|_| Malformed)?;
        Ok(Self {
            name,
            value: input.bytes(length)?.to_vec(),
        })
    }
}

impl<T: Entry> Place<T> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(64);
        match self {
            Self::Removed => {
                out.u8(REMOVED);
            }
            Self::Present(entry) => {
                out.u8(PRESENT);
                entry.write(&mut out);
            }
        }
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        let place = match input.u8()? {
            REMOVED => Self::Removed,
            PRESENT => Self::Present(T::read(&mut input)?),
            _ => return Err(Malformed),
        };
        input.end()?;
        Ok(place)
    }
}
