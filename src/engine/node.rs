//! Inodes in memory: a bounded table of nodes, and how often the kernel knows each.

use super::commit::Seq;
use super::format::chunk::{CHUNK_BLOCKS, Chunk};
use super::format::inode::{ContentState, InodeRecord};
use super::runs::Runs;
use super::types::Ino;
use lru::LruCache;
use parking_lot::{Mutex, RwLock, RwLockWriteGuard};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const SHARDS: usize = 32;

/// An inode in memory. Lock order: rename lock, `publishing`, `state` in ascending inode order, commit queue.
pub(crate) struct Node {
    pub(crate) ino: Ino,
    /// Held for a whole publish, truncation or drain: there is one at a time.
    pub(crate) publishing: Mutex<()>,
    pub(crate) state: RwLock<NodeState>,
}

/// What the node's lock protects.
pub(crate) struct NodeState {
    /// The live view: with pending size and times.
    pub(crate) record: InodeRecord,
    /// What storage holds of size, blocks and runs.
    pub(crate) published: ContentState,
    pub(crate) file: FileState,
}

/// Content of a regular file between storage and the kernel.
pub(crate) struct FileState {
    /// Chunks changed since the last publish: each a whole view, read before storage.
    pub(crate) pending: BTreeMap<u64, PendingChunk>,
    /// Whether size, times or content changed since the last freeze.
    pub(crate) dirty: bool,
    /// Whether the node is among the active ones.
    pub(crate) active: bool,
    /// Whether this mount knows the slot file to be there.
    pub(crate) has_slot_file: bool,
    /// Whether a slot was written since the last fdatasync of the slot file.
    pub(crate) slots_dirty: bool,
    pub(crate) runs: Runs,
    /// Slots that a superseded but possibly durable record names: not to be written until `Seq` is durable.
    pub(crate) busy: HashMap<u64, BusySlots>,
    /// Chunks with full blocks inline that could lie in slots.
    pub(crate) drainable: BTreeSet<u64>,
    /// When content was last written.
    pub(crate) written: Option<Instant>,
    /// Rule R6: a failed sync lost data; no later one succeeds.
    pub(crate) poisoned: bool,
    /// Key of this node's entries in the chunk cache; a new one makes all older entries unreachable.
    pub(crate) generation: u64,
}

/// Slots of one chunk's run that must not be overwritten yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BusySlots {
    pub(crate) run: u64,
    pub(crate) slots: u32,
    pub(crate) until: Seq,
}

/// A chunk with changes that are not published.
pub(crate) struct PendingChunk {
    pub(crate) chunk: Chunk,
    /// Ciphertext of inline blocks that storage does not hold.
    pub(crate) bodies: BTreeMap<usize, Arc<[u8]>>,
    /// Blocks changed since the last freeze.
    pub(crate) touched: u32,
    /// Slots of the run that a published or frozen record names.
    pub(crate) protected: u32,
    /// What this chunk counts for in the volume's budget of pending bytes.
    pub(crate) accounted: u64,
}

impl PendingChunk {
    pub(crate) fn new(chunk: Chunk) -> Self {
        let protected = slot_mask(&chunk);
        Self {
            chunk,
            bodies: BTreeMap::new(),
            touched: 0,
            protected,
            accounted: 0,
        }
    }

    /// Memory taken, in bytes.
    pub(crate) fn weight(&self) -> u64 {
        let bodies: usize = self.bodies.values().map(|body| body.len()).sum();
        (size_of::<Self>() + bodies) as u64
    }
}

/// The slots of a chunk that its record names, as a mask.
pub(crate) fn slot_mask(chunk: &Chunk) -> u32 {
    let named =
        (0..CHUNK_BLOCKS).filter(|index| matches!(chunk.block(*index), super::format::chunk::Block::Slot(_)));
    named.fold(0, |mask, index| mask | 1 << index)
}

static GENERATION: AtomicU64 = AtomicU64::new(1);

pub(crate) fn next_generation() -> u64 {
    GENERATION.fetch_add(1, Ordering::Relaxed)
}

impl NodeState {
    pub(crate) fn new(record: InodeRecord) -> Self {
        Self {
            published: record.content,
            file: FileState {
                pending: BTreeMap::new(),
                dirty: false,
                active: false,
                has_slot_file: record.content.runs > 0,
                slots_dirty: false,
                runs: Runs::default(),
                busy: HashMap::new(),
                drainable: BTreeSet::new(),
                written: None,
                poisoned: false,
                generation: next_generation(),
            },
            record,
        }
    }

    /// The record as any batch but a publish writes it (rule R2).
    pub(crate) fn record_to_store(&self) -> InodeRecord {
        InodeRecord {
            content: self.published,
            ..self.record.clone()
        }
    }
}

impl Node {
    pub(crate) fn new(ino: Ino, record: InodeRecord) -> Arc<Self> {
        Arc::new(Self {
            ino,
            publishing: Mutex::new(()),
            state: RwLock::new(NodeState::new(record)),
        })
    }
}

