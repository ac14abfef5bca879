//! What the host holds: directories, and files whose blocks are shared between the copies of a tree.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

pub const BLOCK: usize = 4096;
pub const CAPACITY_BYTES: u64 = 1 << 30;
pub const ROOT: u64 = 1;

type Block = Arc<[u8; BLOCK]>;
/// What a request is answered with: a value, or an errno.
pub type Answer<T> = Result<T, i32>;

/// Disjoint ranges of block numbers, by where they start.
#[derive(Clone, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn count(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    fn remove(&mut self, range: &Range<u64>) {
        let before = self.0.range(..range.end).map(|(start, end)| (*start, *end));
        let touched: Vec<_> = before.filter(|(_, end)| *end > range.start).collect();
        for (start, end) in touched {
            self.0.remove(&start);
            if start < range.start {
                self.0.insert(start, range.start);
            }
            if end > range.end {
                self.0.insert(range.end, end);
            }
        }
    }

    fn insert(&mut self, range: Range<u64>) {
        self.remove(&range);
        if !range.is_empty() {
            self.0.insert(range.start, range.end);
        }
    }
}

/// A regular file.
#[derive(Clone, Default)]
pub struct Content {
    size: u64,
    blocks: BTreeMap<u64, Block>,
    /// Allocated, and never written.
    reserved: Ranges,
    /// What the blocks held that were changed since the last sync that succeeded.
    unsynced: BTreeMap<u64, Option<Block>>,
    synced_size: u64,
}

impl Content {
    pub fn allocated_blocks(&self) -> u64 {
        self.blocks.len() as u64 + self.reserved.count()
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let count = self.size.saturating_sub(offset).min(length as u64) as usize;
        let mut bytes = vec![0; count];
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let skip = (at % BLOCK as u64) as usize;
            let part = (count - done).min(BLOCK - skip);
            if let Some(block) = self.blocks.get(&(at / BLOCK as u64)) {
                bytes[done..done + part].copy_from_slice(&block[skip..skip + part]);
            }
            done += part;
        }
        bytes
    }

    /// The block, about to be changed; what it held is remembered until the next sync.
    fn change(&mut self, index: u64) -> &mut [u8; BLOCK] {
        self.remember(index);
        self.reserved.remove(&(index..index + 1));
        Arc::make_mut(self.blocks.entry(index).or_insert_with(|| Arc::new([0; BLOCK])))
    }

    fn remember(&mut self, index: u64) {
        let held = self.blocks.get(&index);
        self.unsynced.entry(index).or_insert_with(|| held.cloned());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let skip = (at % BLOCK as u64) as usize;
            let (part, tail) = rest.split_at(rest.len().min(BLOCK - skip));
            self.change(at / BLOCK as u64)[skip..skip + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            rest = tail;
        }
        self.size = self.size.max(at);
    }

    /// Makes a hole: whole blocks go, the rest becomes zeros.
    fn punch(&mut self, range: Range<u64>) {
        let size = BLOCK as u64;
        let whole = range.start.div_ceil(size)..range.end / size;
        let edges = [
            range.start..range.end.min(whole.start * size),
            range.start.max(whole.end * size)..range.end,
        ];
        for edge in edges {
            let index = edge.start / size;
            if !edge.is_empty() && self.blocks.contains_key(&index) {
                let from = (edge.start - index * size) as usize;
                let length = (edge.end - edge.start) as usize;
                self.change(index)[from..from + length].fill(0);
            }
        }
        if !whole.is_empty() {
            let gone: Vec<_> = self
                .blocks
                .range(whole.clone())
                .map(|(index, _)| *index)
                .collect();
            for index in gone {
                self.remember(index);
                self.blocks.remove(&index);
            }
            self.reserved.remove(&whole);
        }
    }

    fn allocate(&mut self, range: Range<u64>) {
        let blocks = range.start / BLOCK as u64..range.end.div_ceil(BLOCK as u64);
        self.reserved.insert(blocks.clone());
        let written: Vec<_> = self.blocks.range(blocks).map(|(index, _)| *index).collect();
        for index in written {
            self.reserved.remove(&(index..index + 1));
        }
    }

    fn resize(&mut self, size: u64) {
        if size < self.size {
            self.punch(size..self.size.next_multiple_of(BLOCK as u64));
        }
        // Space beyond the end goes in any case, as ftruncate(2) to the size that is does on ext4.
        self.reserved.remove(&(size.div_ceil(BLOCK as u64)..u64::MAX));
        self.size = size;
    }

    fn sync(&mut self) {
        self.unsynced.clear();
        self.synced_size = self.size;
    }

    /// The pages that were dirty are dropped, and what was there before is read again.
    fn lose_pages(&mut self) {
        for (index, held) in std::mem::take(&mut self.unsynced) {
            match held {
                Some(block) => drop(self.blocks.insert(index, block)),
                None => drop(self.blocks.remove(&index)),
            }
        }
    }

    /// Where data, or a hole, is to be found from `offset` on.
    fn seek(&self, offset: u64, for_data: bool) -> Answer<u64> {
        if offset >= self.size {
            return Err(libc::ENXIO);
        }
        let first = offset / BLOCK as u64;
        if for_data {
            let found = self.blocks.range(first..).next();
            let at = found.map(|(index, _)| (index * BLOCK as u64).max(offset));
            return at.filter(|at| *at < self.size).ok_or(libc::ENXIO);
        }
        let mut index = first;
        while self.blocks.contains_key(&index) {
            index += 1;
        }
        Ok((index * BLOCK as u64).clamp(offset, self.size))
    }
}

