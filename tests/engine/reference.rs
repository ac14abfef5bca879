//! The reference: a filesystem of maps and vectors.

use cmkfs::engine::{Fallocate, FileKind, RenameFlags};
use std::collections::BTreeMap;

pub type Errno = i32;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelNode {
    pub kind: FileKind,
    pub perm: u16,
    pub data: Vec<u8>,
    pub target: Vec<u8>,
    pub children: BTreeMap<Vec<u8>, usize>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub parent: usize,
}

/// The reference. Nodes are never removed from the vector; those without names are not reachable.
pub struct Model {
    pub nodes: Vec<ModelNode>,
}

impl Model {
    pub fn new() -> Self {
        Self {
            nodes: vec![node(FileKind::Directory, 0o755, 0)],
        }
    }

    pub fn reachable(&self, wanted: impl Fn(FileKind) -> bool) -> Vec<usize> {
        let mut found = Vec::new();
        let mut queue = vec![0];
        while let Some(id) = queue.pop() {
            if !found.contains(&id) {
                found.push(id);
                queue.extend(self.nodes[id].children.values());
            }
        }
        found.retain(|id| wanted(self.nodes[*id].kind));
        found.sort_unstable();
        found
    }

    pub fn nlink(&self, id: usize) -> u32 {
        if self.nodes[id].kind == FileKind::Directory {
            let children = self.nodes[id].children.values();
            return 2 + children
                .filter(|child| self.nodes[**child].kind == FileKind::Directory)
                .count() as u32;
        }
        let everywhere = self.reachable(|kind| kind == FileKind::Directory);
        let names = everywhere
            .iter()
            .flat_map(|dir| self.nodes[*dir].children.values());
        names.filter(|child| **child == id).count() as u32
    }

    pub fn add(&mut self, dir: usize, name: &[u8], new: ModelNode) -> Result<usize, Errno> {
        if self.nodes[dir].children.contains_key(name) {
            return Err(libc::EEXIST);
        }
        self.nodes.push(new);
        let id = self.nodes.len() - 1;
        self.nodes[dir].children.insert(name.to_vec(), id);
        Ok(id)
    }

    pub fn child(&self, dir: usize, name: &[u8]) -> Result<usize, Errno> {
        self.nodes[dir].children.get(name).copied().ok_or(libc::ENOENT)
    }

    pub fn is_dir(&self, id: usize) -> bool {
        self.nodes[id].kind == FileKind::Directory
    }

    pub fn is_below(&self, mut id: usize, above: usize) -> bool {
        loop {
            if id == above {
                return true;
            }
            if id == 0 {
                return false;
            }
            id = self.nodes[id].parent;
        }
    }

    pub fn rename(
        &mut self,
        from: (usize, &[u8]),
        to: (usize, &[u8]),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        if flags.exchange && (flags.no_replace || flags.whiteout.is_some()) {
            return Err(libc::EINVAL);
        }
        let source = self.child(from.0, from.1)?;
        let target = self.child(to.0, to.1).ok();
        if flags.no_replace && target.is_some() {
            return Err(libc::EEXIST);
        }
        if flags.exchange && target.is_none() {
            return Err(libc::ENOENT);
        }
        if target == Some(source) {
            return Ok(());
        }
        if self.is_dir(source) && self.is_below(to.0, source) {
            return Err(libc::EINVAL);
        }
        if let (true, Some(target)) = (flags.exchange, target) {
            if self.is_dir(target) && self.is_below(from.0, target) {
                return Err(libc::EINVAL);
            }
            self.put(from, target);
            self.put(to, source);
            return Ok(());
        }
        if let Some(target) = target {
            match (self.is_dir(source), self.is_dir(target)) {
                (true, false) => return Err(libc::ENOTDIR),
                (false, true) => return Err(libc::EISDIR),
                (true, true) if !self.nodes[target].children.is_empty() => return Err(libc::ENOTEMPTY),
                _ => {}
            }
        }
        self.nodes[from.0].children.remove(from.1);
        self.put(to, source);
        if flags.whiteout.is_some() {
            self.add(from.0, from.1, node(FileKind::CharDevice, 0, 0))?;
        }
        Ok(())
    }

    pub fn put(&mut self, at: (usize, &[u8]), id: usize) {
        self.nodes[at.0].children.insert(at.1.to_vec(), id);
        if self.is_dir(id) {
            self.nodes[id].parent = at.0;
        }
    }
}

pub fn node(kind: FileKind, perm: u16, parent: usize) -> ModelNode {
    ModelNode {
        kind,
        perm,
        data: Vec::new(),
        target: Vec::new(),
        children: BTreeMap::new(),
        xattrs: BTreeMap::new(),
        parent,
    }
}

pub fn write(data: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (from, to) = (offset as usize, offset as usize + bytes.len());
    if data.len() < to {
        data.resize(to, 0);
    }
    data[from..to].copy_from_slice(bytes);
}

pub fn read(data: &[u8], offset: u64, length: usize) -> &[u8] {
    let from = (offset as usize).min(data.len());
    &data[from..(from + length).min(data.len())]
}

pub fn fallocate(data: &mut Vec<u8>, how: Fallocate, offset: usize, length: usize) {
    let (zero, extend) = match how {
        Fallocate::Allocate { keep_size } => (false, !keep_size),
        Fallocate::PunchHole => (true, false),
        Fallocate::ZeroRange { keep_size } => (true, !keep_size),
    };
    if zero {
        let end = (offset + length).min(data.len());
        if offset < end {
            data[offset..end].fill(0);
        }
    }
    if extend && data.len() < offset + length {
        data.resize(offset + length, 0);
    }
}
