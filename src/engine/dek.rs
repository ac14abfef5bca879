//! DEKs of files that exist: fetched when they are needed, or before.
//!
//! A call to the KMS costs much the same for one key as for many. Two things tell which are needed next: a directory that
//! is listed, and files opened one after the other. Files made together have neighbouring numbers, and are mostly
//! read together, too, whether in the order of their names or of their places.

use super::core::Access;
use super::error::Result;
use super::format::rowkey::{self, Family};
use super::keys::FileKey;
use super::node::Node;
use super::types::{FileKind, Ino};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers that are looked at together when a key is missing.
const NEIGHBOURS: u64 = 64;
/// Misses as close as this to the one before are a program going over a tree; others are fetched alone.
const NEAR: u64 = 1024;

/// Where the last key was missing.
#[derive(Default)]
pub(crate) struct Misses(AtomicU64);

impl Misses {
    /// Notes a miss; says whether it is near the one before.
    fn note(&self, ino: Ino) -> bool {
        self.0.swap(ino.0, Ordering::Relaxed).abs_diff(ino.0) <= NEAR
    }
}

impl Access<'_> {
    /// The content key of a regular file. May ask the KMS, so no lock is to be held.
    pub(crate) fn file_key(&self, node: &Node) -> Result<Arc<FileKey>> {
        let domain = self.domains.of(node.ino)?;
        if let Some(key) = domain.keyring.cached_file_key(node.ino) {
            return Ok(key);
        }
        let wrapped = Arc::clone(&node.state.read().record.wrapped_dek);
        let others = if domain.misses.note(node.ino) {
            self.neighbours(node.ino)?
        } else {
            Vec::new()
        };
        domain.keyring.fetch_file_key(node.ino, &wrapped, others)
    }

    /// The wrapped DEKs of the files around `ino` whose keys are not in memory.
    fn neighbours(&self, ino: Ino) -> Result<Vec<(Ino, Vec<u8>)>> {
        let first = ino.0 - ino.0 % NEIGHBOURS;
        let around: Vec<_> = (first..first.saturating_add(NEIGHBOURS))
            .map(Ino)
            .filter(|other| *other != ino)
            .collect();
        self.missing_deks(&around)
    }

    /// Fetches the DEKs of files that a listing showed.
    pub(crate) fn prefetch_keys(&self, files: &[Ino]) -> Result<()> {
        for files in files.chunk_by(|one, next| one.domain() == next.domain()) {
            let Some(first) = files.first() else { continue };
            let keyring = &self.domains.of(*first)?.keyring;
            keyring.prefetch_files(&self.missing_deks(files)?);
        }
        Ok(())
    }

    /// The wrapped DEKs of those inodes that are files, and whose keys are not in memory.
    fn missing_deks(&self, inodes: &[Ino]) -> Result<Vec<(Ino, Vec<u8>)>> {
        let missing: Vec<_> = inodes
            .iter()
            .copied()
            .filter(|ino| {
                self.domains
                    .of(*ino)
                    .is_ok_and(|domain| !domain.keyring.has_file_key(*ino))
            })
            .collect();
        let keys: Vec<_> = missing.iter().map(|ino| rowkey::inode(*ino)).collect();
        let rows = self.store.multi_get(Family::Meta, &keys)?;
        let mut deks = Vec::with_capacity(missing.len());
        for ((ino, key), sealed) in missing.iter().zip(&keys).zip(rows) {
            let Some(sealed) = sealed else { continue };
            // What is damaged shows when it is used.
            if let Ok((record, _)) = self.open_record(*ino, key, &sealed)
                && record.kind == FileKind::Regular
            {
                deks.push((*ino, record.wrapped_dek.to_vec()));
            }
        }
        Ok(deks)
    }
}
