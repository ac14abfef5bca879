//! Operations that change which parts of a file exist: truncation, fallocate(2), and those that look for them:
//! lseek(2), copy_file_range(2).

use super::content::{FILE_BYTES_MAX, is_small};
use super::core::Access;
use super::error::{Error, Result};
use super::format::chunk::{BLOCK, Block, CHUNK, CHUNK_BLOCKS};
use super::format::inode::InodeRecord;
use super::format::rowkey::{self, Family};
use super::keys::FileKey;
use super::node::{Node, NodeState};
use super::space::Room;
use super::types::{Fallocate, Seek};
use std::ops::Range;
use std::sync::Arc;

const BLOCK_U64: u64 = BLOCK as u64;
const CHUNK_U64: u64 = CHUNK as u64;
/// Chunks reserved under one holding of the file's lock: 16 MiB, of which a full disk has to have all.
const ALLOCATE_CHUNKS_MAX: u64 = 128;
/// Bytes that copy_file_range copies at a time.
const COPY_BYTES: usize = 1 << 20;

impl Access<'_> {
    /// Sets the size, and lets `also` change other attributes in the same commit.
    pub(crate) fn resize(
        &self,
        node: &Arc<Node>,
        size: u64,
        also: impl FnOnce(&mut InodeRecord),
    ) -> Result<()> {
        let key = if size.is_multiple_of(BLOCK_U64) {
            None
        } else {
            Some(self.file_key(node)?)
        };
        self.restructure(node, |state| {
            let cut = if size > state.record.content.size || state.record.content.blocks == 0 {
                0..0
            } else {
                self.clear_tail(node, state, key.as_deref(), size)?;
                size.div_ceil(CHUNK_U64)..u64::MAX
            };
            state.record.content.size = size;
            state.file.dirty = true;
            also(&mut state.record);
            Ok(cut)
        })
    }

    /// Makes holes of what lies behind `size` in the chunk that `size` falls into, and zeros of the rest of its
    /// block: extending the file again must not show it.
    fn clear_tail(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        key: Option<&FileKey>,
        size: u64,
    ) -> Result<()> {
        let Range { start, .. } = blocks_within(size..u64::MAX);
        let keep = (start % CHUNK_BLOCKS as u64) as usize;
        if keep != 0 {
            self.clear_blocks(node, state, start / CHUNK_BLOCKS as u64, keep..CHUNK_BLOCKS)?;
        }
        match key {
            Some(key) => {
                let within = (size % BLOCK_U64) as usize;
                self.zero_within(node, state, key, size / BLOCK_U64, within..BLOCK, size)
            }
            None => Ok(()),
        }
    }

    /// fallocate(2).
    pub(crate) fn fallocate(&self, node: &Arc<Node>, how: Fallocate, offset: u64, length: u64) -> Result<()> {
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= FILE_BYTES_MAX)
            .ok_or(Error::Posix(libc::EFBIG))?;
        if length == 0 {
            return Err(Error::Posix(libc::EINVAL));
        }
        match how {
            Fallocate::PunchHole => self.punch(node, offset..end),
            Fallocate::Allocate { keep_size } => self.allocate(node, offset..end, keep_size),
            Fallocate::ZeroRange { keep_size } => {
                self.punch(node, offset..end)?;
                self.allocate(node, offset..end, keep_size)
            }
        }
    }

    fn punch(&self, node: &Arc<Node>, range: Range<u64>) -> Result<()> {
        let key = self.file_key(node)?;
        self.restructure(node, |state| {
            let size = state.record.content.size;
            let whole = blocks_within(range.clone());
            if whole.is_empty() && range.start / BLOCK_U64 == (range.end - 1) / BLOCK_U64 {
                let bytes = (range.start % BLOCK_U64) as usize..((range.end - 1) % BLOCK_U64) as usize + 1;
                self.zero_within(node, state, &key, range.start / BLOCK_U64, bytes, size)?;
            } else {
                if !range.start.is_multiple_of(BLOCK_U64) {
                    let from = (range.start % BLOCK_U64) as usize;
                    self.zero_within(node, state, &key, range.start / BLOCK_U64, from..BLOCK, size)?;
                }
                if !range.end.is_multiple_of(BLOCK_U64) {
                    let to = (range.end % BLOCK_U64) as usize;
                    self.zero_within(node, state, &key, range.end / BLOCK_U64, 0..to, size)?;
                }
            }
            let chunks = whole.start.div_ceil(CHUNK_BLOCKS as u64)..whole.end / CHUNK_BLOCKS as u64;
            for (index, blocks) in edges(&whole) {
                self.clear_blocks(node, state, index, blocks)?;
            }
            let now = self.now();
            state.record.mtime = now;
            state.record.ctime = now;
            state.file.dirty = true;
            Ok(if chunks.is_empty() { 0..0 } else { chunks })
        })
    }

    fn allocate(&self, node: &Arc<Node>, range: Range<u64>, keep_size: bool) -> Result<()> {
        let mut chunk = range.start / CHUNK_U64;
        let last = (range.end - 1) / CHUNK_U64;
        while chunk <= last {
            let group = chunk..(chunk + ALLOCATE_CHUNKS_MAX).min(last + 1);
            chunk = group.end;
            let is_last = chunk > last;
            self.go_on()?;
            if self.take_room((group.end - group.start) as usize * CHUNK)? != Room::Plenty {
                return Err(Error::Posix(libc::ENOSPC));
            }
            self.restructure(node, |state| {
                for index in group.clone() {
                    self.allocate_in_chunk(node, state, index, &range)?;
                }
                if is_last {
                    let size = &mut state.record.content.size;
                    if !keep_size {
                        *size = (*size).max(range.end);
                    }
                    state.record.ctime = self.now();
                }
                state.file.dirty = true;
                Ok(0..0)
            })?;
        }
        Ok(())
    }

    fn allocate_in_chunk(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        index: u64,
        range: &Range<u64>,
    ) -> Result<()> {
        let first = index.saturating_mul(CHUNK_BLOCKS as u64);
        let from = (range.start / BLOCK_U64).max(first) - first;
        let to = range.end.div_ceil(BLOCK_U64).min(first + CHUNK_BLOCKS as u64) - first;
        let small = is_small(state, state.record.content.size.max(range.end));
        self.with_pending(node, state, index, |state, pending, index| {
            let mut changed = false;
            for at in from as usize..to as usize {
                if pending.chunk.block(at) == Block::Hole {
                    pending.chunk.set(at, Block::Unwritten);
                    pending.touched |= 1 << at;
                    changed = true;
                }
            }
            if !changed || small {
                return Ok(());
            }
            if let Some(run) = pending.chunk.run {
                return self.slot_file(node, state)?.reserve(run);
            }
            let (run, file) = self.allocate_run(node, state, index)?;
            if let Err(error) = file.reserve(run) {
                self.return_run(node, state, run);
                return Err(error);
            }
            pending.chunk.run = Some(run);
            Ok(())
        })
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`. What fallocate reserved counts as a hole, as in ext4.
    pub(crate) fn seek(&self, node: &Arc<Node>, offset: u64, what: Seek) -> Result<u64> {
        let state = node.state.read();
        let size = state.record.content.size;
        if offset >= size {
            return Err(Error::Posix(libc::ENXIO));
        }
        let mut block = offset / BLOCK_U64;
        while block.saturating_mul(BLOCK_U64) < size {
            let chunk = block / CHUNK_BLOCKS as u64;
            let Some(next) = self.next_chunk(node, &state, chunk)? else {
                break;
            };
            if next > chunk {
                if what == Seek::Hole {
                    return Ok(offset.max(block * BLOCK_U64));
                }
                block = next.saturating_mul(CHUNK_BLOCKS as u64);
                continue;
            }
            while block / CHUNK_BLOCKS as u64 == chunk {
                if self.block_at(node, &state, block)?.is_data() == (what == Seek::Data) {
                    let found = offset.max(block * BLOCK_U64);
                    // Behind the last block there is only the hole at the end.
                    return match what {
                        Seek::Data if found >= size => Err(Error::Posix(libc::ENXIO)),
                        Seek::Hole => Ok(found.min(size)),
                        Seek::Data => Ok(found),
                    };
                }
                block += 1;
            }
        }
        match what {
            Seek::Data => Err(Error::Posix(libc::ENXIO)),
            Seek::Hole => Ok(offset.max(block.saturating_mul(BLOCK_U64)).min(size)),
        }
    }

    /// The first chunk from `chunk` on that is pending or published.
    fn next_chunk(&self, node: &Node, state: &NodeState, chunk: u64) -> Result<Option<u64>> {
        let pending = state.file.pending.range(chunk..).next().map(|(index, _)| *index);
        if pending == Some(chunk) {
            return Ok(pending);
        }
        let mut published = None;
        let (from, to) = (rowkey::chunk(node.ino, chunk), rowkey::chunk(node.ino, u64::MAX));
        self.store.scan(Family::Meta, &from, &to, |key, _| {
            published = rowkey::last_number(key);
            Ok(false)
        })?;
        Ok(pending.into_iter().chain(published).min())
    }

    /// copy_file_range(2). Returns the bytes copied: fewer than asked for at the end of the source.
    pub(crate) fn copy_range(
        &self,
        from: (&Arc<Node>, u64),
        to: (&Arc<Node>, u64),
        length: u64,
    ) -> Result<u64> {
        let same = from.0.ino == to.0.ino;
        if same && from.1 < to.1.saturating_add(length) && to.1 < from.1.saturating_add(length) {
            return Err(Error::Posix(libc::EINVAL));
        }
        let mut buffer = zeroize::Zeroizing::new(vec![0; COPY_BYTES]);
        let mut copied = 0;
        while copied < length {
            let want = usize::try_from(length - copied)
                .unwrap_or(usize::MAX)
                .min(COPY_BYTES);
            let part = buffer.get_mut(..want).unwrap_or_default();
            let written = self
                .read(from.0, from.1.saturating_add(copied), part)
                .and_then(|count| {
                    let part = part.get(..count).unwrap_or_default();
                    self.write(to.0, to.1.saturating_add(copied), part, Some(self.now()))
                        .map(|written| written.count)
                });
            match written {
                // What was copied has to be told: the kernel drops the pages of that much of the target.
                Err(error) if copied == 0 => return Err(error),
                Ok(written) => copied = copied.saturating_add(written as u64),
                Err(_) => break,
            }
            if written != Ok(want) {
                break;
            }
        }
        Ok(copied)
    }
}

/// # Errors
/// EFBIG for a size that no file may have.
pub(crate) fn check_size(size: u64) -> Result<()> {
    if size > FILE_BYTES_MAX {
        return Err(Error::Posix(libc::EFBIG));
    }
    Ok(())
}

/// The blocks that lie wholly within a range of bytes.
fn blocks_within(bytes: Range<u64>) -> Range<u64> {
    bytes.start.div_ceil(BLOCK_U64)..bytes.end / BLOCK_U64
}

/// The parts of a range of blocks that are no whole chunks: per chunk, its index and the blocks in it.
fn edges(blocks: &Range<u64>) -> Vec<(u64, Range<usize>)> {
    const N: u64 = CHUNK_BLOCKS as u64;
    let mut edges = Vec::new();
    if blocks.is_empty() {
        return edges;
    }
    let (first, last) = (blocks.start / N, (blocks.end - 1) / N);
    for index in [first, last] {
        let from = blocks.start.max(index * N) - index * N;
        let to = blocks.end.min((index + 1) * N) - index * N;
        let is_whole = from == 0 && to == N;
        if !is_whole && edges.last().is_none_or(|(other, _)| *other != index) {
            edges.push((index, from as usize..to as usize));
        }
    }
    edges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_leave_out_whole_chunks() {
        assert_eq!(edges(&(0..0)), []);
        assert_eq!(edges(&(0..32)), []);
        assert_eq!(edges(&(3..9)), [(0, 3..9)]);
        assert_eq!(edges(&(3..32)), [(0, 3..32)]);
        assert_eq!(edges(&(3..97)), [(0, 3..32), (3, 0..1)]);
        assert_eq!(edges(&(32..64)), []);
    }
}
