//! What may be found after a power cut: docs/crash-contract.md, as a program.

use crate::workload::PATHS;
use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const BLOCK: usize = 4096;

/// What a workload does.
#[derive(Debug, Clone)]
pub enum Op {
    Create(String),
    /// Opens, writes and closes: what is closed is delivered.
    Write {
        path: String,
        offset: u64,
        data: Vec<u8>,
        is_sync: bool,
    },
    Truncate(String, u64),
    Punch(String, u64, u64),
    Fsync(String),
    Fdatasync(String),
    SyncDir(String),
    Link(String, String),
    Unlink(String),
    Rename(String, String),
    Exchange(String, String),
    /// Writes through a shared mapping, and msync(2).
    Mmap(String, usize, Vec<u8>),
    /// Enables or disables the key that is not the volume's.
    Key(bool),
}

#[derive(Debug)]
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

pub fn failed(why: String) -> Violation {
    Violation(why)
}

/// When a step ends that does not: its daemon died.
pub const NEVER: usize = usize::MAX;

type Names = BTreeMap<String, usize>;

/// A step, with what had reached the disk when it began and when it returned.
struct Step {
    op: Op,
    start: usize,
    end: usize,
}

/// What was done. State number i is the one after step i, 0 the one before all.
pub struct History {
    steps: Vec<Step>,
    names: Vec<Names>,
    /// Of each file, every content it had, and since which state.
    contents: Vec<Vec<(usize, Vec<u8>)>>,
    /// States in which a file was made durable.
    synced: Vec<Vec<usize>>,
    /// States from which on a name promises what had been delivered.
    delivered: Vec<Vec<usize>>,
    keys: Vec<(usize, bool)>,
}

/// What was found.
pub struct Seen {
    files: BTreeMap<String, (u64, u64, Vec<u8>)>,
    key_state: String,
}

impl History {
    /// Begins with what is there, all of which is durable.
    pub fn beginning_with(seen: Seen) -> Self {
        let mut inodes = Vec::new();
        let mut names = Names::new();
        let mut contents = Vec::new();
        for (path, (ino, _, data)) in seen.files {
            let id = inodes
                .iter()
                .position(|known| *known == ino)
                .unwrap_or(inodes.len());
            if id == inodes.len() {
                inodes.push(ino);
                contents.push(vec![(0, data)]);
            }
            names.insert(path, id);
        }
        Self {
            steps: Vec::new(),
            names: vec![names],
            synced: vec![vec![0]; contents.len()],
            delivered: vec![Vec::new(); contents.len()],
            contents,
            keys: vec![(0, seen.key_state == "Enabled")],
        }
    }

    pub fn len(&self) -> usize {
        self.steps.len()
    }

    fn now(&self) -> &Names {
        self.names.last().unwrap()
    }

    pub fn exists(&self, path: &str) -> bool {
        self.now().contains_key(path)
    }

    pub fn is_same(&self, one: &str, other: &str) -> bool {
        self.now().get(one) == self.now().get(other)
    }

    pub fn content(&self, path: &str) -> &[u8] {
        &self.contents[self.now()[path]].last().unwrap().1
    }

    /// Notes a step that succeeded.
    pub fn note(&mut self, op: Op, start: usize, end: usize) {
        let state = self.steps.len() + 1;
        let mut names = self.now().clone();
        match &op {
            Op::Create(path) => {
                names.insert(path.clone(), self.contents.len());
                self.contents.push(vec![(state, Vec::new())]);
                self.synced.push(Vec::new());
                self.delivered.push(Vec::new());
            }
            Op::Write {
                path,
                offset,
                data,
                is_sync,
            } => {
                self.change(path, |content| put(content, *offset as usize, data));
                if *is_sync {
                    self.synced[names[path]].push(state);
                }
            }
            Op::Mmap(path, offset, data) => {
                self.change(path, |content| put(content, *offset, data));
                self.synced[names[path]].push(state);
            }
            Op::Truncate(path, size) => self.change(path, |content| content.resize(*size as usize, 0)),
            Op::Punch(path, offset, length) => self.change(path, |content| {
                let end = (offset + length).min(content.len() as u64) as usize;
                let start = (*offset as usize).min(end);
                content[start..end].fill(0);
            }),
            Op::Fsync(path) | Op::Fdatasync(path) => self.synced[names[path]].push(state),
            Op::SyncDir(_) => {}
            Op::Link(from, to) => {
                let id = names[from];
                names.insert(to.clone(), id);
                self.delivered[id].push(state);
            }
            Op::Unlink(path) => {
                names.remove(path);
            }
            Op::Rename(from, to) => {
                let id = names.remove(from).unwrap();
                names.insert(to.clone(), id);
                self.delivered[id].push(state);
            }
            Op::Exchange(one, other) => {
                let ids = (names[one], names[other]);
                names.insert(one.clone(), ids.1);
                names.insert(other.clone(), ids.0);
                self.delivered[ids.0].push(state);
                self.delivered[ids.1].push(state);
            }
            Op::Key(is_enabled) => self.keys.push((state, *is_enabled)),
        }
        self.names.push(names);
        self.steps.push(Step { op, start, end });
    }

