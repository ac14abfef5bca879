//! The keys of files in memory, of every domain together: one bound, since they lie in memory that is locked.

use super::keys::FileKey;
use super::sync::{Mutex, rank};
use super::types::{Domain, Ino};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::Arc;

const SHARDS: usize = 16;

type Shard = Mutex<LruCache<Ino, Arc<FileKey>>, rank::FileKeys>;

/// The cache. The keys of a domain are put in by who holds its gate, and dropped when that is shut.
pub(crate) struct FileKeys(Vec<Shard>);

impl FileKeys {
    /// At most so many keys.
    pub(crate) fn new(entries_max: usize) -> Self {
        let per_shard = NonZeroUsize::new(entries_max / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self(
            (0..SHARDS)
                .map(|_| Mutex::new(LruCache::new(per_shard)))
                .collect(),
        )
    }

    fn shard(&self, ino: Ino) -> Option<&Shard> {
        self.0.get(usize::try_from(ino.0).unwrap_or(0) % SHARDS)
    }

    pub(crate) fn get(&self, ino: Ino) -> Option<Arc<FileKey>> {
        self.shard(ino)?.lock().get(&ino).map(Arc::clone)
    }

    pub(crate) fn has(&self, ino: Ino) -> bool {
        self.shard(ino).is_some_and(|shard| shard.lock().contains(&ino))
    }

    pub(crate) fn put(&self, ino: Ino, key: Arc<FileKey>) {
        if let Some(shard) = self.shard(ino) {
            shard.lock().put(ino, key);
        }
    }

    pub(crate) fn remove(&self, ino: Ino) {
        if let Some(shard) = self.shard(ino) {
            shard.lock().pop(&ino);
        }
    }

    /// Drops the keys of a domain.
    pub(crate) fn clear(&self, domain: Domain) {
        for shard in &self.0 {
            let mut shard = shard.lock();
            let gone: Vec<_> = shard.iter().map(|(ino, _)| *ino).collect();
            for ino in gone.into_iter().filter(|ino| ino.domain() == domain) {
                shard.pop(&ino);
            }
        }
    }

    /// Keys in memory.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|shard| shard.lock().len()).sum()
    }
}
