//! Draining: inline blocks of large files go to their slots, so that the database holds small files only.
//!
//! A block is copied as ciphertext: it needs no key of the file. A slot is written only if no record that may
//! survive a crash names it, and named only after it is synced (rule R1). A chunk that is written meanwhile is left
//! for another time.

use super::batch::Batch;
use super::chunkcache::PublishedChunk;
use super::content::slot_offset;
use super::core::Access;
use super::error::{Error, Result};
use super::format::chunk::{BLOCK, Block, CHUNK, CHUNK_BLOCKS, Chunk};
use super::format::inode::InodeRecord;
use super::format::rowkey;
use super::format::seal::Seal;
use super::node::{Node, NodeState, Stored, slot_mask};
use super::publish::{Publishing, delete_inline};
use super::space::Room;
use std::sync::Arc;
use std::time::Duration;

/// A file that was not written for this long is drained.
const IDLE: Duration = Duration::from_secs(1);
/// A file with more chunks than this to drain does not wait until it is idle.
const WAITING_CHUNKS_MAX: usize = 512;
/// Chunks copied under one holding of the file's lock.
const GROUP_CHUNKS_MAX: usize = 64;

/// The blocks of one chunk that were copied.
struct Copied {
    index: u64,
    chunk: Chunk,
    /// A run taken for this copy.
    taken: Option<u64>,
}

/// What names copies, and what it is stored as once it is committed.
struct Adoption {
    batch: Batch,
    stored: Stored,
    chunks: Vec<Seal>,
    /// By page.
    bitmaps: Vec<(u64, Seal)>,
}

