//! What may be seen of a volume whose storage failed: docs/crash-contract.md, as a program.
//!
//! An operation that was acknowledged has happened; one that failed may have. So there may be several worlds of names, and
//! several versions of a block. A sync that was acknowledged leaves nothing but what a reader could see then.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

const BLOCK: usize = 4096;

pub type FileId = usize;

/// What a workload does. Paths are relative to the root, which is "".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Create(&'static str),
    Mkdir(&'static str),
    Write {
        path: &'static str,
        offset: usize,
        length: usize,
    },
    Truncate(&'static str, usize),
    Punch(&'static str, usize, usize),
    ZeroRange(&'static str, usize, usize),
    Allocate(&'static str, usize, usize),
    Fsync(&'static str),
    Rename(&'static str, &'static str),
    Exchange(&'static str, &'static str),
    Link(&'static str, &'static str),
    Unlink(&'static str),
    Rmdir(&'static str),
    SetXattr(&'static str, &'static str, usize),
    RemoveXattr(&'static str, &'static str),
    /// Lets time pass, so that the background publishes, drains and reclaims.
    Wait,
    /// Closes and opens.
    Reopen,
}

impl Op {
    /// The paths that it is about.
    pub fn paths(&self) -> Vec<&'static str> {
        match *self {
            Self::Create(path)
            | Self::Mkdir(path)
            | Self::Write { path, .. }
            | Self::Truncate(path, _)
            | Self::Punch(path, ..)
            | Self::ZeroRange(path, ..)
            | Self::Allocate(path, ..)
            | Self::Fsync(path)
            | Self::Unlink(path)
            | Self::Rmdir(path)
            | Self::SetXattr(path, ..)
            | Self::RemoveXattr(path, _) => vec![path],
            Self::Rename(from, to) | Self::Exchange(from, to) | Self::Link(from, to) => vec![from, to],
            Self::Wait | Self::Reopen => Vec::new(),
        }
    }
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Acknowledged; of a write, so many bytes.
    Done(usize),
    /// Refused before anything was done.
    Refused,
    /// Failed: it may have happened, and a write in part.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    Dir,
    File(FileId),
}

/// Names and attributes, as they may be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
struct World {
    names: BTreeMap<String, Entry>,
    xattrs: BTreeMap<(FileId, String), Vec<u8>>,
    /// The last step that promises what of the file had been delivered by then.
    delivered: BTreeMap<FileId, usize>,
}

/// A value, and the step with which it was no longer what a reader sees.
#[derive(Debug, Clone)]
struct Version<T> {
    value: T,
    until: usize,
}

const LIVE: usize = usize::MAX;

/// The versions of something.
#[derive(Debug, Clone)]
struct Versions<T>(Vec<Version<T>>);

impl<T: Clone + PartialEq> Versions<T> {
    fn new(value: T) -> Self {
        Self(vec![Version { value, until: LIVE }])
    }

    /// What may have been seen at `step` or later.
    fn since(&self, step: usize) -> impl Iterator<Item = &T> {
        self.0
            .iter()
            .filter(move |version| version.until > step)
            .map(|version| &version.value)
    }

    fn live(&self) -> impl Iterator<Item = &T> {
        self.since(LIVE - 1)
    }

    /// A change with step `step`, which happened or, unless `is_certain`, may have.
    fn change(&mut self, step: usize, is_certain: bool, change: impl Fn(&T) -> T) {
        let mut new: Vec<T> = Vec::new();
        for version in self.0.iter_mut().filter(|version| version.until == LIVE) {
            let changed = change(&version.value);
            if changed != version.value {
                if is_certain {
                    version.until = step;
                }
                new.push(changed);
            }
        }
        for value in new {
            if !self.live().any(|live| *live == value) {
                self.0.push(Version { value, until: LIVE });
            }
        }
    }

    /// From step `step` on readers see what `is_seen` says.
    fn observe(&mut self, step: usize, is_seen: impl Fn(&T) -> bool) {
        for version in self.0.iter_mut().filter(|version| version.until == LIVE) {
            if !is_seen(&version.value) {
                version.until = step;
            }
        }
    }

    /// What is left of it once everything up to `step` is durable.
    fn forget_before(&mut self, step: usize) {
        self.0.retain(|version| version.until > step);
    }
}

type Block = Box<[u8]>;

fn zeros() -> Block {
    vec![0; BLOCK].into()
}

/// A file's content, block by block; beyond its end are zeros.
#[derive(Debug, Clone)]
struct File {
    /// From, to: how long it may be.
    size: Versions<(usize, usize)>,
    blocks: Vec<Versions<Block>>,
    /// The last step that made it durable.
    synced: usize,
}

impl File {
    fn new(synced: usize) -> Self {
        Self {
            size: Versions::new((0, 0)),
            blocks: Vec::new(),
            synced,
        }
    }

    /// Changes bytes `from` to `to` by what `fill` does to those of one block, which begin at its second argument.
    fn change(
        &mut self,
        step: usize,
        is_certain: bool,
        from: usize,
        to: usize,
        fill: impl Fn(&mut [u8], usize),
    ) {
        while self.blocks.len() * BLOCK < to {
            self.blocks.push(Versions::new(zeros()));
        }
        if from >= to {
            return;
        }
        for index in from / BLOCK..to.div_ceil(BLOCK) {
            let start = from.max(index * BLOCK);
            let end = to.min((index + 1) * BLOCK);
            self.blocks[index].change(step, is_certain, |block| {
                let mut block = block.clone();
                fill(&mut block[start - index * BLOCK..end - index * BLOCK], start);
                block
            });
        }
    }

    fn reach(&mut self, step: usize, is_certain: bool, end: usize) {
        self.size
            .change(step, is_certain, |(least, most)| match is_certain {
                true => (end.max(*least), end.max(*most)),
                // A part of it may be there.
                false => (*least, end.max(*most)),
            });
    }

    fn write(&mut self, step: usize, is_certain: bool, offset: usize, data: &[u8]) {
        self.change(step, is_certain, offset, offset + data.len(), |bytes, at| {
            bytes.copy_from_slice(&data[at - offset..at - offset + bytes.len()])
        });
        self.reach(step, is_certain, offset + data.len());
    }

    fn zero(&mut self, step: usize, is_certain: bool, from: usize, to: usize) {
        let to = to.min(self.blocks.len() * BLOCK);
        self.change(step, is_certain, from.min(to), to, |bytes, _| bytes.fill(0));
    }

    fn truncate(&mut self, step: usize, is_certain: bool, size: usize) {
        self.zero(step, is_certain, size, usize::MAX);
        self.size.change(step, is_certain, |_| (size, size));
    }

    /// Whether `data` may be read of what is left since step `since`.
    fn explains(&self, data: &[u8], since: usize) -> Result<(), String> {
        let is_size = |(least, most): &(usize, usize)| (*least..=*most).contains(&data.len());
        let sizes = || self.size.since(since);
        // A size between two of its own may be that of a part of what was written.
        let (least, most) = sizes().fold((usize::MAX, 0), |(least, most), size| {
            (least.min(size.0), most.max(size.1))
        });
        let is_between = since < LIVE - 1 && (least..=most).contains(&data.len());
        if !sizes().any(is_size) && !is_between {
            return Err(format!("{} bytes, possible are {least} to {most}", data.len()));
        }
        for (index, block) in data.chunks(BLOCK).enumerate() {
            let is_of = |version: &Block| version[..block.len()] == *block;
            let is_explained = match self.blocks.get(index) {
                Some(versions) => versions.since(since).any(is_of),
                None => block.iter().all(|byte| *byte == 0),
            };
            if !is_explained {
                let count = self.blocks.get(index).map_or(1, |all| all.since(since).count());
                return Err(format!("block {index} is that of none of {count} versions"));
            }
        }
        Ok(())
    }

    /// What a reader was shown is what there is.
    fn observe(&mut self, step: usize, data: &[u8]) {
        let size = data.len();
        self.size
            .observe(step, |(least, most)| (*least..=*most).contains(&size));
        self.size.change(step, true, |_| (size, size));
        for (block, versions) in data.chunks(BLOCK).zip(&mut self.blocks) {
            versions.observe(step, |version| version[..block.len()] == *block);
        }
    }

    fn sync(&mut self, step: usize) {
        self.synced = step;
        self.size.forget_before(step);
        self.blocks
            .iter_mut()
            .for_each(|versions| versions.forget_before(step));
    }
}

/// What is seen of one path.
#[derive(Debug, Clone)]
pub struct Found {
    pub ino: u64,
    pub nlink: u32,
    /// A file's content, or why it could not be read; of a directory nothing.
    pub content: Option<Result<Vec<u8>, String>>,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// What is seen of a volume, by path.
pub type Seen = BTreeMap<String, Found>;

/// What was done, and what may be there.
#[derive(Clone)]
pub struct Oracle {
    /// The worlds after each step since the one that was last made durable, each with the step's number.
    worlds: Vec<(usize, Vec<World>)>,
    files: BTreeMap<FileId, File>,
    inodes: BTreeMap<u64, FileId>,
    step: usize,
    history: Vec<(Op, Outcome)>,
}

impl Oracle {
    /// An empty volume.
    pub fn new() -> Self {
        Self {
            worlds: vec![(0, vec![World::default()])],
            files: BTreeMap::new(),
            inodes: BTreeMap::new(),
            step: 0,
            history: Vec::new(),
        }
    }

    fn live(&self) -> &[World] {
        &self.worlds.last().unwrap().1
    }

    /// The file that a lookup of `path` leads to, or that it leads nowhere.
    pub fn looked_up(&mut self, path: &str, ino: Option<u64>) -> Result<(), String> {
        let possible: BTreeSet<_> = self
            .live()
            .iter()
            .map(|world| world.names.get(path).copied())
            .collect();
        let known = ino.and_then(|ino| self.inodes.get(&ino).copied());
        let is_new = |entry: &Entry| match entry {
            Entry::Dir => true,
            Entry::File(id) => self.inodes.values().all(|other| other != id),
        };
        let found = possible.iter().copied().find(|entry| match (entry, ino) {
            (None, None) | (Some(Entry::Dir), Some(_)) => true,
            (Some(Entry::File(id)), Some(_)) => {
                known.map_or_else(|| is_new(&Entry::File(*id)), |known| known == *id)
            }
            _ => false,
        });
        let entry =
            found.ok_or_else(|| format!("'{path}' leads to inode {ino:?}, possible are {possible:?}"))?;
        if let (Some(Entry::File(id)), Some(ino)) = (entry, ino) {
            self.inodes.insert(ino, id);
        }
        let mut worlds = self.live().to_vec();
        worlds.retain(|world| world.names.get(path).copied() == entry);
        self.narrow(worlds);
        Ok(())
    }

    /// Notes what was done, with `data` for what an operation writes.
    pub fn note(&mut self, op: &Op, data: &[u8], outcome: Outcome) -> Result<(), String> {
        self.step += 1;
        let step = self.step;
        self.history.push((op.clone(), outcome));
        if outcome == Outcome::Refused {
            return Ok(());
        }
        let is_certain = outcome != Outcome::Failed;
        self.change_content(op, data, outcome);
        let mut after: BTreeSet<World> = BTreeSet::new();
        for world in self.live() {
            after.extend(world.after(op, data, step, is_certain));
            if !is_certain {
                after.insert(world.clone());
            }
        }
        if after.is_empty() {
            return Err(format!("{op:?} succeeded, and cannot have"));
        }
        if matches!(op, Op::Create(_)) {
            self.files.insert(step, File::new(step));
        }
        if after.len() > 1 || !self.live().iter().eq(&after) {
            self.worlds.push((step, after.into_iter().collect()));
        }
        if let (Op::Fsync(path), true) = (op, is_certain) {
            self.synced(path);
        }
        Ok(())
    }

    fn ids(&self, path: &str) -> BTreeSet<FileId> {
        let entries = self.live().iter().filter_map(|world| world.names.get(path));
        entries
            .filter_map(|entry| match entry {
                Entry::File(id) => Some(*id),
                Entry::Dir => None,
            })
            .collect()
    }

    fn change_content(&mut self, op: &Op, data: &[u8], outcome: Outcome) {
        let (Op::Write { path, .. }
        | Op::Truncate(path, _)
        | Op::Punch(path, ..)
        | Op::ZeroRange(path, ..)
        | Op::Allocate(path, ..)) = op
        else {
            return;
        };
        let ids = self.ids(path);
        let is_certain = outcome != Outcome::Failed && ids.len() == 1;
        let step = self.step;
        for id in ids {
            let file = self.files.get_mut(&id).unwrap();
            match *op {
                Op::Write { offset, length, .. } => {
                    let done = match outcome {
                        Outcome::Done(count) => count.min(length),
                        _ => 0,
                    };
                    if done > 0 {
                        file.write(step, is_certain, offset, &data[..done]);
                    }
                    // Of what was not counted, blocks that were there before may have been taken in.
                    if done < length {
                        file.write(step, false, offset + done, &data[done..]);
                    }
                }
                Op::Truncate(_, size) => file.truncate(step, is_certain, size),
                Op::Punch(_, offset, length) => file.zero(step, is_certain, offset, offset + length),
                Op::ZeroRange(_, offset, length) => {
                    file.zero(step, is_certain, offset, offset + length);
                    file.reach(step, is_certain, offset + length);
                }
                Op::Allocate(_, offset, length) => file.reach(step, is_certain, offset + length),
                _ => {}
            }
        }
    }

    /// A sync of `path` was acknowledged: its content, and every name up to now.
    fn synced(&mut self, path: &str) {
        let ids = self.ids(path);
        if let (1, Some(id)) = (ids.len(), ids.first()) {
            let step = self.step;
            self.files.get_mut(id).unwrap().sync(step);
        }
        self.forget_worlds();
    }

    fn forget_worlds(&mut self) {
        let live = self.worlds.pop();
        self.worlds = live.into_iter().collect();
    }

    /// Everything was put away in good order.
    pub fn closed(&mut self) {
        self.step += 1;
        let step = self.step;
        self.files.values_mut().for_each(|file| file.sync(step));
        self.forget_worlds();
    }

    /// A reader of the live volume sees this of one file.
    pub fn read(&mut self, path: &str, data: &[u8]) -> Result<(), String> {
        self.step += 1;
        let (ids, step) = (self.ids(path), self.step);
        let mut reason = format!("'{path}' is no file");
        for id in &ids {
            let file = self.files.get_mut(id).unwrap();
            match file.explains(data, LIVE - 1) {
                Ok(()) => {
                    if ids.len() == 1 {
                        file.observe(step, data);
                    }
                    return Ok(());
                }
                Err(why) => reason = format!("'{path}': {why}"),
            }
        }
        Err(reason)
    }

    /// The live volume shows all of this: names, links and attributes are those of one world, and what could be read is what
    /// there is.
    pub fn observe(&mut self, seen: &Seen) -> Result<(), String> {
        self.learn_inodes(seen);
        let mut worlds = self.live().to_vec();
        let mut reason = String::new();
        worlds.retain(|world| match world.shows(seen, &self.inodes) {
            Ok(()) => true,
            Err(why) => {
                reason = why;
                false
            }
        });
        if worlds.is_empty() {
            return Err(reason);
        }
        self.narrow(worlds);
        for (path, found) in seen {
            if let Some(Ok(data)) = &found.content {
                self.read(path, data)?;
            }
        }
        Ok(())
    }

    /// Readers see one of these worlds; after a crash any of those before may be there.
    fn narrow(&mut self, worlds: Vec<World>) {
        if worlds != self.live() {
            self.worlds.push((self.step, worlds));
        }
    }

    /// An inode that was not known is that of a file that was made, or may have been, under its name.
    fn learn_inodes(&mut self, seen: &Seen) {
        for (path, found) in seen {
            if found.content.is_none() || self.inodes.contains_key(&found.ino) {
                continue;
            }
            let taken: BTreeSet<FileId> = self.inodes.values().copied().collect();
            let possible = self.worlds.iter().flat_map(|(_, worlds)| worlds);
            let id = possible
                .filter_map(|world| match world.names.get(path) {
                    Some(Entry::File(id)) if !taken.contains(id) => Some(*id),
                    _ => None,
                })
                .max();
            if let Some(id) = id {
                self.inodes.insert(found.ino, id);
            }
        }
    }

    /// Whether this may be there after the volume ended, in good order or not.
    pub fn check(&mut self, seen: &Seen) -> Result<(), String> {
        self.learn_inodes(seen);
        let mut reasons = Vec::new();
        for (step, worlds) in self.worlds.iter().rev() {
            for world in worlds {
                let shown = world.shows(seen, &self.inodes);
                match shown.and_then(|()| self.check_contents(world, seen)) {
                    Ok(()) => return Ok(()),
                    Err(why) => reasons.push(format!("not of step {step}: {why}")),
                }
            }
        }
        Err(reasons.join("\n    "))
    }

    fn check_contents(&self, world: &World, seen: &Seen) -> Result<(), String> {
        for (path, found) in seen {
            let (Some(content), Some(id)) = (&found.content, self.inodes.get(&found.ino)) else {
                continue;
            };
            let file = &self.files[id];
            let delivered = world.delivered.get(id).copied().unwrap_or(0);
            let since = file.synced.max(delivered);
            let data = content.as_ref().map_err(|why| format!("'{path}': {why}"))?;
            file.explains(data, since)
                .map_err(|why| format!("'{path}', durable since step {since}: {why}"))?;
        }
        Ok(())
    }

    /// From now on what is seen is all there is.
    pub fn restart(&mut self, seen: &Seen) -> Result<(), String> {
        self.check(seen)?;
        // Whatever may have been there may be what is there now.
        let mut worlds: BTreeSet<World> = BTreeSet::new();
        for (_, possible) in &self.worlds {
            worlds.extend(possible.iter().cloned());
        }
        for file in self.files.values_mut() {
            for version in &mut file.size.0 {
                version.until = LIVE;
            }
            for version in file.blocks.iter_mut().flat_map(|versions| &mut versions.0) {
                version.until = LIVE;
            }
        }
        for (path, found) in seen {
            // The size may be one between two, as that of a part of a write.
            let (Some(Ok(data)), Some(id)) = (&found.content, self.inodes.get(&found.ino)) else {
                continue;
            };
            let file = self
                .files
                .get_mut(id)
                .ok_or_else(|| format!("'{path}' is unknown"))?;
            file.size = Versions::new((data.len(), data.len()));
        }
        self.worlds = vec![(self.step, worlds.into_iter().collect())];
        self.observe(seen)?;
        self.closed();
        Ok(())
    }
}

impl World {
    /// The world that `op` makes of this one; `None` if it cannot succeed here.
    fn after(&self, op: &Op, data: &[u8], step: usize, is_certain: bool) -> Option<Self> {
        let mut world = self.clone();
        let names = &mut world.names;
        let is_file = |path: &str| matches!(self.names.get(path), Some(Entry::File(_)));
        let file = |path: &str| match self.names.get(path) {
            Some(Entry::File(id)) => Some(*id),
            _ => None,
        };
        match *op {
            Op::Create(path) | Op::Mkdir(path) => {
                let entry = match op {
                    Op::Create(_) => Entry::File(step),
                    _ => Entry::Dir,
                };
                if names.insert(path.to_owned(), entry).is_some() {
                    return None;
                }
            }
            Op::Unlink(path) => {
                file(path)?;
                names.remove(path);
            }
            Op::Rmdir(path) => {
                if names.remove(path) != Some(Entry::Dir) {
                    return None;
                }
            }
            Op::Rename(from, to) => {
                let id = file(from)?;
                names.remove(from);
                names.insert(to.to_owned(), Entry::File(id));
                world.delivered.insert(id, step);
            }
            Op::Exchange(one, other) => {
                let ids = (file(one)?, file(other)?);
                names.insert(one.to_owned(), Entry::File(ids.1));
                names.insert(other.to_owned(), Entry::File(ids.0));
                world.delivered.insert(ids.0, step);
                world.delivered.insert(ids.1, step);
            }
            Op::Link(from, to) => {
                let id = file(from)?;
                if names.insert(to.to_owned(), Entry::File(id)).is_some() {
                    return None;
                }
                world.delivered.insert(id, step);
            }
            Op::SetXattr(path, name, _) => {
                world.xattrs.insert((file(path)?, name.to_owned()), data.to_vec());
            }
            Op::RemoveXattr(path, name) => {
                world.xattrs.remove(&(file(path)?, name.to_owned()))?;
            }
            // These publish what they change, and at once.
            Op::Truncate(path, _)
            | Op::Punch(path, ..)
            | Op::ZeroRange(path, ..)
            | Op::Allocate(path, ..) => {
                let id = file(path)?;
                if is_certain && matches!(op, Op::Truncate(..) | Op::Punch(..) | Op::ZeroRange(..)) {
                    world.delivered.insert(id, step);
                }
            }
            Op::Write { path, .. } => drop(file(path)?),
            Op::Fsync(path) => {
                if !path.is_empty() && !is_file(path) && self.names.get(path) != Some(&Entry::Dir) {
                    return None;
                }
            }
            Op::Wait | Op::Reopen => {}
        }
        Some(world)
    }

    /// Whether it is these names, links and attributes.
    fn shows(&self, seen: &Seen, inodes: &BTreeMap<u64, FileId>) -> Result<(), String> {
        if !self.names.keys().eq(seen.keys()) {
            return Err(format!(
                "the names are {:?}, possible are {:?}",
                seen.keys().collect::<Vec<_>>(),
                self.names.keys().collect::<Vec<_>>()
            ));
        }
        for ((path, entry), found) in self.names.iter().zip(seen.values()) {
            let Entry::File(id) = entry else {
                if found.content.is_some() {
                    return Err(format!("'{path}' is no directory"));
                }
                continue;
            };
            if inodes.get(&found.ino) != Some(id) {
                return Err(format!(
                    "'{path}' is file {:?}, not file {id}",
                    inodes.get(&found.ino)
                ));
            }
            let links = self.names.values().filter(|other| *other == entry).count();
            if found.nlink as usize != links {
                return Err(format!("'{path}' has {} links, not {links}", found.nlink));
            }
            let xattrs = self.xattrs.range((*id, String::new())..(*id + 1, String::new()));
            let xattrs: BTreeMap<_, _> = xattrs
                .map(|((_, name), value)| (name.clone(), value.clone()))
                .collect();
            if xattrs != found.xattrs {
                return Err(format!(
                    "'{path}' has the attributes {:?}, not {:?}",
                    found.xattrs.keys(),
                    xattrs.keys()
                ));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Oracle {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (op, outcome) in &self.history {
            writeln!(out, "    {op:?}: {outcome:?}")?;
        }
        Ok(())
    }
}