#[derive(Clone)]
pub enum Body {
    Directory(BTreeMap<OsString, u64>),
    File(Content),
}

#[derive(Clone)]
pub struct Node {
    pub body: Body,
    /// Its path when it was made or last renamed, for messages.
    pub path: String,
    pub modified: SystemTime,
    is_named: bool,
    opened: u32,
}

impl Node {
    fn new(body: Body, path: String) -> Self {
        Self {
            body,
            path,
            modified: SystemTime::now(),
            is_named: true,
            opened: 0,
        }
    }

    pub fn size(&self) -> u64 {
        match &self.body {
            Body::Directory(_) => 0,
            Body::File(content) => content.size,
        }
    }

    pub fn nlink(&self) -> u32 {
        u32::from(self.is_named) + u32::from(matches!(self.body, Body::Directory(_)))
    }

    pub fn allocated_blocks(&self) -> u64 {
        match &self.body {
            Body::Directory(_) => 0,
            Body::File(content) => content.allocated_blocks(),
        }
    }
}

/// A tree of directories and files. A clone costs next to nothing, and shares no later change.
#[derive(Clone)]
pub struct Tree {
    nodes: BTreeMap<u64, Arc<Node>>,
    next: u64,
    allocated_blocks: u64,
}

impl Tree {
    pub fn new() -> Self {
        let root = Node::new(Body::Directory(BTreeMap::new()), String::new());
        Self {
            nodes: BTreeMap::from([(ROOT, Arc::new(root))]),
            next: ROOT + 1,
            allocated_blocks: 0,
        }
    }

    pub fn free_blocks(&self) -> u64 {
        (CAPACITY_BYTES / BLOCK as u64).saturating_sub(self.allocated_blocks)
    }

    pub fn node(&self, ino: u64) -> Answer<&Node> {
        self.nodes.get(&ino).map(|node| &**node).ok_or(libc::ESTALE)
    }

    fn node_mut(&mut self, ino: u64) -> Answer<&mut Node> {
        self.nodes.get_mut(&ino).map(Arc::make_mut).ok_or(libc::ESTALE)
    }

    pub fn entries(&self, ino: u64) -> Answer<&BTreeMap<OsString, u64>> {
        match &self.node(ino)?.body {
            Body::Directory(entries) => Ok(entries),
            Body::File(_) => Err(libc::ENOTDIR),
        }
    }

    fn entries_mut(&mut self, ino: u64) -> Answer<&mut BTreeMap<OsString, u64>> {
        let node = self.node_mut(ino)?;
        node.modified = SystemTime::now();
        match &mut node.body {
            Body::Directory(entries) => Ok(entries),
            Body::File(_) => Err(libc::ENOTDIR),
        }
    }

    pub fn child(&self, parent: u64, name: &OsStr) -> Answer<u64> {
        self.entries(parent)?.get(name).copied().ok_or(libc::ENOENT)
    }

    pub fn content(&self, ino: u64) -> Answer<&Content> {
        match &self.node(ino)?.body {
            Body::File(content) => Ok(content),
            Body::Directory(_) => Err(libc::EISDIR),
        }
    }

    /// The path that a name has, or would have.
    pub fn path(&self, parent: u64, name: &OsStr) -> String {
        let parent = self.node(parent).map_or("?", |node| &node.path);
        format!("{parent}/{}", name.to_string_lossy())
    }

    pub fn make(&mut self, parent: u64, name: &OsStr, body: Body) -> Answer<u64> {
        let path = self.path(parent, name);
        let ino = self.next;
        if self.child(parent, name).is_ok() {
            return Err(libc::EEXIST);
        }
        self.entries_mut(parent)?.insert(name.to_owned(), ino);
        self.nodes.insert(ino, Arc::new(Node::new(body, path)));
        self.next += 1;
        Ok(ino)
    }

    /// Takes a file's name; it goes with its last descriptor.
    pub fn unlink(&mut self, parent: u64, name: &OsStr) -> Answer<()> {
        let ino = self.child(parent, name)?;
        self.content(ino)?;
        self.entries_mut(parent)?.remove(name);
        self.node_mut(ino)?.is_named = false;
        self.reap(ino)
    }

