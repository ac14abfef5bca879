//! Several inodes locked and changed together: the changes are made to copies, committed, and only then to the
//! nodes, so that a failed commit changes nothing.

use super::batch::Batch;
use super::core::Access;
use super::error::{Error, Result};
use super::format::inode::InodeRecord;
use super::node::{Locked, Node, NodeState};
use super::types::Ino;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The locks and the changed records.
pub(crate) struct Staged<'n> {
    locked: Locked<'n>,
    records: BTreeMap<Ino, InodeRecord>,
}

impl<'n> Staged<'n> {
    /// Locks the nodes, in ascending order.
    pub(crate) fn lock(nodes: &[&'n Arc<Node>]) -> Self {
        Self {
            locked: Locked::new(nodes),
            records: BTreeMap::new(),
        }
    }

    /// The state of a locked node as it is before the change.
    pub(crate) fn state(&self, ino: Ino) -> Result<&NodeState> {
        self.locked.get(ino).ok_or_else(|| Error::corrupt_inode(ino))
    }

    /// The record of a locked node as it is to be.
    pub(crate) fn record(&mut self, ino: Ino) -> Result<&mut InodeRecord> {
        if !self.records.contains_key(&ino) {
            let record = self.state(ino)?.record.clone();
            self.records.insert(ino, record);
        }
        self.records
            .get_mut(&ino)
            .ok_or_else(|| Error::corrupt_inode(ino))
    }

    /// Commits the changed records with `batch`. Sizes stay as they are published (rule R2).
    pub(crate) fn commit(&mut self, access: &Access<'_>, mut batch: Batch) -> Result<()> {
        let mut written = Vec::with_capacity(self.records.len());
        for (&ino, record) in &self.records {
            let state = self.state(ino)?;
            let record = InodeRecord {
                content: state.published,
                ..record.clone()
            };
            let stored = access.put_inode(&mut batch, ino, &record, Some(&state.stored))?;
            written.push((ino, stored));
        }
        access.commit(batch)?;
        for ((ino, stored), record) in written
            .into_iter()
            .zip(std::mem::take(&mut self.records).into_values())
        {
            if let Some(state) = self.locked.get_mut(ino) {
                state.record = record;
                state.stored = stored;
            }
        }
        Ok(())
    }
}