    fn change(&mut self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let state = self.steps.len() + 1;
        let id = self.now()[path];
        let mut content = self.contents[id].last().unwrap().1.clone();
        change(&mut content);
        self.contents[id].push((state, content));
    }

    /// Whether what is seen may be there if a daemon died: what the host's page cache holds is not lost, and so no name is.
    pub fn check_after_death(&self, seen: &Seen) -> Result<(), Violation> {
        let returned = self.steps.iter().filter(|step| step.end != NEVER).count();
        self.check_from(returned, NEVER - 1, seen)
    }

    /// Whether what is seen may be there if power failed when `length` writes and flushes had been sent to the disk.
    pub fn check(&self, length: usize, seen: &Seen) -> Result<(), Violation> {
        let is_acknowledged = |state: &usize| self.steps[state - 1].end <= length;
        let syncs = self.steps.iter().zip(1..).filter(|(step, _)| step.op.persists());
        let least = syncs.map(|(_, state)| state).filter(is_acknowledged).max();
        self.check_from(least.unwrap_or(0), length, seen)
    }

    /// The same, with names no older than those of a state.
    fn check_from(&self, least: usize, length: usize, seen: &Seen) -> Result<(), Violation> {
        let begun = self.steps.iter().take_while(|step| step.start <= length).count();
        let is_acknowledged = |state: &usize| *state == 0 || self.steps[state - 1].end <= length;
        self.check_key(begun, is_acknowledged, &seen.key_state)?;
        let mut reason = failed(format!(
            "the names are those of no state from {least} to {begun}: {:?}",
            seen.files.keys()
        ));
        for state in (least..=begun).rev() {
            if !self.has_names(state, seen) {
                continue;
            }
            match self.check_contents(state, begun, is_acknowledged, seen) {
                Ok(()) => return Ok(()),
                Err(violation) => reason = failed(format!("with the names of state {state}: {violation}")),
            }
        }
        Err(reason)
    }

    fn check_key(
        &self,
        begun: usize,
        is_acknowledged: impl Fn(&usize) -> bool,
        seen: &str,
    ) -> Result<(), Violation> {
        let least = self
            .keys
            .iter()
            .rposition(|(state, _)| is_acknowledged(state))
            .unwrap();
        let possible = self.keys[least..].iter().filter(|(state, _)| *state <= begun);
        let name = |is_enabled| if is_enabled { "Enabled" } else { "Disabled" };
        match possible.clone().any(|(_, is_enabled)| name(*is_enabled) == seen) {
            true => Ok(()),
            false => Err(failed(format!(
                "the key is {seen}, possible are {:?}",
                possible.collect::<Vec<_>>()
            ))),
        }
    }

    fn has_names(&self, state: usize, seen: &Seen) -> bool {
        let names = &self.names[state];
        let same_paths = names.keys().eq(seen.files.keys());
        // Two names of one file are two names of one inode, and the link count says how many there are.
        same_paths
            && names.iter().all(|(path, id)| {
                let (ino, nlink, _) = &seen.files[path];
                let links = names.iter().filter(|(_, other)| *other == id);
                *nlink == links.clone().count() as u64
                    && links.into_iter().all(|(other, _)| seen.files[other].0 == *ino)
            })
    }

