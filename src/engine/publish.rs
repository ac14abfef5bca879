//! From pending to published: what a file holds in memory becomes rows in one batch (rules R1, R2 and R6).
//!
//! A publish freezes a snapshot under the node's lock, lets go of it to sync the slots, and takes it again to
//! commit. Content written meanwhile stays pending. Holding [`Publishing`] means that no other publish, cut or
//! drain of the file is under way.

use super::batch::Batch;
use super::chunkcache::PublishedChunk;
use super::commit::Seq;
use super::core::{Access, Core};
use super::error::{Error, Result};
use super::format::chunk::{Block, CHUNK_BLOCKS, Chunk};
use super::format::inode::{ContentState, InodeRecord};
use super::format::rowkey::{self, Family};
use super::format::seal::Seal;
use super::node::{BusySlots, Node, NodeState, PendingChunk, next_generation, slot_mask};
use super::runs::PAGE_RUNS;
use super::slots::SlotFile;
use super::sync::MutexGuard;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Chunks beyond which a cut deletes by range: range tombstones cost every later read of the family.
const CUT_BY_ROW_MAX: usize = 8;

/// Runs at their chunk's own place reach this far: 8 TiB, half of what ext4 allows a file.
const PREFERRED_RUNS_MAX: u64 = 1 << 26;

/// The right to publish one file.
pub(crate) struct Publishing<'n> {
    pub(crate) node: &'n Arc<Node>,
    _lock: MutexGuard<'n, ()>,
}

impl<'n> Publishing<'n> {
    pub(crate) fn begin(node: &'n Arc<Node>) -> Self {
        Self {
            node,
            _lock: node.publishing.lock(),
        }
    }
}

struct FrozenChunk {
    chunk: Chunk,
    bodies: BTreeMap<usize, Arc<[u8]>>,
}

/// A snapshot of what is to be published.
struct Frozen {
    chunks: BTreeMap<u64, FrozenChunk>,
    content: ContentState,
}

/// Whole chunks that are to be deleted with the next publish.
#[derive(Default)]
pub(crate) struct Cut {
    pub(crate) batch: Batch,
    pub(crate) freed: Vec<u64>,
    blocks: u64,
}

impl Core {
    /// Takes the pending chunks away.
    pub(crate) fn take_pending(&self, state: &mut NodeState) -> BTreeMap<u64, Box<PendingChunk>> {
        state.file.dirty = false;
        let pending = std::mem::take(&mut state.file.pending);
        for chunk in pending.values() {
            self.active.account(chunk.accounted, 0);
        }
        pending
    }
}

