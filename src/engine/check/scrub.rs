//! Scrubbing: every block is read and opened.

use super::{Check, Event, Fault};
use crate::engine::error::{Error, Result};
use crate::engine::format::chunk::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::engine::format::rowkey::{self, Family};
use crate::engine::keyring::KEYS_PER_CALL_MAX;
use crate::engine::types::{FileKind, Ino};

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
                    Err(Error::Corrupt { what }) => {
                        let detail = format!("{what} fails authentication");
                        self.found(Fault::Block, Some(*ino), detail, None);
                    }
                    other => other?,
                }
                self.tell();
            }
        }
        Ok(())
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
            core.keyring.go_on()?;
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
                Err(Error::Corrupt { .. }) => {
                    for block in first..first.saturating_add(CHUNK_BLOCKS as u64) {
                        let into = buffer.get_mut(..BLOCK).unwrap_or_default();
                        match self.access.read_blocks(&node, &state, &key, block, into) {
                            Err(Error::Corrupt { what }) => {
                                let detail = format!("{what} fails authentication");
                                self.found(Fault::Block, Some(ino), detail, None);
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