    pub fn rmdir(&mut self, parent: u64, name: &OsStr) -> Answer<()> {
        let ino = self.child(parent, name)?;
        if !self.entries(ino)?.is_empty() {
            return Err(libc::ENOTEMPTY);
        }
        self.entries_mut(parent)?.remove(name);
        self.nodes.remove(&ino);
        Ok(())
    }

    pub fn rename(&mut self, parent: u64, name: &OsStr, new_parent: u64, new_name: &OsStr) -> Answer<()> {
        let ino = self.child(parent, name)?;
        match self.child(new_parent, new_name) {
            Ok(same) if same == ino => return Ok(()),
            Ok(replaced) if self.content(replaced).is_ok() => self.unlink(new_parent, new_name)?,
            Ok(_) => self.rmdir(new_parent, new_name)?,
            Err(_) => {}
        }
        self.entries_mut(parent)?.remove(name);
        self.entries_mut(new_parent)?.insert(new_name.to_owned(), ino);
        let path = self.path(new_parent, new_name);
        self.node_mut(ino)?.path = path;
        Ok(())
    }

    pub fn open(&mut self, ino: u64) -> Answer<()> {
        self.node_mut(ino)?.opened += 1;
        Ok(())
    }

    pub fn release(&mut self, ino: u64) -> Answer<()> {
        let node = self.node_mut(ino)?;
        node.opened = node.opened.saturating_sub(1);
        self.reap(ino)
    }

    fn reap(&mut self, ino: u64) -> Answer<()> {
        let node = self.node(ino)?;
        if !node.is_named && node.opened == 0 {
            self.allocated_blocks -= node.allocated_blocks();
            self.nodes.remove(&ino);
        }
        Ok(())
    }

    fn alter<T>(&mut self, ino: u64, change: impl FnOnce(&mut Content) -> T) -> Answer<T> {
        let node = self.node_mut(ino)?;
        let before = node.allocated_blocks();
        let Body::File(content) = &mut node.body else {
            return Err(libc::EISDIR);
        };
        let done = change(content);
        let after = node.allocated_blocks();
        self.allocated_blocks = self.allocated_blocks + after - before;
        Ok(done)
    }

    fn modify(&mut self, ino: u64, change: impl FnOnce(&mut Content)) -> Answer<()> {
        self.node_mut(ino)?.modified = SystemTime::now();
        self.alter(ino, change)
    }

    fn find_room(&self, bytes: u64) -> Answer<()> {
        match bytes.div_ceil(BLOCK as u64) < self.free_blocks() {
            true => Ok(()),
            false => Err(libc::ENOSPC),
        }
    }

    pub fn write(&mut self, ino: u64, offset: u64, data: &[u8]) -> Answer<()> {
        self.find_room(data.len() as u64)?;
        self.modify(ino, |content| content.write(offset, data))
    }

    pub fn resize(&mut self, ino: u64, size: u64) -> Answer<()> {
        self.modify(ino, |content| content.resize(size))
    }

    pub fn set_modified(&mut self, ino: u64, time: SystemTime) -> Answer<()> {
        self.node_mut(ino)?.modified = time;
        Ok(())
    }

    pub fn fallocate(&mut self, ino: u64, offset: u64, length: u64, mode: i32) -> Answer<()> {
        let range = offset..offset + length;
        if mode == libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE {
            let end = range
                .end
                .min(self.node(ino)?.size().next_multiple_of(BLOCK as u64));
            return self.modify(ino, |content| content.punch(range.start.min(end)..end));
        }
        if mode != 0 && mode != libc::FALLOC_FL_KEEP_SIZE {
            return Err(libc::EOPNOTSUPP);
        }
        self.find_room(length)?;
        self.modify(ino, |content| {
            content.allocate(range.clone());
            if mode == 0 {
                content.size = content.size.max(range.end);
            }
        })
    }

    pub fn seek(&self, ino: u64, offset: u64, for_data: bool) -> Answer<u64> {
        self.content(ino)?.seek(offset, for_data)
    }

    pub fn sync(&mut self, ino: u64) -> Answer<()> {
        self.alter(ino, Content::sync)
    }

    /// What a file was not synced of is lost, though it can still be asked for its size.
    pub fn lose_pages(&mut self, ino: u64) -> Answer<()> {
        self.alter(ino, Content::lose_pages)
    }

    /// Power fails: what was not synced is lost, of some files, and of others it had been written before. Names are taken to
    /// be there.
    pub fn lose_power(&mut self, had_been_written: impl Fn(u64) -> bool) {
        let files: Vec<u64> = self.nodes.keys().copied().collect();
        for ino in files {
            if had_been_written(ino) {
                continue;
            }
            let _is_file = self.alter(ino, |content| {
                let size = content.synced_size;
                content.lose_pages();
                if size < content.size {
                    content.resize(size);
                }
                content.size = size;
                content.sync();
            });
        }
        for node in self.nodes.values_mut() {
            Arc::make_mut(node).opened = 0;
        }
    }
}
