//! The nodes that hold something storage does not, or that wait for something to become durable.

use super::node::{Node, NodeState};
use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Mutex, rank};
use super::types::Ino;
use std::collections::HashMap;
use std::sync::Arc;

/// Pending content held in memory before writers must publish it themselves, in bytes.
const PENDING_BYTES_MAX: u64 = 64 << 20;

/// Keeps active nodes in memory, and counts what they hold.
#[derive(Default)]
pub(crate) struct Active {
    nodes: Mutex<HashMap<Ino, Arc<Node>>, rank::Active>,
    pending_bytes: AtomicU64,
}

impl Active {
    /// Notes that `node`, whose lock the caller holds as `state`, has work left.
    pub(crate) fn add(&self, node: &Arc<Node>, state: &mut NodeState) {
        if !state.file.active {
            state.file.active = true;
            self.nodes.lock().insert(node.ino, Arc::clone(node));
        }
    }

    /// Notes that no work is left.
    pub(crate) fn remove(&self, ino: Ino, state: &mut NodeState) {
        state.file.active = false;
        self.nodes.lock().remove(&ino);
    }

    pub(crate) fn get(&self, ino: Ino) -> Option<Arc<Node>> {
        self.nodes.lock().get(&ino).map(Arc::clone)
    }

    /// Every active node, for a caller under whom no revocation can replace them.
    pub(crate) fn nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.lock().values().cloned().collect()
    }

    pub(crate) fn inodes(&self) -> Vec<Ino> {
        self.nodes.lock().keys().copied().collect()
    }

    /// Corrects the count of pending bytes from what a chunk counted for to what it counts for now.
    pub(crate) fn account(&self, before: u64, now: u64) {
        if now >= before {
            self.pending_bytes.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.pending_bytes.fetch_sub(before - now, Ordering::Relaxed);
        }
    }

    /// Content in memory that storage does not hold, in bytes, with its administration.
    pub(crate) fn pending_bytes(&self) -> u64 {
        self.pending_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn is_over_budget(&self) -> bool {
        self.pending_bytes() > PENDING_BYTES_MAX
    }

    /// Takes every node whose keys are going: their content is plaintext's shadow.
    pub(crate) fn take(&self, going: impl Fn(Ino) -> bool) -> Vec<Arc<Node>> {
        let mut nodes = self.nodes.lock();
        let gone = nodes.extract_if(|ino, _| going(*ino));
        gone.map(|(_, node)| node).collect()
    }
}