    fn check_contents(
        &self,
        state: usize,
        begun: usize,
        is_acknowledged: impl Fn(&usize) -> bool,
        seen: &Seen,
    ) -> Result<(), Violation> {
        for (path, id) in &self.names[state] {
            let synced = self.synced[*id].iter().copied().filter(&is_acknowledged).max();
            let delivered = self.delivered[*id]
                .iter()
                .copied()
                .filter(|at| *at <= state)
                .max();
            let least = synced.max(delivered).unwrap_or(0);
            let versions = &self.contents[*id];
            let first = versions
                .iter()
                .rposition(|(since, _)| *since <= least)
                .unwrap_or(0);
            let possible: Vec<&[u8]> = versions[first..]
                .iter()
                .filter(|(since, _)| *since <= begun)
                .map(|(_, data)| data.as_slice())
                .collect();
            check_content(&seen.files[path].2, &possible)
                .map_err(|violation| failed(format!("{path}, durable since state {least}: {violation}")))?;
        }
        Ok(())
    }
}

impl Seen {
    /// Reads everything in the mounted volume.
    pub fn of(mnt: &Path, key_state: String) -> Result<Self, Violation> {
        let mut files = BTreeMap::new();
        for dir in ["", "d", "e"] {
            let entries =
                std::fs::read_dir(mnt.join(dir)).map_err(|error| failed(format!("/{dir}: {error}")))?;
            for entry in entries {
                let entry = entry.map_err(|error| failed(format!("/{dir}: {error}")))?;
                let path = Path::new(dir)
                    .join(entry.file_name())
                    .to_str()
                    .unwrap()
                    .to_owned();
                let metadata = entry
                    .metadata()
                    .map_err(|error| failed(format!("{path}: {error}")))?;
                if metadata.is_dir() {
                    continue;
                }
                let data = std::fs::read(entry.path()).map_err(|error| failed(format!("{path}: {error}")))?;
                if data.len() as u64 != metadata.len() || !PATHS.contains(&path.as_str()) {
                    return Err(failed(format!(
                        "{path}: {} bytes of {}",
                        data.len(),
                        metadata.len()
                    )));
                }
                files.insert(path, (metadata.ino(), metadata.nlink(), data));
            }
        }
        Ok(Self { files, key_state })
    }
}

impl Op {
    /// Whether its return makes all that was done before durable.
    fn persists(&self) -> bool {
        matches!(
            self,
            Self::Fsync(_)
                | Self::Fdatasync(_)
                | Self::SyncDir(_)
                | Self::Mmap(..)
                | Self::Write { is_sync: true, .. }
        )
    }
}

fn put(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

/// Each block is that of one version, and the size is none that it never had nor passed.
fn check_content(data: &[u8], versions: &[&[u8]]) -> Result<(), Violation> {
    let sizes = versions.iter().map(|version| version.len());
    let (least, most) = (sizes.clone().min().unwrap(), sizes.max().unwrap());
    if data.len() < least || data.len() > most {
        return Err(failed(format!(
            "{} bytes, possible are {least} to {most}",
            data.len()
        )));
    }
    for (index, block) in data.chunks(BLOCK).enumerate() {
        let start = index * BLOCK;
        let is_of = |version: &&[u8]| {
            let end = version
                .len()
                .min(start + block.len())
                .max(start.min(version.len()));
            let there = version.get(start..end).unwrap_or_default();
            block[..there.len()] == *there && block[there.len()..].iter().all(|byte| *byte == 0)
        };
        if !versions.iter().any(is_of) {
            return Err(failed(format!(
                "block {index} is that of none of {} versions",
                versions.len()
            )));
        }
    }
    Ok(())
}

impl fmt::Display for History {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (state, step) in (1..).zip(&self.steps) {
            let op = match &step.op {
                Op::Write {
                    path,
                    offset,
                    data,
                    is_sync,
                } => {
                    format!("Write({path}, {offset}, {} bytes, sync {is_sync})", data.len())
                }
                Op::Mmap(path, offset, data) => format!("Mmap({path}, {offset}, {} bytes)", data.len()),
                op => format!("{op:?}"),
            };
            writeln!(out, "  {state}: {op}, writes {} to {}", step.start, step.end)?;
        }
        Ok(())
    }
}