impl Access<'_> {
    /// Publishes what the file holds. A no-op for other kinds and for files with nothing pending.
    pub(crate) fn publish(&self, node: &Arc<Node>) -> Result<()> {
        self.publish_pending(&Publishing::begin(node))
    }

    /// The same for the timer: what found no room is tried again when there is more.
    pub(crate) fn publish_if_it_may_fit(&self, node: &Arc<Node>, free: u64) -> Result<()> {
        let refused = node.state.read().file.refused;
        match refused.is_some_and(|had| free <= had) {
            true => Ok(()),
            false => self.publish(node),
        }
    }

    /// The same, for a caller that goes on publishing.
    pub(crate) fn publish_pending(&self, right: &Publishing<'_>) -> Result<()> {
        let node = right.node;
        let frozen = {
            let mut state = node.state.write();
            refuse_poisoned(&state)?;
            if !state.file.dirty {
                return Ok(());
            }
            let must_sync = std::mem::take(&mut state.file.slots_dirty);
            let frozen = freeze(&mut state);
            drop(state);
            if must_sync {
                self.sync_slots(node)?;
            }
            frozen
        };
        self.complete(node, &mut node.state.write(), frozen, Cut::default())
    }

    /// Changes a file whose pending content is published first (rule R3), and publishes the change at once.
    /// `change` may alter the live record and pending chunks, and names whole chunks to delete besides. When it
    /// fails, or its publish, nothing has changed.
    pub(crate) fn restructure(
        &self,
        node: &Arc<Node>,
        change: impl FnOnce(&mut NodeState) -> Result<Range<u64>>,
    ) -> Result<()> {
        let right = Publishing::begin(node);
        self.publish_pending(&right)?;
        let mut state = node.state.write();
        // What was written since is published under the lock: from here on nothing comes between.
        self.publish_locked(node, &mut state, 0..0)?;
        let before = state.record.clone();
        let outcome = change(&mut state).and_then(|cut| self.publish_locked(node, &mut state, cut));
        if outcome.is_err() {
            state.record = before;
            self.discard_pending(node, &mut state);
        }
        outcome
    }

    fn publish_locked(&self, node: &Arc<Node>, state: &mut NodeState, cut: Range<u64>) -> Result<()> {
        refuse_poisoned(state)?;
        if !state.file.dirty && cut.is_empty() {
            return Ok(());
        }
        let cut = self.cut(node, state, cut)?;
        if std::mem::take(&mut state.file.slots_dirty) {
            self.sync_slots_of(node, state)?;
        }
        let frozen = freeze(state);
        self.complete(node, state, frozen, cut)
    }

    pub(crate) fn sync_slots(&self, node: &Arc<Node>) -> Result<()> {
        self.slots
            .existing(node.ino)
            .and_then(|file| file.sync())
            .inspect_err(|error| {
                self.poison(node, &mut node.state.write(), error);
            })
    }

    fn sync_slots_of(&self, node: &Arc<Node>, state: &mut NodeState) -> Result<()> {
        self.slots
            .existing(node.ino)
            .and_then(|file| file.sync())
            .inspect_err(|error| {
                self.poison(node, state, error);
            })
    }

    /// Rule R6: the kernel may have dropped the pages it failed to write, so no later sync of them means anything.
    fn poison(&self, node: &Arc<Node>, state: &mut NodeState, error: &Error) {
        tracing::error!(inode = node.ino.0, %error, "a sync failed; the file accepts no more changes");
        state.file.poisoned = true;
        self.poisoned.lock().insert(node.ino);
        self.active.add(node, state);
    }

    /// Forgets the pending chunks of a change that is not to be, and gives back the runs that they took.
    fn discard_pending(&self, node: &Arc<Node>, state: &mut NodeState) {
        for (index, discarded) in self.take_pending(state) {
            // What cannot be read is taken to name the run: a leak is the safe side.
            let published = self.published_chunk(node, state, index).map(|chunk| chunk.run);
            if let (Some(run), Ok(published)) = (discarded.chunk.run, published)
                && published != Some(run)
            {
                self.return_run(node, state, run);
            }
        }
    }

    /// Gives back a run that no commit ever named, and its space to the host.
    pub(crate) fn return_run(&self, node: &Node, state: &mut NodeState, run: u64) {
        state.file.runs.give_back(run);
        let punched = self.slot_file(node, state).and_then(|file| file.punch(run));
        if let Err(error) = punched {
            tracing::warn!(inode = node.ino.0, %error, "the space of a run was not given back to the host");
        }
    }

    /// Prepares the deletion of the published chunks in `range`, none of which is pending.
    pub(crate) fn cut(&self, node: &Arc<Node>, state: &mut NodeState, range: Range<u64>) -> Result<Cut> {
        let mut cut = Cut::default();
        if range.is_empty() {
            return Ok(cut);
        }
        let ino = node.ino;
        let mut rows = Vec::new();
        let (from, to) = (rowkey::chunk(ino, range.start), rowkey::chunk(ino, range.end));
        self.store.scan(Family::Meta, &from, &to, |key, sealed| {
            self.go_on()?;
            let chunk = self.open_chunk(ino, key, sealed)?;
            self.note_replaced(&mut cut.batch, key, Seal::of_row(sealed).as_ref(), None)?;
            let index = rowkey::last_number(key).unwrap_or(u64::MAX);
            cut.freed.extend(chunk.run);
            cut.blocks = cut.blocks.saturating_add(chunk.allocated());
            if rows.len() <= CUT_BY_ROW_MAX {
                rows.push((index, chunk));
            }
            Ok(true)
        })?;
        let rows = Some(rows).filter(|rows| rows.len() <= CUT_BY_ROW_MAX);
        delete_chunks(&mut cut.batch, node, range, rows);
        for run in &cut.freed {
            self.load_run_page(node, state, run / PAGE_RUNS)?;
        }
        let content = &mut state.record.content;
        content.blocks = content.blocks.saturating_sub(cut.blocks);
        content.runs = content.runs.saturating_sub(cut.freed.len() as u64);
        // Every cached record of the file is disowned, which costs less than finding those in the range.
        state.file.generation = next_generation();
        state.file.dirty = true;
        Ok(cut)
    }

    /// The deletion of every chunk of a file that is going for good. It needs to know nothing of them, so that neither many
    /// nor damaged ones keep it from going.
    pub(crate) fn erase_chunks(&self, node: &Node) -> Result<Batch> {
        let mut rows = Some(Vec::new());
        let (from, to) = (rowkey::chunk(node.ino, 0), rowkey::chunk(node.ino, u64::MAX));
        self.store.scan(Family::Meta, &from, &to, |key, sealed| {
            rows = rows
                .take()
                .filter(|rows| rows.len() < CUT_BY_ROW_MAX)
                .zip(self.open_chunk(node.ino, key, sealed).ok())
                .map(|(mut rows, chunk)| {
                    rows.push((rowkey::last_number(key).unwrap_or(u64::MAX), chunk));
                    rows
                });
            Ok(rows.is_some())
        })?;
        let mut batch = Batch::default();
        delete_chunks(&mut batch, node, 0..u64::MAX, rows);
        Ok(batch)
    }

    fn complete(&self, node: &Arc<Node>, state: &mut NodeState, frozen: Frozen, cut: Cut) -> Result<()> {
        let outcome = self.commit_frozen(node, state, frozen, cut);
        state.file.refused = match &outcome {
            Err(error) if error.is_no_room() => self.space.free().ok(),
            _ => None,
        };
        outcome.inspect_err(|_| state.file.dirty = true)
    }

    fn commit_frozen(&self, node: &Arc<Node>, state: &mut NodeState, frozen: Frozen, cut: Cut) -> Result<()> {
        let ino = node.ino;
        let Cut {
            mut batch, mut freed, ..
        } = cut;
        let mut added = Vec::new();
        let mut superseded = Vec::new();
        let mut seals = BTreeMap::new();
        for (&index, new) in &frozen.chunks {
            let old = self.published_chunk(node, state, index)?;
            if old.run == new.chunk.run {
                superseded.push((index, new.chunk.run, slot_mask(&old) & !slot_mask(&new.chunk)));
            } else {
                freed.extend(old.run);
                added.extend(new.chunk.run);
            }
            delete_inline(&mut batch, node, index, &old, &new.chunk);
            for (&block, body) in &new.bodies {
                let key = rowkey::content(ino, index.saturating_mul(CHUNK_BLOCKS as u64) + block as u64);
                batch.put(Family::Content, key, body.to_vec());
            }
            let key = rowkey::chunk(ino, index);
            if !new.chunk.is_empty() {
                let seal = self.put_row(&mut batch, key, &new.chunk.encode(), old.seal())?;
                seals.insert(index, seal);
            } else if !old.is_empty() {
                self.delete_row(&mut batch, key, old.seal())?;
            }
        }
        let bitmaps = self.put_bitmaps(node, state, &mut batch, &added, &freed)?;
        batch.count_blocks(node.ino.domain(), state.published.blocks, frozen.content.blocks);
        let record = InodeRecord {
            content: frozen.content,
            ..state.record.clone()
        };
        let stored = self.put_inode(&mut batch, ino, &record, Some(&state.stored))?;

        let seq = self.commit(batch)?;
        state.published = frozen.content;
        state.stored = stored;
        state.file.runs.committed(seq, &added, &freed, &bitmaps);
        for (index, run, slots) in superseded {
            mark_busy(state, index, run, slots, seq);
        }
        for (index, chunk) in frozen.chunks {
            self.unpend(state, index, chunk, seals.remove(&index));
        }
        self.active.add(node, state);
        Ok(())
    }

    /// Takes a chunk that is now published out of the pending ones, unless it was changed again.
    fn unpend(&self, state: &mut NodeState, index: u64, frozen: FrozenChunk, seal: Option<Seal>) {
        let FrozenChunk { chunk, bodies } = frozen;
        let is_large = chunk.run.is_some() || state.record.content.size > super::content::INLINE_BYTES_MAX;
        if is_large && chunk.is_drainable() {
            state.file.drainable.insert(index);
        }
        if let Some(pending) = state.file.pending.get_mut(&index) {
            if pending.touched == 0 {
                self.active.account(pending.accounted, 0);
                state.file.pending.remove(&index);
            } else {
                let same_run = pending.chunk.run == chunk.run;
                pending.protected = if same_run { slot_mask(&chunk) } else { 0 };
                pending.bodies.retain(|block, body| {
                    !bodies
                        .get(block)
                        .is_some_and(|published| Arc::ptr_eq(published, body))
                });
                let weight = pending.weight();
                self.active.account(pending.accounted, weight);
                pending.accounted = weight;
            }
        }
        let published = PublishedChunk::new(chunk, seal);
        self.chunks.put(state.file.generation, index, published);
    }

    /// Puts the bitmap records of the pages that change; what they are stored as once that is committed.
    pub(crate) fn put_bitmaps(
        &self,
        node: &Node,
        state: &mut NodeState,
        batch: &mut Batch,
        added: &[u64],
        freed: &[u64],
    ) -> Result<Vec<(u64, Seal)>> {
        let pages: BTreeSet<_> = added.iter().chain(freed).map(|run| run / PAGE_RUNS).collect();
        let mut records = Vec::with_capacity(pages.len());
        for page in pages {
            self.load_run_page(node, state, page)?;
            let record = state.file.runs.record_after(page, added, freed);
            let key = rowkey::bitmap(node.ino, page);
            let seal = self.put_row(batch, key, &record, state.file.runs.seal_of(page))?;
            records.push((page, seal));
        }
        Ok(records)
    }

    pub(crate) fn load_run_page(&self, node: &Node, state: &mut NodeState, page: u64) -> Result<()> {
        if !state.file.runs.has_page(page) {
            let key = rowkey::bitmap(node.ino, page);
            let sealed = self.store.get(Family::Meta, &key)?;
            let plain = sealed
                .as_ref()
                .map(|sealed| self.open_row(node.ino, &key, sealed));
            let plain = plain.transpose()?;
            let seal = sealed.and_then(|sealed| Seal::of_row(&sealed));
            state.file.runs.load(page, plain.as_deref().zip(seal));
        }
        Ok(())
    }

    /// A run for `chunk`, at its own place in the slot file if that is free; and the file to write it to.
    pub(crate) fn allocate_run(
        &self,
        node: &Node,
        state: &mut NodeState,
        chunk: u64,
    ) -> Result<(u64, Arc<SlotFile>)> {
        let file = self.slot_file(node, state)?;
        // Beyond the host's own limit of a file's size there is no place to prefer.
        let mut page = if chunk < PREFERRED_RUNS_MAX {
            chunk / PAGE_RUNS
        } else {
            0
        };
        self.load_run_page(node, state, page)?;
        if page == chunk / PAGE_RUNS && state.file.runs.take(chunk) {
            return Ok((chunk, file));
        }
        loop {
            if let Some(run) = state.file.runs.take_from(page) {
                return Ok((run, file));
            }
            page = page.checked_add(1).ok_or(Error::Posix(libc::ENOSPC))?;
            self.load_run_page(node, state, page)?;
        }
    }

    /// The slot file, made if this inode never had a published slot.
    pub(crate) fn slot_file(&self, node: &Node, state: &mut NodeState) -> Result<Arc<SlotFile>> {
        if state.file.has_slot_file {
            return self.slots.existing(node.ino);
        }
        let file = self.slots.fresh(node.ino)?;
        state.file.has_slot_file = true;
        Ok(file)
    }

    /// Ends the waiting of what has become durable: gives freed runs back and their space to the host, lets
    /// superseded slots be written again. True if the file has no work left.
    pub(crate) fn settle(&self, node: &Arc<Node>) -> Result<bool> {
        let durable = self.committer.durable();
        let mut state = node.state.write();
        let state = &mut *state;
        let mut punched = Ok(());
        for run in state.file.runs.release(durable) {
            let outcome = self.slot_file(node, state).and_then(|file| file.punch(run));
            punched = punched.and(outcome);
        }
        punched?;
        state.file.busy.retain(|_, busy| busy.until > durable);
        let file = &state.file;
        let idle = file.pending.is_empty() && file.runs.is_settled() && file.busy.is_empty();
        if idle && file.drainable.is_empty() && !file.dirty && !file.poisoned {
            self.active.remove(node.ino, state);
            return Ok(true);
        }
        Ok(false)
    }
}

