//! Decoded chunk records as they are published: a bounded cache in front of the store.

use super::format::chunk::Chunk;
use super::format::seal::Seal;
use super::sync::{Mutex, rank};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

/// Records kept, of about 1 KiB each: enough for 4 GiB of content.
const ENTRIES_MAX: usize = 32_768;
const SHARDS: usize = 16;

/// A chunk as it is published.
#[derive(Default)]
pub(crate) struct PublishedChunk {
    chunk: Chunk,
    /// Of its record; a chunk of holes alone has none.
    seal: Option<Seal>,
}

impl PublishedChunk {
    pub(crate) fn new(chunk: Chunk, seal: Option<Seal>) -> Arc<Self> {
        Arc::new(Self { chunk, seal })
    }

    pub(crate) fn chunk(&self) -> &Chunk {
        &self.chunk
    }

    pub(crate) fn seal(&self) -> Option<&Seal> {
        self.seal.as_ref()
    }
}

impl Deref for PublishedChunk {
    type Target = Chunk;

    fn deref(&self) -> &Chunk {
        &self.chunk
    }
}

/// A record's node generation and chunk index. A node that changes its generation disowns all its entries.
type Key = (u64, u64);

/// The cache. Entries are put in under the node's lock, so that none is older than what the store holds.
pub(crate) struct ChunkCache(Vec<Shard>);

type Shard = Mutex<LruCache<Key, Arc<PublishedChunk>>, rank::ChunkCache>;

impl ChunkCache {
    pub(crate) fn new() -> Self {
        let per_shard = NonZeroUsize::new(ENTRIES_MAX / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self(
            (0..SHARDS)
                .map(|_| Mutex::new(LruCache::new(per_shard)))
                .collect(),
        )
    }

    fn shard(&self, key: Key) -> Option<&Shard> {
        self.0
            .get((key.0.wrapping_mul(31).wrapping_add(key.1) % SHARDS as u64) as usize)
    }

    pub(crate) fn get(&self, generation: u64, chunk: u64) -> Option<Arc<PublishedChunk>> {
        let key = (generation, chunk);
        self.shard(key)?.lock().get(&key).map(Arc::clone)
    }

    pub(crate) fn put(&self, generation: u64, chunk: u64, record: Arc<PublishedChunk>) {
        let key = (generation, chunk);
        if let Some(shard) = self.shard(key) {
            shard.lock().put(key, record);
        }
    }

    /// Drops everything: the keys are going.
    pub(crate) fn clear(&self) {
        for shard in &self.0 {
            shard.lock().clear();
        }
    }
}
