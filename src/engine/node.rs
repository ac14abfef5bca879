//! Inodes in memory: a bounded table of nodes, and how often the kernel knows each.

use super::commit::Seq;
use super::format::chunk::{CHUNK_BLOCKS, Chunk};
use super::format::inode::{ContentState, InodeRecord};
use super::format::rowsum::RowSum;
use super::format::seal::Seal;
use super::keyservice::InodeLedger;
use super::runs::Runs;
use super::sync::{Mutex, RwLock, RwLockWriteGuard, rank};
use super::types::Ino;
use lru::LruCache;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

const SHARDS: usize = 32;

/// An inode in memory.
pub(crate) struct Node {
    pub(crate) ino: Ino,
    /// Held for a whole publish, truncation or drain: there is one at a time.
    pub(crate) publishing: Mutex<(), rank::Publishing>,
    pub(crate) state: RwLock<NodeState, rank::Node>,
}

/// How an inode's record is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Of its row.
    pub(crate) seal: Seal,
    /// The sum of the inode's other rows that it says; none in a volume without.
    pub(crate) rows: Option<RowSum>,
}

/// What the node's lock protects.
pub(crate) struct NodeState {
    /// The live view: with pending size and times.
    pub(crate) record: InodeRecord,
    /// What storage holds of size, blocks and runs.
    pub(crate) published: ContentState,
    /// The record in storage, which the next one takes the place of.
    pub(crate) stored: Stored,
    pub(crate) file: FileState,
}

