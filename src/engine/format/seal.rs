//! The nonce and the tag that open what is sealed: beside the pointer of a block, in front of a row's ciphertext.

use super::codec::{Malformed, Reader, Writer};
use kms_crypto::{NONCE_LEN, Nonce, TAG_LEN, Tag};

/// What opens a block or a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    pub(crate) nonce: Nonce,
    pub(crate) tag: Tag,
}

impl Seal {
    /// Bytes that it takes.
    pub(crate) const LENGTH: usize = NONCE_LEN + TAG_LEN;

    /// The seal in front of a row's ciphertext, and that; `None` if the row is too short to have one.
    pub(crate) fn split_row(row: &[u8]) -> Option<(Self, &[u8])> {
        let (nonce, rest) = row.split_first_chunk()?;
        let (tag, ciphertext) = rest.split_first_chunk()?;
        let seal = Self {
            nonce: Nonce(*nonce),
            tag: Tag(*tag),
        };
        Some((seal, ciphertext))
    }

    /// The seal of a row.
    pub(crate) fn of_row(row: &[u8]) -> Option<Self> {
        Self::split_row(row).map(|(seal, _)| seal)
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.bytes(&self.nonce.0).bytes(&self.tag.0);
    }

    pub(crate) fn read(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            nonce: Nonce(input.array()?),
            tag: Tag(input.array()?),
        })
    }
}
