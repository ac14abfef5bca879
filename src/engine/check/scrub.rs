//! Scrubbing: every block is read and opened.

use super::{Check, Event, Fault};
use crate::engine::error::{Error, Result};
use crate::engine::format::chunk::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::engine::format::rowkey::{self, Family};
use crate::engine::keyring::KEYS_PER_CALL_MAX;
use crate::engine::types::{FileKind, Ino};

/// Blocks of one file that cannot be read, side by side.
pub(super) struct BadBlocks {
    ino: Ino,
    first: u64,
    end: u64,
    why: String,
}

impl Check<'_> {
    pub(super) fn scrub(&mut self) -> Result<()> {
        let has_content = |known: &super::Known| known.kind == Some(FileKind::Regular) && known.blocks > 0;
        let mut files: Vec<Ino> = self
            .inodes
            .iter()
            .filter(|(_, known)| has_content(known))
            .map(|(ino, _)| *ino)
            .collect();
        files.sort_unstable();
        for group in files.chunks(KEYS_PER_CALL_MAX) {
            self.access.prefetch_keys(group)?;
            for ino in group {
                match self.scrub_file(*ino) {
                    Err(error @ (Error::Corrupt { .. } | Error::Storage { .. })) => {
                        self.found(Fault::Block, Some(*ino), error.to_string(), None);
                    }
                    other => other?,
                }
                self.end_bad_blocks();
                self.tell();
            }
        }
        Ok(())
    }

    /// Blocks that lie side by side are one finding: a slot file that is gone has millions.
    fn bad_block(&mut self, ino: Ino, block: u64, error: &Error) {
        let Some(run) = self
            .bad_blocks
            .as_mut()
            .filter(|run| run.ino == ino && run.end == block)
        else {
            self.end_bad_blocks();
            self.bad_blocks = Some(BadBlocks {
                ino,
                first: block,
                end: block.saturating_add(1),
                why: error.to_string(),
            });
            return;
        };
        run.end = block.saturating_add(1);
    }

    fn end_bad_blocks(&mut self) {
        let Some(BadBlocks { ino, first, end, why }) = self.bad_blocks.take() else {
            return;
        };
        let detail = match end.saturating_sub(first) {
            1 => why,
            count => format!(
                "blocks {first} to {}: {count} of them, the first: {why}",
                end.saturating_sub(1)
            ),
        };
        self.found(Fault::Block, Some(ino), detail, None);
    }

    fn scrub_file(&mut self, ino: Ino) -> Result<()> {
        let core = self.core;
        let node = self.access.node(ino)?;
        let key = self.access.file_key(&node)?;
        let (from, to) = (rowkey::chunk(ino, 0), rowkey::chunk(ino, u64::MAX));
        let mut chunks = Vec::new();
        core.store.scan(Family::Meta, &from, &to, |key, _| {
            chunks.push(rowkey::last_number(key).unwrap_or_default());
            Ok(true)
        })?;
        let mut buffer = vec![0; CHUNK];
        for index in chunks {
            self.access.go_on()?;
            let first = index.saturating_mul(CHUNK_BLOCKS as u64);
            let state = node.state.read();
            // A damaged record was told.
            let Ok(chunk) = self.access.published_chunk(&node, &state, index) else {
                continue;
            };
            self.counts.scrubbed_blocks += chunk.allocated();
            // Together, which costs one read; if that fails, one by one, to tell which.
            let whole = self.access.read_blocks(&node, &state, &key, first, &mut buffer);
            match whole {
                Ok(()) => {}
                Err(Error::Corrupt { .. } | Error::Storage { .. }) => {
                    for block in first..first.saturating_add(CHUNK_BLOCKS as u64) {
                        let into = buffer.get_mut(..BLOCK).unwrap_or_default();
                        match self.access.read_blocks(&node, &state, &key, block, into) {
                            Err(error @ (Error::Corrupt { .. } | Error::Storage { .. })) => {
                                self.bad_block(ino, block, &error);
                            }
                            other => other?,
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let (done, total) = (self.counts.scrubbed_blocks, self.counts.blocks);
        (self.watch)(Event::Progress {
            phase: "blocks",
            done,
            total: Some(total),
        });
        Ok(())
    }
}