/// Takes the snapshot. Slots it names are protected from now on.
fn freeze(state: &mut NodeState) -> Frozen {
    let mut chunks = BTreeMap::new();
    for (&index, pending) in &mut state.file.pending {
        if pending.chunk.is_empty() && pending.chunk.run.take().is_some() {
            state.record.content.runs = state.record.content.runs.saturating_sub(1);
        }
        pending.touched = 0;
        pending.protected |= slot_mask(&pending.chunk);
        chunks.insert(
            index,
            FrozenChunk {
                chunk: pending.chunk.clone(),
                bodies: pending.bodies.clone(),
            },
        );
    }
    state.file.dirty = false;
    Frozen {
        chunks,
        content: state.record.content,
    }
}

pub(crate) fn mark_busy(state: &mut NodeState, index: u64, run: Option<u64>, slots: u32, until: Seq) {
    let Some(run) = run.filter(|_| slots != 0) else {
        return;
    };
    let busy = state
        .file
        .busy
        .entry(index)
        .or_insert(BusySlots { run, slots: 0, until });
    if busy.run != run {
        *busy = BusySlots { run, slots: 0, until };
    }
    busy.slots |= slots;
    busy.until = busy.until.max(until);
}

/// Deletes the chunks in `range`: row by row if it is known which there are.
fn delete_chunks(batch: &mut Batch, node: &Node, range: Range<u64>, rows: Option<Vec<(u64, Chunk)>>) {
    match rows {
        Some(rows) => {
            for (index, chunk) in &rows {
                batch.delete(Family::Meta, rowkey::chunk(node.ino, *index));
                delete_inline(batch, node, *index, chunk, &Chunk::default());
            }
        }
        None => {
            let chunk = |index| rowkey::chunk(node.ino, index);
            batch.delete_range(Family::Meta, chunk(range.start), chunk(range.end));
            let block = |index: u64| rowkey::content(node.ino, index.saturating_mul(CHUNK_BLOCKS as u64));
            batch.delete_range(Family::Content, block(range.start), block(range.end));
        }
    }
}

/// Deletes the rows of blocks that were inline and no longer are.
pub(crate) fn delete_inline(batch: &mut Batch, node: &Node, index: u64, old: &Chunk, new: &Chunk) {
    for block in 0..CHUNK_BLOCKS {
        let was = matches!(old.block(block), Block::Inline { .. });
        if was && !matches!(new.block(block), Block::Inline { .. }) {
            let number = index.saturating_mul(CHUNK_BLOCKS as u64) + block as u64;
            batch.delete(Family::Content, rowkey::content(node.ino, number));
        }
    }
}

fn refuse_poisoned(state: &NodeState) -> Result<()> {
    if state.file.poisoned {
        Err(Error::Poisoned)
    } else {
        Ok(())
    }
}
