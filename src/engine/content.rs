//! Content of regular files: reading, writing, and where a block is placed.
//!
//! A block is written to its slot if no record that may survive a crash names that slot; else inline, or, if its
//! whole chunk is overwritten, to a fresh run. Files up to [`INLINE_BYTES_MAX`] stay inline.

use super::chunkcache::PublishedChunk;
use super::core::Access;
use super::error::{Error, Result};
use super::format::chunk::{BLOCK, Block, CHUNK, CHUNK_BLOCKS, Chunk};
use super::format::rowkey::{self, Family};
use super::format::seal::Seal;
use super::keys::FileKey;
use super::node::{Node, NodeState, PendingChunk};
use super::space::Room;
use super::types::{Ino, Timestamp};
use std::ops::Range;
use std::sync::Arc;

/// Files up to this many bytes live in the database.
pub(crate) const INLINE_BYTES_MAX: u64 = 32 << 10;
/// Largest file, in bytes: the kernel's own limit. With a lower one it would take in what could not be stored.
pub(crate) const FILE_BYTES_MAX: u64 = i64::MAX as u64;

const BLOCK_U64: u64 = BLOCK as u64;

/// How one block was sealed: its seal and the bytes of plaintext it covers.
type SealedBlock = (Seal, u16);

/// A chunk as readers see it: pending content first.
enum View<'s> {
    Pending(&'s PendingChunk),
    Published(Arc<PublishedChunk>),
}

impl View<'_> {
    fn block(&self, index: usize) -> Block {
        match self {
            Self::Pending(pending) => pending.chunk.block(index),
            Self::Published(chunk) => chunk.block(index),
        }
    }

    fn run(&self) -> Option<u64> {
        match self {
            Self::Pending(pending) => pending.chunk.run,
            Self::Published(chunk) => chunk.run,
        }
    }

    fn body(&self, index: usize) -> Option<&[u8]> {
        match self {
            Self::Pending(pending) => pending.bodies.get(&index).map(|body| &**body),
            Self::Published(_) => None,
        }
    }
}

/// How far a write got.
pub(crate) struct Written {
    /// Bytes taken in.
    pub(crate) count: usize,
    /// Why not all of them.
    pub(crate) stopped: Option<Error>,
}

/// The blocks that a write touches: a buffer of whole blocks, and the bytes of it that are the write's.
struct Incoming {
    first: u64,
    buffer: Vec<u8>,
    written: Range<usize>,
    sealed: Vec<Option<SealedBlock>>,
}

impl Incoming {
    fn new(offset: u64, data: &[u8]) -> Self {
        let skip = (offset % BLOCK_U64) as usize;
        let written = skip..skip.saturating_add(data.len());
        let count = written.end.div_ceil(BLOCK);
        let mut buffer = vec![0; count * BLOCK];
        if let Some(place) = buffer.get_mut(written.clone()) {
            place.copy_from_slice(data);
        }
        Self {
            first: offset / BLOCK_U64,
            buffer,
            written,
            sealed: vec![None; count],
        }
    }

    /// Seals the blocks that are overwritten whole, which needs no lock.
    fn seal_whole_blocks(&mut self, access: &Access<'_>, key: &FileKey) -> Result<()> {
        let key = key.blocks();
        let blocks = self
            .buffer
            .chunks_exact_mut(BLOCK)
            .zip(&mut self.sealed)
            .zip(self.first..);
        for (index, ((data, sealed), block)) in blocks.enumerate() {
            let bytes = index * BLOCK..(index + 1) * BLOCK;
            if self.written.start <= bytes.start && bytes.end <= self.written.end {
                *sealed = Some((key.seal(access.nonce()?, block, data)?, BLOCK as u16));
            }
        }
        Ok(())
    }
}

