//! The store of the models, in RocksDB's place: the log is all there is, in memory. It knows which of its batches are
//! durable, and so every state that a power cut may leave. Other threads may come before and after each operation.

use super::error::{Error, Result};
use super::format::rowkey::Family;
use shuttle::thread::yield_now;
use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// One change of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Put(Family, Vec<u8>, Vec<u8>),
    Delete(Family, Vec<u8>),
    DeleteRange(Family, Vec<u8>, Vec<u8>),
}

pub(crate) type Row = (Box<[u8]>, Box<[u8]>);
pub(crate) type Rows<'s> = Box<dyn Iterator<Item = Result<Row>> + 's>;

/// A log in memory has none.
#[derive(Clone, Copy)]
#[expect(dead_code, reason = "a log in memory takes no heed of them")]
pub(crate) struct Sizes {
    pub(crate) cache_bytes: usize,
    pub(crate) write_buffer_bytes: usize,
    pub(crate) log_bytes_max: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Roomy,
    Tight,
    ReadOnly,
}

#[derive(Debug)]
pub(crate) enum SyncError {
    AppendFailed,
    Failed(Error),
}

type Map = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

/// What is on the disk.
#[derive(Default, Clone)]
pub(crate) struct Disk {
    pub(crate) log: Vec<Vec<Change>>,
    /// Batches at the log's beginning that a power cut leaves.
    pub(crate) synced: usize,
    /// Appends and syncs that succeed before one fails; none fails without it.
    pub(crate) good: Option<usize>,
    /// Appends that succeed before one finds no room; all do without it.
    pub(crate) room: Option<usize>,
    /// Whether the append without room is there all the same.
    pub(crate) is_there: bool,
    /// Whether there is no room for the log when it is opened again the first time.
    pub(crate) shuts: bool,
    /// Whether it is open for reading alone.
    is_shut: bool,
    /// An append found no room: nothing more is taken until the log is opened again.
    is_latched: bool,
    /// A sync failed: what it was to make durable may be gone, though later ones succeed (fsync(2)'s own way).
    is_broken: bool,
    /// What was there when the log was opened again may be gone, which the store knows.
    is_lost: bool,
    rows: Map,
}

impl Disk {
    /// The disk after a power cut that left the first `count` batches.
    #[cfg(test)]
    pub(crate) fn cut(&self, count: usize) -> Self {
        let mut disk = Self::default();
        for batch in self.log.iter().take(count) {
            disk.append(batch.clone());
        }
        disk.synced = count;
        disk
    }

    fn append(&mut self, batch: Vec<Change>) {
        for change in &batch {
            match change {
                Change::Put(family, key, value) => {
                    self.rows.insert((*family as u8, key.clone()), value.clone());
                }
                Change::Delete(family, key) => {
                    self.rows.remove(&(*family as u8, key.clone()));
                }
                Change::DeleteRange(family, from, to) => {
                    let range = (*family as u8, from.clone())..(*family as u8, to.clone());
                    self.rows.retain(|key, _| !range.contains(key));
                }
            }
        }
        self.log.push(batch);
    }

    fn finds_no_room(&mut self) -> bool {
        let is_full = self.room == Some(0);
        self.room = match self.room {
            Some(0) => None,
            room => room.map(|room| room - 1),
        };
        is_full
    }

    /// Makes what is there durable, unless a sync failed before. Nothing else is under way meanwhile.
    fn reopen(&mut self) -> Result<()> {
        self.is_latched = false;
        self.is_shut = std::mem::take(&mut self.shuts);
        self.is_lost |= self.is_broken || self.fails();
        if self.is_lost {
            return Err(failed());
        }
        self.synced = self.log.len();
        Ok(())
    }

    fn fails(&mut self) -> bool {
        let fails = self.good == Some(0);
        self.good = match self.good {
            Some(0) => None,
            good => good.map(|good| good - 1),
        };
        fails
    }
}

/// The rows of one moment.
pub(crate) struct Moment<'d> {
    rows: Map,
    _store: PhantomData<&'d Store>,
}

/// A place among them.
pub(crate) struct Cursor<'m> {
    rows: std::iter::Peekable<std::collections::btree_map::Range<'m, (u8, Vec<u8>), Vec<u8>>>,
}

impl Store {
    pub(crate) fn at_one_moment<T>(&self, look: impl FnOnce(&Moment<'_>) -> Result<T>) -> Result<T> {
        let rows = self.disk().rows.clone();
        yield_now();
        look(&Moment {
            rows,
            _store: PhantomData,
        })
    }
}

impl Moment<'_> {
    pub(crate) fn go_on(&self) -> Result<()> {
        Ok(())
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.rows.get(&(family as u8, key.to_vec())).cloned())
    }

    pub(crate) fn cursor(&self, family: Family, from: &[u8], to: &[u8]) -> Result<Cursor<'_>> {
        let range = (family as u8, from.to_vec())..(family as u8, to.to_vec());
        Ok(Cursor {
            rows: self.rows.range(range).peekable(),
        })
    }
}