/// Content of a regular file between storage and the kernel.
pub(crate) struct FileState {
    /// Chunks changed since the last publish: each a whole view, read before storage. Boxed, because a leaf of the map has
    /// room for eleven, and most files have one.
    pub(crate) pending: BTreeMap<u64, Box<PendingChunk>>,
    /// Whether size, times or content changed since the last freeze.
    pub(crate) dirty: bool,
    /// Whether the node is among the active ones.
    pub(crate) active: bool,
    /// Whether this mount knows the slot file to be there.
    pub(crate) has_slot_file: bool,
    /// How much the host had, in bytes, when the last publish found no room.
    pub(crate) refused: Option<u64>,
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

/// About what the smallest two maps take that lead to a pending chunk and to its bodies, in bytes.
const MAP_BYTES: usize = 512;

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
        (size_of::<Self>() + MAP_BYTES + bodies) as u64
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
    pub(crate) fn new(record: InodeRecord, stored: Stored, poisoned: bool) -> Self {
        Self {
            published: record.content,
            stored,
            file: FileState {
                pending: BTreeMap::new(),
                dirty: false,
                active: false,
                has_slot_file: record.content.runs > 0,
                refused: None,
                slots_dirty: false,
                runs: Runs::default(),
                busy: HashMap::new(),
                drainable: BTreeSet::new(),
                written: None,
                poisoned,
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
    pub(crate) fn new(ino: Ino, record: InodeRecord, stored: Stored, poisoned: bool) -> Arc<Self> {
        Arc::new(Self {
            ino,
            publishing: Mutex::new(()),
            state: RwLock::numbered(ino.0, NodeState::new(record, stored, poisoned)),
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
    shards: Vec<Mutex<Shard, rank::NodeTable>>,
    lookups: Vec<Mutex<HashMap<Ino, Known>, rank::Lookups>>,
    /// Where what is in `lookups` is listed, too.
    ledger: OnceLock<Arc<dyn InodeLedger>>,
    per_shard_max: usize,
}

/// An inode that the kernel knows.
struct Known {
    /// References that the kernel holds.
    count: u64,
    /// In the ledger.
    place: Option<u64>,
}

struct Shard {
    nodes: LruCache<Ino, Arc<Node>>,
    /// Moves when nodes are dropped.
    drops: Drops,
}

/// How often nodes of a shard were dropped. A record that was read before a drop may be older than what the dropped node
/// committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Drops(u64);

impl Shard {
    fn dropped(&mut self) {
        self.drops.0 = self.drops.0.wrapping_add(1);
    }
}

impl NodeTable {
    pub(crate) fn new(entries_max: usize) -> Self {
        Self {
            shards: (0..SHARDS)
                .map(|_| {
                    Mutex::new(Shard {
                        nodes: LruCache::unbounded(),
                        drops: Drops::default(),
                    })
                })
                .collect(),
            lookups: (0..SHARDS).map(|_| Mutex::default()).collect(),
            ledger: OnceLock::new(),
            per_shard_max: NonZeroUsize::new(entries_max / SHARDS)
                .unwrap_or(NonZeroUsize::MIN)
                .get(),
        }
    }

    fn shard<T>(shards: &[T], ino: Ino) -> Option<&T> {
        shards.get(usize::try_from(ino.0).unwrap_or(0) % SHARDS)
    }

    pub(crate) fn get(&self, ino: Ino) -> Option<Arc<Node>> {
        self.find(ino).ok()
    }

    /// A node, or what [`Self::insert`] has to be told after the record was read.
    pub(crate) fn find(&self, ino: Ino) -> Result<Arc<Node>, Drops> {
        let Some(shard) = Self::shard(&self.shards, ino) else {
            return Err(Drops::default());
        };
        let mut shard = shard.lock();
        let found = shard.nodes.get(&ino).map(Arc::clone);
        found.ok_or(shard.drops)
    }

    /// Adds a node loaded from storage, unless another thread was first; returns the one that counts. `None` if its
    /// record may be outdated: nodes were dropped since `seen`.
    pub(crate) fn insert(&self, node: Arc<Node>, seen: Drops) -> Option<Arc<Node>> {
        let mut shard = Self::shard(&self.shards, node.ino)?.lock();
        if let Some(first) = shard.nodes.get(&node.ino) {
            return Some(Arc::clone(first));
        }
        if shard.drops != seen {
            return None;
        }
        self.add(&mut shard, &node);
        Some(node)
    }

    /// Adds the node of an inode that was just made.
    pub(crate) fn insert_new(&self, node: Arc<Node>) {
        if let Some(shard) = Self::shard(&self.shards, node.ino) {
            self.add(&mut shard.lock(), &node);
        }
    }

    fn add(&self, shard: &mut Shard, node: &Arc<Node>) {
        shard.nodes.put(node.ino, Arc::clone(node));
        // A few are looked at: when all of them are in use the table grows past its limit instead.
        let mut looked_at = 0;
        while shard.nodes.len() > self.per_shard_max && looked_at < 8 {
            looked_at += 1;
            let Some((ino, node)) = shard.nodes.pop_lru() else {
                return;
            };
            if Arc::strong_count(&node) > 1 {
                shard.nodes.put(ino, node);
            } else {
                shard.dropped();
            }
        }
    }

    pub(crate) fn remove(&self, ino: Ino) {
        if let Some(shard) = Self::shard(&self.shards, ino) {
            let mut shard = shard.lock();
            shard.nodes.pop(&ino);
            shard.dropped();
        }
    }

    /// Drops every node whose keys are going: their records are plaintext.
    pub(crate) fn clear(&self, going: impl Fn(Ino) -> bool) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            let gone: Vec<_> = shard
                .nodes
                .iter()
                .map(|(ino, _)| *ino)
                .filter(|ino| going(*ino))
                .collect();
            for ino in gone {
                shard.nodes.pop(&ino);
            }
            shard.dropped();
        }
    }

    /// Has every inode that the kernel learns of from now on listed.
    pub(crate) fn set_ledger(&self, ledger: Arc<dyn InodeLedger>) {
        // Only the first counts: places are the ledger's own.
        if self.ledger.set(ledger).is_err() {
            tracing::error!("the inodes that the kernel knows are listed elsewhere already");
        }
    }

    /// Counts one more reference that the kernel holds, or is about to.
    pub(crate) fn looked_up(&self, ino: Ino) {
        if let Some(shard) = Self::shard(&self.lookups, ino) {
            let mut shard = shard.lock();
            let known = shard.entry(ino).or_insert_with(|| Known {
                count: 0,
                place: self.ledger.get().map(|ledger| ledger.add(ino)),
            });
            known.count += 1;
        }
    }

    /// Takes references back; true when the kernel holds none any more.
    pub(crate) fn forgotten(&self, ino: Ino, count: u64) -> bool {
        let Some(shard) = Self::shard(&self.lookups, ino) else {
            return false;
        };
        let mut shard = shard.lock();
        let Some(known) = shard.get_mut(&ino) else {
            return false;
        };
        known.count = known.count.saturating_sub(count);
        if known.count > 0 {
            return false;
        }
        if let Some(known) = shard.remove(&ino) {
            self.unlist(ino, &known);
        }
        true
    }

    fn unlist(&self, ino: Ino, known: &Known) {
        if let (Some(ledger), Some(place)) = (self.ledger.get(), known.place) {
            ledger.remove(ino, place);
        }
    }

    pub(crate) fn is_known(&self, ino: Ino) -> bool {
        Self::shard(&self.lookups, ino).is_some_and(|shard| shard.lock().contains_key(&ino))
    }

    /// Takes back every reference.
    pub(crate) fn forget_all(&self) {
        for shard in &self.lookups {
            for (ino, known) in shard.lock().drain() {
                self.unlist(ino, &known);
            }
        }
    }

    /// Every inode that the kernel may cache something of: the root, which it knows without looking it up, first.
    pub(crate) fn known(&self) -> Vec<Ino> {
        let looked_up = self
            .lookups
            .iter()
            .flat_map(|shard| shard.lock().keys().copied().collect::<Vec<_>>());
        std::iter::once(Ino::ROOT).chain(looked_up).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::namespace::new_record;
    use crate::engine::types::{FileKind, NewNode, Timestamp};

    fn node(ino: Ino) -> Arc<Node> {
        let new = NewNode {
            kind: FileKind::Regular,
            perm: 0o644,
            umask: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
        };
        let record = new_record(None, Ino::ROOT, &new, Timestamp::default());
        let seal = Seal {
            nonce: kms_crypto::Nonce([0; 12]),
            tag: kms_crypto::Tag([0; 16]),
        };
        Node::new(ino, record, Stored { seal, rows: None }, false)
    }

    #[test]
    fn a_record_read_before_its_node_was_dropped_makes_no_node() {
        let table = NodeTable::new(SHARDS);
        let ino = Ino(SHARDS as u64);
        let seen = table.find(ino).err().unwrap();
        // Another thread loads it, changes it, and is done with it; others push it out.
        table.insert_new(node(ino));
        table.insert_new(node(Ino(2 * SHARDS as u64)));
        assert!(table.get(ino).is_none());
        assert!(table.insert(node(ino), seen).is_none());
        let seen = table.find(ino).err().unwrap();
        assert!(table.insert(node(ino), seen).is_some());
    }

    #[test]
    fn a_node_in_use_stays_and_is_the_only_one() {
        let table = NodeTable::new(SHARDS);
        let used = node(Ino(SHARDS as u64));
        table.insert_new(Arc::clone(&used));
        for number in 2..20 {
            table.insert_new(node(Ino(number * SHARDS as u64)));
        }
        let again = table.insert(node(used.ino), Drops::default());
        assert!(Arc::ptr_eq(&again.unwrap(), &used));
    }
}