impl Access<'_> {
    pub(crate) fn published_chunk(
        &self,
        node: &Node,
        state: &NodeState,
        index: u64,
    ) -> Result<Arc<PublishedChunk>> {
        let generation = state.file.generation;
        if let Some(chunk) = self.chunks.get(generation, index) {
            return Ok(chunk);
        }
        if state.published.blocks == 0 {
            return Ok(Arc::default());
        }
        let key = rowkey::chunk(node.ino, index);
        let chunk = match self.store.get(Family::Meta, &key)? {
            Some(sealed) => {
                let chunk = self.open_chunk(node.ino, &key, &sealed)?;
                PublishedChunk::new(chunk, Seal::of_row(&sealed))
            }
            None => Arc::default(),
        };
        self.chunks.put(generation, index, Arc::clone(&chunk));
        Ok(chunk)
    }

    pub(crate) fn open_chunk(&self, ino: Ino, key: &[u8], sealed: &[u8]) -> Result<Chunk> {
        Chunk::decode(&self.open_row(ino, key, sealed)?).map_err(|_| Error::corrupt_inode(ino))
    }

    fn view<'s>(&self, node: &Node, state: &'s NodeState, index: u64) -> Result<View<'s>> {
        match state.file.pending.get(&index) {
            Some(pending) => Ok(View::Pending(pending)),
            None => Ok(View::Published(self.published_chunk(node, state, index)?)),
        }
    }

    /// Reads up to `into.len()` bytes; fewer only at the end of the file.
    pub(crate) fn read(&self, node: &Arc<Node>, offset: u64, into: &mut [u8]) -> Result<usize> {
        if into.is_empty() || offset >= node.state.read().record.content.size {
            return Ok(0);
        }
        let key = self.file_key(node)?;
        let state = node.state.read();
        let left = state.record.content.size.saturating_sub(offset);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
        let into = into.get_mut(..count).unwrap_or_default();

        let head = ((BLOCK - (offset % BLOCK_U64) as usize) % BLOCK).min(count);
        let (head, rest) = into.split_at_mut(head);
        let (middle, tail) = rest.split_at_mut(rest.len() / BLOCK * BLOCK);
        let mut at = offset;
        let mut spare = [0; BLOCK];
        if !head.is_empty() {
            self.read_blocks(node, &state, &key, at / BLOCK_U64, &mut spare)?;
            let skip = (at % BLOCK_U64) as usize;
            head.copy_from_slice(spare.get(skip..skip + head.len()).unwrap_or_default());
            at = at.saturating_add(head.len() as u64);
        }
        self.read_blocks(node, &state, &key, at / BLOCK_U64, middle)?;
        at = at.saturating_add(middle.len() as u64);
        if !tail.is_empty() {
            self.read_blocks(node, &state, &key, at / BLOCK_U64, &mut spare)?;
            tail.copy_from_slice(spare.get(..tail.len()).unwrap_or_default());
        }
        Ok(count)
    }

    /// Reads whole blocks from block `first` on. Slots that lie side by side are read in one call, and opened in
    /// place.
    pub(crate) fn read_blocks(
        &self,
        node: &Node,
        state: &NodeState,
        key: &FileKey,
        first: u64,
        into: &mut [u8],
    ) -> Result<()> {
        let mut block = first;
        let mut rest = into;
        while !rest.is_empty() {
            let index = block / CHUNK_BLOCKS as u64;
            let start = (block % CHUNK_BLOCKS as u64) as usize;
            let count = (rest.len() / BLOCK).min(CHUNK_BLOCKS - start);
            let (part, tail) = rest.split_at_mut(count * BLOCK);
            let view = self.view(node, state, index)?;
            self.read_chunk(node, &view, key, index, start, part)?;
            rest = tail;
            block = block.saturating_add(count as u64);
        }
        Ok(())
    }

    fn read_chunk(
        &self,
        node: &Node,
        view: &View<'_>,
        key: &FileKey,
        chunk: u64,
        start: usize,
        into: &mut [u8],
    ) -> Result<()> {
        let first = chunk.saturating_mul(CHUNK_BLOCKS as u64);
        let is_slot = |index: usize| matches!(view.block(index), Block::Slot(_));
        let end = start + into.len() / BLOCK;
        let mut index = start;
        let key = key.blocks();
        while index < end {
            let alike = (index..end)
                .take_while(|other| is_slot(*other) == is_slot(index))
                .count();
            let part = into
                .get_mut((index - start) * BLOCK..(index - start + alike) * BLOCK)
                .unwrap_or_default();
            if is_slot(index) {
                let run = view.run().ok_or_else(|| Error::corrupt_inode(node.ino))?;
                self.slots
                    .existing(node.ino)?
                    .read(node.ino, slot_offset(run, index), part)?;
            }
            for (data, at) in part.chunks_exact_mut(BLOCK).zip(index..) {
                let number = first + at as u64;
                match view.block(at) {
                    Block::Hole | Block::Unwritten => data.fill(0),
                    Block::Slot(seal) => key.open(seal, number, data)?,
                    Block::Inline { seal, length } => {
                        let (body, zeros) = data.split_at_mut(usize::from(length));
                        match view.body(at) {
                            Some(pending) => copy_body(node.ino, body, pending)?,
                            None => copy_body(node.ino, body, &self.inline_body(node.ino, number)?)?,
                        }
                        key.open(seal, number, body)?;
                        zeros.fill(0);
                    }
                }
            }
            index += alike;
        }
        Ok(())
    }

    /// The ciphertext of a published inline block.
    pub(crate) fn inline_body(&self, ino: Ino, block: u64) -> Result<Vec<u8>> {
        let body = self.store.get(Family::Content, &rowkey::content(ino, block))?;
        body.ok_or_else(|| Error::Corrupt {
            what: format!("block {block} of inode {}", ino.0),
        })
    }

    /// Writes `data` at `offset`; the size grows with it, and the file's times become `stamp`.
    ///
    /// # Errors
    /// If not even the first bytes could be taken in.
    pub(crate) fn write(
        &self,
        node: &Arc<Node>,
        offset: u64,
        data: &[u8],
        stamp: Option<Timestamp>,
    ) -> Result<Written> {
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or(Error::Posix(libc::EFBIG))?;
        if data.is_empty() {
            return Ok(Written {
                count: 0,
                stopped: None,
            });
        }
        self.committer.check()?;
        let key = self.file_key(node)?;
        let mut incoming = Incoming::new(offset, data);
        incoming.seal_whole_blocks(self, &key)?;
        let (reached, stopped) = {
            let mut state = node.state.write();
            let reached = self.take_in(node, &mut state, &key, incoming, end)?;
            if let Some(now) = stamp {
                state.record.mtime = now;
                state.record.ctime = now;
            }
            reached
        };
        if self.active.is_over_budget() {
            self.publish(node)?;
        }
        let count = usize::try_from(reached.saturating_sub(offset)).unwrap_or(usize::MAX);
        Ok(Written {
            count: count.min(data.len()),
            stopped,
        })
    }

    /// Takes blocks into the pending content. Returns the offset up to which it got, and what stopped it there.
    fn take_in(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        key: &FileKey,
        mut incoming: Incoming,
        end: u64,
    ) -> Result<(u64, Option<Error>)> {
        if state.file.poisoned {
            return Err(Error::Poisoned);
        }
        let size = state.record.content.size.max(end);
        let small = is_small(state, size);
        let first = incoming.first;
        match self.take_room(incoming.buffer.len())? {
            Room::Plenty => {}
            Room::Low => self.refuse_holes(node, state, first..first + incoming.sealed.len() as u64)?,
            Room::Reserve => return Err(Error::Posix(libc::ENOSPC)),
        }
        let mut sealed = Vec::with_capacity(incoming.sealed.len());
        let mut spare = [0; BLOCK];
        let blocks = incoming.buffer.chunks_exact_mut(BLOCK).zip(&incoming.sealed);
        for (index, (data, done)) in blocks.enumerate() {
            let number = first + index as u64;
            sealed.push(match done {
                Some(done) => *done,
                None => {
                    // A partial block keeps what it had around the bytes written.
                    self.read_blocks(node, state, key, number, &mut spare)?;
                    let written = incoming.written.start.saturating_sub(index * BLOCK)
                        ..(incoming.written.end - index * BLOCK).min(BLOCK);
                    if let (Some(to), Some(from)) = (spare.get_mut(written.clone()), data.get(written)) {
                        to.copy_from_slice(from);
                    }
                    data.copy_from_slice(&spare);
                    self.seal_block(key, number, data, small, size)?
                }
            });
        }
        let last = state.record.content.size / BLOCK_U64;
        let last_before = self.block_at(node, state, last)?;
        let (placed, stopped) = self.place_all(node, state, first, &incoming.buffer, &sealed, small);
        let reached = (first + placed as u64).saturating_mul(BLOCK_U64).min(end);
        if placed > 0 || stopped.is_some() {
            let mut size = state.record.content.size.max(reached);
            if stopped.is_some() && self.block_at(node, state, last)? != last_before {
                // The file's last block was taken in though others before it were not: so is its end.
                size = size.max((last + 1).saturating_mul(BLOCK_U64).min(end));
            }
            state.record.content.size = size;
            state.file.dirty = true;
            state.file.written = Some(self.clock.monotonic());
            self.active.add(node, state);
        }
        match stopped {
            Some(error) if placed == 0 => Err(error),
            stopped => Ok((reached, stopped)),
        }
    }

    /// On a host without room for more, only what has its place is written again.
    fn refuse_holes(&self, node: &Node, state: &NodeState, blocks: Range<u64>) -> Result<()> {
        for block in blocks {
            if self.block_at(node, state, block)? == Block::Hole {
                return Err(Error::Posix(libc::ENOSPC));
            }
        }
        Ok(())
    }

    /// Seals one block; the last one of a small file only as far as the file goes.
    fn seal_block(
        &self,
        key: &FileKey,
        number: u64,
        data: &mut [u8],
        small: bool,
        size: u64,
    ) -> Result<SealedBlock> {
        let left = size
            .saturating_sub(number.saturating_mul(BLOCK_U64))
            .clamp(1, BLOCK_U64);
        let length = if small { left as usize } else { BLOCK };
        let body = data.get_mut(..length).unwrap_or_default();
        Ok((key.blocks().seal(self.nonce()?, number, body)?, length as u16))
    }

    /// Places sealed blocks chunk by chunk; says how many blocks were placed, and what stopped it.
    fn place_all(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        first: u64,
        cipher: &[u8],
        sealed: &[SealedBlock],
        small: bool,
    ) -> (usize, Option<Error>) {
        let mut done = 0;
        while done < sealed.len() {
            let block = first + done as u64;
            let start = (block % CHUNK_BLOCKS as u64) as usize;
            let count = (sealed.len() - done).min(CHUNK_BLOCKS - start);
            let part = cipher
                .get(done * BLOCK..(done + count) * BLOCK)
                .unwrap_or_default();
            let seals = sealed.get(done..done + count).unwrap_or_default();
            let placed = self.with_pending(
                node,
                state,
                block / CHUNK_BLOCKS as u64,
                |state, pending, index| {
                    self.place_in_chunk(node, state, pending, index, start, part, seals, small)
                },
            );
            if let Err(error) = placed {
                return (done, Some(error));
            }
            done += count;
        }
        (done, None)
    }

    /// Lets `change` alter a pending chunk, loaded if it was not pending, and keeps the counts that follow from it.
    pub(crate) fn with_pending(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        index: u64,
        change: impl FnOnce(&mut NodeState, &mut PendingChunk, u64) -> Result<()>,
    ) -> Result<()> {
        let known = state.file.pending.remove(&index);
        let was_pending = known.is_some();
        let mut pending = match known {
            Some(pending) => pending,
            None => {
                let chunk = self.published_chunk(node, state, index)?;
                if chunk.run.is_some() && chunk.is_drainable() {
                    state.file.drainable.insert(index);
                }
                Box::new(PendingChunk::new(chunk.chunk().clone()))
            }
        };
        let (blocks, run) = (pending.chunk.allocated(), pending.chunk.run);
        let outcome = change(state, &mut pending, index);
        if outcome.is_err() && !was_pending && pending.touched == 0 {
            return outcome;
        }
        let content = &mut state.record.content;
        content.blocks = content
            .blocks
            .saturating_add(pending.chunk.allocated())
            .saturating_sub(blocks);
        let runs = u64::from(pending.chunk.run.is_some());
        content.runs = content
            .runs
            .saturating_add(runs)
            .saturating_sub(u64::from(run.is_some()));
        let weight = pending.weight();
        self.active.account(pending.accounted, weight);
        pending.accounted = weight;
        state.file.pending.insert(index, pending);
        outcome
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one chunk's part of a write, called in one place"
    )]
    fn place_in_chunk(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        pending: &mut PendingChunk,
        index: u64,
        start: usize,
        cipher: &[u8],
        sealed: &[SealedBlock],
        small: bool,
    ) -> Result<()> {
        let slots = if small && pending.chunk.run.is_none() {
            0
        } else {
            self.write_to_slots(node, state, pending, index, start, cipher, sealed)?
        };
        let blocks = start..start + sealed.len();
        for ((at, data), &(seal, length)) in blocks.zip(cipher.chunks_exact(BLOCK)).zip(sealed) {
            if bit(slots, at) {
                pending.bodies.remove(&at);
                pending.chunk.set(at, Block::Slot(seal));
            } else {
                let body = data.get(..usize::from(length)).unwrap_or_default();
                pending.bodies.insert(at, body.into());
                pending.chunk.set(at, Block::Inline { seal, length });
            }
            pending.touched |= 1 << at;
        }
        Ok(())
    }

    /// Writes the blocks that may go to slots, and says which those are. A whole chunk some of whose slots may not be
    /// written goes to a fresh run; where there is no room for one, the others go inline.
    #[expect(
        clippy::too_many_arguments,
        reason = "one chunk's part of a write, called in one place"
    )]
    fn write_to_slots(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        pending: &mut PendingChunk,
        index: u64,
        start: usize,
        cipher: &[u8],
        sealed: &[SealedBlock],
    ) -> Result<u32> {
        let Some(run) = pending.chunk.run else {
            self.write_fresh_run(node, state, pending, index, start, cipher)?;
            return Ok(u32::MAX);
        };
        let named = pending.protected | self.busy_slots(state, index, Some(run));
        if sealed.len() == CHUNK_BLOCKS && named != 0 {
            match self.write_fresh_run(node, state, pending, index, start, cipher) {
                Err(error) if error.is_no_room() => {}
                outcome => return outcome.map(|()| u32::MAX),
            }
        }
        let file = self.slot_file(node, state)?;
        let end = start + sealed.len();
        let mut at = start;
        while at < end {
            let alike = (at..end)
                .take_while(|other| bit(named, *other) == bit(named, at))
                .count();
            if !bit(named, at) {
                let part = cipher
                    .get((at - start) * BLOCK..(at - start + alike) * BLOCK)
                    .unwrap_or_default();
                state.file.slots_dirty = true;
                if let Err(error) = file.write(slot_offset(run, at), part) {
                    rescue(pending, start..at + alike, cipher, sealed);
                    return Err(error);
                }
            }
            at += alike;
        }
        Ok(!named)
    }

    /// Writes blocks of a chunk to a run that no record names, which becomes the chunk's.
    fn write_fresh_run(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        pending: &mut PendingChunk,
        index: u64,
        start: usize,
        cipher: &[u8],
    ) -> Result<()> {
        let (run, file) = self.allocate_run(node, state, index)?;
        if let Err(error) = file.write(slot_offset(run, start), cipher) {
            self.return_run(node, state, run);
            return Err(error);
        }
        state.file.slots_dirty = true;
        pending.chunk.run = Some(run);
        pending.protected = 0;
        Ok(())
    }

    /// Slots of the chunk's run that a record superseded by one not yet durable names.
    pub(crate) fn busy_slots(&self, state: &NodeState, index: u64, run: Option<u64>) -> u32 {
        match state.file.busy.get(&index) {
            Some(busy) if Some(busy.run) == run && !self.committer.is_durable(busy.until) => busy.slots,
            _ => 0,
        }
    }

    /// Turns the blocks of one chunk into holes.
    pub(crate) fn clear_blocks(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        index: u64,
        blocks: Range<usize>,
    ) -> Result<()> {
        self.with_pending(node, state, index, |_, pending, _| {
            for at in blocks {
                pending.bodies.remove(&at);
                pending.chunk.set(at, Block::Hole);
                pending.touched |= 1 << at;
            }
            Ok(())
        })
    }

    /// Zeroes bytes within one block, if it holds any data; `size` is what the file will have.
    pub(crate) fn zero_within(
        &self,
        node: &Arc<Node>,
        state: &mut NodeState,
        key: &FileKey,
        number: u64,
        bytes: Range<usize>,
        size: u64,
    ) -> Result<()> {
        if !self.block_at(node, state, number)?.is_data() {
            return Ok(());
        }
        let mut data = [0; BLOCK];
        self.read_blocks(node, state, key, number, &mut data)?;
        data.get_mut(bytes).unwrap_or_default().fill(0);
        let small = is_small(state, size);
        let sealed = self.seal_block(key, number, &mut data, small, size)?;
        match self.place_all(node, state, number, &data, &[sealed], small) {
            (_, Some(error)) => Err(error),
            (_, None) => Ok(()),
        }
    }

    /// What block `number` is.
    pub(crate) fn block_at(&self, node: &Node, state: &NodeState, number: u64) -> Result<Block> {
        let view = self.view(node, state, number / CHUNK_BLOCKS as u64)?;
        Ok(view.block((number % CHUNK_BLOCKS as u64) as usize))
    }
}