impl Cursor<'_> {
    pub(crate) fn row(&mut self) -> Result<Option<(&[u8], &[u8])>> {
        let row = self.rows.peek();
        Ok(row.map(|((_, key), value)| (key.as_slice(), value.as_slice())))
    }

    pub(crate) fn advance(&mut self) {
        self.rows.next();
    }
}

/// The disks by their directories, for stores that are opened again.
static DISKS: LazyLock<Mutex<HashMap<PathBuf, Arc<Mutex<Disk>>>>> = LazyLock::new(Mutex::default);

/// The open log.
#[derive(Default)]
pub(crate) struct Store(Arc<Mutex<Disk>>);

impl Store {
    pub(crate) fn create(dir: &Path, _: Sizes) -> Result<Self> {
        Ok(Self::with(dir, Disk::default()))
    }

    pub(crate) fn open(dir: &Path, _: Sizes, _: Mode) -> Result<Self> {
        let disks = lock(&DISKS);
        let disk = disks.get(dir).ok_or(Error::Posix(libc::ENOENT))?;
        Ok(Self(Arc::clone(disk)))
    }

    pub(crate) fn reopen(&self, _: Mode) -> Result<()> {
        yield_now();
        let reopened = self.disk().reopen();
        yield_now();
        reopened
    }

    pub(crate) fn mode(&self) -> Mode {
        match self.disk().is_shut {
            true => Mode::ReadOnly,
            false => Mode::Roomy,
        }
    }

    pub(crate) fn flush_bytes(&self) -> u64 {
        0
    }

    pub(crate) fn compact(&self, _: impl Fn() -> Result<u64>, _: impl Fn() -> Result<()>) -> Result<bool> {
        Ok(true)
    }

    /// Puts a disk where a store is opened.
    pub(crate) fn with(dir: &Path, disk: Disk) -> Self {
        let disk = Arc::new(Mutex::new(disk));
        lock(&DISKS).insert(dir.to_path_buf(), Arc::clone(&disk));
        Self(disk)
    }

    /// What is on the disk, which is not to be held where another thread may come.
    pub(crate) fn disk(&self) -> MutexGuard<'_, Disk> {
        lock(&self.0)
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        yield_now();
        Ok(self.disk().rows.get(&(family as u8, key.to_vec())).cloned())
    }

    pub(crate) fn multi_get(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>> {
        keys.iter().map(|key| self.get(family, key)).collect()
    }

    pub(crate) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: &[u8],
        mut show: impl FnMut(&[u8], &[u8]) -> Result<bool>,
    ) -> Result<()> {
        for row in self.rows(family, from, to) {
            let (key, value) = row?;
            if !show(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    pub(crate) fn rows(&self, family: Family, from: &[u8], to: &[u8]) -> Rows<'_> {
        yield_now();
        let range = (family as u8, from.to_vec())..(family as u8, to.to_vec());
        let disk = self.disk();
        let rows = disk.rows.range(range);
        let rows: Vec<_> = rows
            .map(|((_, key), value)| Ok((key.as_slice().into(), value.as_slice().into())))
            .collect();
        Box::new(rows.into_iter())
    }

    pub(crate) fn write<'a>(&self, changes: impl Iterator<Item = &'a Change>) -> Result<()> {
        let batch = changes.cloned().collect();
        yield_now();
        {
            let mut disk = self.disk();
            if disk.is_latched || disk.finds_no_room() {
                if !disk.is_latched && disk.is_there {
                    disk.append(batch);
                }
                disk.is_latched = true;
                return Err(Error::Posix(libc::ENOSPC));
            }
            if disk.fails() {
                return Err(failed());
            }
            disk.append(batch);
        }
        yield_now();
        Ok(())
    }

    pub(crate) fn sync_log(&self) -> std::result::Result<(), SyncError> {
        let reached = self.disk().log.len();
        yield_now();
        {
            let mut disk = self.disk();
            if disk.is_latched {
                return Err(SyncError::AppendFailed);
            }
            if disk.is_shut && !disk.is_lost {
                return Ok(());
            }
            if disk.is_lost || disk.fails() {
                disk.is_broken = true;
                return Err(SyncError::Failed(failed()));
            }
            if !disk.is_broken {
                disk.synced = disk.synced.max(reached);
            }
        }
        yield_now();
        Ok(())
    }

    pub(crate) fn flush(&self) -> Result<()> {
        self.sync_log().map_err(|_| failed())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed() -> Error {
    Error::Storage {
        errno: libc::EIO,
        message: "an operation of the log failed".to_owned(),
    }
}
