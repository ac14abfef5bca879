//! The chunk record: where each of 32 blocks lies, and the nonce and tag that open it. A block that is replayed,
//! moved or zeroed on storage fails against the tag that stands here, beside the pointer.

use super::codec::{Malformed, Reader, Writer};
use super::seal::Seal;

/// Bytes of plaintext in a block, and of ciphertext in a slot.
pub(crate) const BLOCK: usize = 4096;
/// Blocks in a chunk, and slots in a run.
pub(crate) const CHUNK_BLOCKS: usize = 32;
/// Bytes of a chunk, and of a run.
pub(crate) const CHUNK: usize = BLOCK * CHUNK_BLOCKS;

const VERSION: u8 = 1;
const NO_RUN: u64 = u64::MAX;

const HOLE: u8 = 0;
const UNWRITTEN: u8 = 1;
const INLINE: u8 = 2;
const SLOT: u8 = 3;

/// One block of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Block {
    /// Never written, or punched: reads as zeros.
    #[default]
    Hole,
    /// Reserved by fallocate(2): reads as zeros, and its slot is kept for it.
    Unwritten,
    /// Ciphertext in the family `content`. Below 4096 bytes, the rest of the block is zeros.
    Inline {
        /// What opens it.
        seal: Seal,
        /// Bytes of plaintext, 1 to 4096.
        length: u16,
    },
    /// 4096 bytes of ciphertext in the block's own slot of the chunk's run.
    Slot(Seal),
}

impl Block {
    pub(crate) fn is_data(self) -> bool {
        matches!(self, Self::Inline { .. } | Self::Slot(_))
    }
}

/// A decoded chunk record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chunk {
    /// The run in the slot file that belongs to this chunk.
    pub(crate) run: Option<u64>,
    pub(crate) blocks: [Block; CHUNK_BLOCKS],
}

impl Chunk {
    /// The block at `index`, which is taken modulo 32.
    pub(crate) fn block(&self, index: usize) -> Block {
        self.blocks.get(index % CHUNK_BLOCKS).copied().unwrap_or_default()
    }

    pub(crate) fn set(&mut self, index: usize, block: Block) {
        if let Some(place) = self.blocks.get_mut(index % CHUNK_BLOCKS) {
            *place = block;
        }
    }

    /// Whether nothing is left: such a chunk has no record.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.iter().all(|block| *block == Block::Hole)
    }

    /// Blocks that are not holes.
    pub(crate) fn allocated(&self) -> u64 {
        self.blocks.iter().filter(|block| **block != Block::Hole).count() as u64
    }

    /// Whether a block lies inline that could lie in a slot.
    pub(crate) fn is_drainable(&self) -> bool {
        self.blocks
            .iter()
            .any(|block| matches!(block, Block::Inline { length, .. } if usize::from(*length) == BLOCK))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(64 + CHUNK_BLOCKS * Seal::LENGTH);
        out.u8(VERSION).u64(self.run.unwrap_or(NO_RUN));
        for block in &self.blocks {
            out.u8(match block {
                Block::Hole => HOLE,
                Block::Unwritten => UNWRITTEN,
                Block::Inline { .. } => INLINE,
                Block::Slot(_) => SLOT,
            });
        }
        for block in &self.blocks {
            match block {
                Block::Hole | Block::Unwritten => {}
                Block::Inline { seal, length } => {
                    seal.write(out.u16(*length));
                }
                Block::Slot(seal) => seal.write(&mut out),
            }
        }
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        if input.u8()? != VERSION {
            return Err(Malformed);
        }
        let run = Some(input.u64()?).filter(|run| *run != NO_RUN);
        let states: [u8; CHUNK_BLOCKS] = input.array()?;
        let mut chunk = Self {
            run,
            ..Self::default()
        };
        for (block, state) in chunk.blocks.iter_mut().zip(states) {
            *block = match state {
                HOLE => Block::Hole,
                UNWRITTEN => Block::Unwritten,
                INLINE => {
                    let length = input.u16()?;
                    if length == 0 || usize::from(length) > BLOCK {
                        return Err(Malformed);
                    }
                    Block::Inline {
                        length,
                        seal: Seal::read(&mut input)?,
                    }
                }
                SLOT if run.is_some() => Block::Slot(Seal::read(&mut input)?),
                _ => return Err(Malformed),
            };
        }
        input.end()?;
        Ok(chunk)
    }
}