/// Several nodes locked for writing, in ascending inode order.
pub(crate) struct Locked<'a>(Vec<(Ino, RwLockWriteGuard<'a, NodeState>)>);

impl<'a> Locked<'a> {
    /// Locks each node once, however often it is named.
    pub(crate) fn new(nodes: &[&'a Arc<Node>]) -> Self {
        let mut sorted = nodes.to_vec();
        sorted.sort_by_key(|node| node.ino);
        sorted.dedup_by_key(|node| node.ino);
        Self(
            sorted
                .into_iter()
                .map(|node| (node.ino, node.state.write()))
                .collect(),
        )
    }

    pub(crate) fn get(&self, ino: Ino) -> Option<&NodeState> {
        self.0
            .iter()
            .find(|(held, _)| *held == ino)
            .map(|(_, state)| &**state)
    }

    pub(crate) fn get_mut(&mut self, ino: Ino) -> Option<&mut NodeState> {
        self.0
            .iter_mut()
            .find(|(held, _)| *held == ino)
            .map(|(_, state)| &mut **state)
    }
}

/// The nodes in memory. A node that something still refers to (an operation, pending content) is never evicted,
/// so that an inode has at most one node.
pub(crate) struct NodeTable {
    shards: Vec<Mutex<LruCache<Ino, Arc<Node>>>>,
    lookups: Vec<Mutex<HashMap<Ino, u64>>>,
    per_shard_max: usize,
}

impl NodeTable {
    pub(crate) fn new(entries_max: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(LruCache::unbounded())).collect(),
            lookups: (0..SHARDS).map(|_| Mutex::default()).collect(),
            per_shard_max: NonZeroUsize::new(entries_max / SHARDS)
                .unwrap_or(NonZeroUsize::MIN)
                .get(),
        }
    }

    fn shard<T>(shards: &[T], ino: Ino) -> Option<&T> {
        shards.get(usize::try_from(ino.0).unwrap_or(0) % SHARDS)
    }

    pub(crate) fn get(&self, ino: Ino) -> Option<Arc<Node>> {
        Self::shard(&self.shards, ino)?.lock().get(&ino).map(Arc::clone)
    }

    /// Adds a node loaded from storage, unless another thread was first; returns the one that counts.
    pub(crate) fn insert(&self, node: Arc<Node>) -> Arc<Node> {
        let Some(shard) = Self::shard(&self.shards, node.ino) else {
            return node;
        };
        let mut shard = shard.lock();
        if let Some(first) = shard.get(&node.ino) {
            return Arc::clone(first);
        }
        shard.put(node.ino, Arc::clone(&node));
        self.evict(&mut shard);
        node
    }

    fn evict(&self, shard: &mut LruCache<Ino, Arc<Node>>) {
        // Each entry is looked at once at most: when all are in use the table grows past its limit instead.
        let mut looked_at = 0;
        while shard.len() > self.per_shard_max && looked_at < 8 {
            looked_at += 1;
            let Some((ino, node)) = shard.pop_lru() else {
                return;
            };
            if Arc::strong_count(&node) > 1 {
                shard.put(ino, node);
            }
        }
    }

    pub(crate) fn remove(&self, ino: Ino) {
        if let Some(shard) = Self::shard(&self.shards, ino) {
            shard.lock().pop(&ino);
        }
    }

    /// Drops every node: their records are plaintext, and the keys are going.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            shard.lock().clear();
        }
    }

    /// Counts one more reference that the kernel holds.
    pub(crate) fn looked_up(&self, ino: Ino) {
        if let Some(shard) = Self::shard(&self.lookups, ino) {
            *shard.lock().entry(ino).or_insert(0) += 1;
        }
    }

    /// Takes references back; true when the kernel holds none any more.
    pub(crate) fn forgotten(&self, ino: Ino, count: u64) -> bool {
        let Some(shard) = Self::shard(&self.lookups, ino) else {
            return false;
        };
        let mut shard = shard.lock();
        let Some(held) = shard.get_mut(&ino) else {
            return false;
        };
        *held = held.saturating_sub(count);
        if *held > 0 {
            return false;
        }
        shard.remove(&ino);
        true
    }

    pub(crate) fn is_known(&self, ino: Ino) -> bool {
        Self::shard(&self.lookups, ino).is_some_and(|shard| shard.lock().contains_key(&ino))
    }

    /// Takes back every reference.
    pub(crate) fn forget_all(&self) {
        for shard in &self.lookups {
            shard.lock().clear();
        }
    }

    /// Every inode that the kernel may cache something of.
    pub(crate) fn known(&self) -> Vec<Ino> {
        self.lookups
            .iter()
            .flat_map(|shard| shard.lock().keys().copied().collect::<Vec<_>>())
            .collect()
    }
}