impl Access<'_> {
    /// Drains a file that is idle or has much to drain.
    pub(crate) fn drain_if_due(&self, node: &Arc<Node>) -> Result<()> {
        let is_due = {
            let state = node.state.read();
            let file = &state.file;
            let idle = file
                .written
                .is_none_or(|at| self.clock.monotonic().saturating_duration_since(at) >= IDLE);
            !file.poisoned && (idle || file.drainable.len() > WAITING_CHUNKS_MAX)
        };
        if is_due { self.drain_file(node) } else { Ok(()) }
    }

    /// Drains what can be drained now.
    pub(crate) fn drain_file(&self, node: &Arc<Node>) -> Result<()> {
        let mut from = 0;
        loop {
            let right = Publishing::begin(node);
            let (copied, next) = self.copy_to_slots(&right, from)?;
            if !copied.is_empty() {
                self.sync_slots(node)?;
                self.adopt(&right, copied)?;
            }
            match next {
                Some(next) => from = next,
                None => return Ok(()),
            }
        }
    }

    /// Copies a group of chunks; says where the next group starts.
    fn copy_to_slots(&self, right: &Publishing<'_>, from: u64) -> Result<(Vec<Copied>, Option<u64>)> {
        let node = right.node;
        let mut state = node.state.write();
        let state = &mut *state;
        let group: Vec<_> = state
            .file
            .drainable
            .range(from..)
            .take(GROUP_CHUNKS_MAX)
            .copied()
            .collect();
        let next = group
            .last()
            .filter(|_| group.len() == GROUP_CHUNKS_MAX)
            .map(|last| last + 1);
        let mut copied: Vec<Copied> = Vec::new();
        for index in group {
            if state.file.pending.contains_key(&index) {
                continue;
            }
            match self.copy_chunk(node, state, index) {
                Ok(chunk) => copied.extend(chunk),
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::error!(inode = node.ino.0, %error, "a chunk is not drained");
                    state.file.drainable.remove(&index);
                }
                Err(error) => {
                    for run in copied.iter().filter_map(|copy| copy.taken) {
                        self.return_run(node, state, run);
                    }
                    return Err(error);
                }
            }
        }
        Ok((copied, next))
    }

    fn copy_chunk(&self, node: &Arc<Node>, state: &mut NodeState, index: u64) -> Result<Option<Copied>> {
        let mut chunk = self.published_chunk(node, state, index)?.chunk().clone();
        if !chunk.is_drainable() {
            state.file.drainable.remove(&index);
            return Ok(None);
        }
        let blocked = slot_mask(&chunk) | self.busy_slots(state, index, chunk.run);
        let movable = |at: usize, chunk: &Chunk| match chunk.block(at) {
            Block::Inline { seal, length } if usize::from(length) == BLOCK && blocked & (1 << at) == 0 => {
                Some(seal)
            }
            _ => None,
        };
        if (0..CHUNK_BLOCKS).all(|at| movable(at, &chunk).is_none()) {
            return Ok(None);
        }
        let (run, file) = match chunk.run {
            Some(run) => (run, self.slot_file(node, state)?),
            // A copy takes room before it gives any.
            None if self.take_room(CHUNK)? != Room::Plenty => return Ok(None),
            None => self.allocate_run(node, state, index)?,
        };
        let taken = Some(run).filter(|_| chunk.run.is_none());
        chunk.run = Some(run);
        for at in 0..CHUNK_BLOCKS {
            let Some(seal) = movable(at, &chunk) else { continue };
            let body = self.inline_body(node.ino, index.saturating_mul(CHUNK_BLOCKS as u64) + at as u64);
            let written = body.and_then(|body| file.write(slot_offset(run, at), &body));
            if let Err(error) = written {
                if let Some(run) = taken {
                    self.return_run(node, state, run);
                }
                return Err(error);
            }
            chunk.set(at, Block::Slot(seal));
        }
        Ok(Some(Copied { index, chunk, taken }))
    }

    /// Publishes the copies whose chunks nobody wrote meanwhile.
    fn adopt(&self, right: &Publishing<'_>, copied: Vec<Copied>) -> Result<()> {
        let node = right.node;
        let mut state = node.state.write();
        let state = &mut *state;
        let (overtaken, adopted): (Vec<_>, Vec<_>) = copied
            .into_iter()
            .partition(|copy| state.file.pending.contains_key(&copy.index));
        for run in overtaken.iter().filter_map(|copy| copy.taken) {
            self.return_run(node, state, run);
        }
        if adopted.is_empty() {
            return Ok(());
        }
        let added: Vec<_> = adopted.iter().filter_map(|copy| copy.taken).collect();
        let runs = added.len() as u64;
        let mut record = state.record_to_store();
        record.content.runs = record.content.runs.saturating_add(runs);
        let batch = self.adoption(node, state, &adopted, &added, &record);
        let committed = batch.and_then(|adoption| {
            let seq = self.commit(adoption.batch)?;
            Ok((seq, adoption.stored, adoption.chunks, adoption.bitmaps))
        });
        let (seq, stored, seals, bitmaps) = match committed {
            Ok(committed) => committed,
            Err(error) => {
                // Where there is no room nothing came to name them. After all else that is not known.
                if error.is_no_room() {
                    for run in added {
                        self.return_run(node, state, run);
                    }
                }
                return Err(error);
            }
        };
        state.published = record.content;
        state.stored = stored;
        state.record.content.runs = state.record.content.runs.saturating_add(runs);
        state.file.runs.committed(seq, &added, &[], &bitmaps);
        for (Copied { index, chunk, .. }, seal) in adopted.into_iter().zip(seals) {
            if !chunk.is_drainable() {
                state.file.drainable.remove(&index);
            }
            let published = PublishedChunk::new(chunk, Some(seal));
            self.chunks.put(state.file.generation, index, published);
        }
        Ok(())
    }

    /// The batch that names the copies in place of what they are of.
    fn adoption(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        adopted: &[Copied],
        added: &[u64],
        record: &InodeRecord,
    ) -> Result<Adoption> {
        let mut batch = Batch::default();
        let mut chunks = Vec::with_capacity(adopted.len());
        for copy in adopted {
            let old = self.published_chunk(node, state, copy.index)?;
            delete_inline(&mut batch, node, copy.index, &old, &copy.chunk);
            let key = rowkey::chunk(node.ino, copy.index);
            chunks.push(self.put_row(&mut batch, key, &copy.chunk.encode(), old.seal())?);
        }
        let bitmaps = self.put_bitmaps(node, state, &mut batch, added, &[])?;
        let stored = self.put_inode(&mut batch, node.ino, record, Some(&state.stored))?;
        Ok(Adoption {
            batch,
            stored,
            chunks,
            bitmaps,
        })
    }
}