/// Whether a file of `size` bytes stays inline.
pub(crate) fn is_small(state: &NodeState, size: u64) -> bool {
    size <= INLINE_BYTES_MAX && state.record.content.runs == 0
}

pub(crate) fn slot_offset(run: u64, index: usize) -> u64 {
    run.saturating_mul(CHUNK as u64)
        .saturating_add((index * BLOCK) as u64)
}

/// After a write to slots failed: those of them that the pending chunk named may hold what was there, the new block or half
/// of it. The new blocks are kept inline instead, so that each is one of its versions. What was named by no record, and
/// lies perhaps behind the end of the file, stays as it was.
fn rescue(pending: &mut PendingChunk, blocks: Range<usize>, cipher: &[u8], sealed: &[SealedBlock]) {
    for ((at, data), &(seal, length)) in blocks.zip(cipher.chunks_exact(BLOCK)).zip(sealed) {
        if matches!(pending.chunk.block(at), Block::Slot(_)) && !bit(pending.protected, at) {
            let body = data.get(..usize::from(length)).unwrap_or_default();
            pending.bodies.insert(at, body.into());
            pending.chunk.set(at, Block::Inline { seal, length });
            pending.touched |= 1 << at;
        }
    }
}

fn bit(mask: u32, index: usize) -> bool {
    mask & (1 << index) != 0
}

fn copy_body(ino: Ino, into: &mut [u8], body: &[u8]) -> Result<()> {
    if into.len() != body.len() {
        return Err(Error::corrupt_inode(ino));
    }
    into.copy_from_slice(body);
    Ok(())
}
