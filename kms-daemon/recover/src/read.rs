//! Copies of directories, read whole; databases in them, read through RocksDB as far as it takes them.

use rocksdb::{DB, IteratorMode, Options};
use std::path::{Path, PathBuf};

/// One file of a copy.
#[derive(Debug)]
pub(crate) struct Bytes {
    pub(crate) bytes: Vec<u8>,
}

/// A directory and everything below.
#[derive(Debug)]
pub struct Copy {
    pub(crate) dir: PathBuf,
    pub(crate) files: Vec<Bytes>,
}

impl Copy {
    /// Reads all of it.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(dir: &Path) -> Result<Self, String> {
        let mut copy = Self {
            dir: dir.to_owned(),
            files: Vec::new(),
        };
        for path in walk(dir)? {
            copy.files.push(file(&path)?);
        }
        Ok(copy)
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.len() as u64).sum()
    }
}

/// Every regular file below, in order.
pub(crate) fn walk(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
    let mut found = Vec::new();
    let mut entries: Vec<_> = std::fs::read_dir(dir)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            found.extend(walk(&entry.path())?);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

pub(crate) fn file(path: &Path) -> Result<Bytes, String> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Bytes { bytes })
}

/// A row: its key, its value.
pub(crate) type Row = (Box<[u8]>, Box<[u8]>);

/// A database that is read, and never written.
pub(crate) struct Database(DB);

impl Database {
    /// `None` if there is none that RocksDB takes.
    pub(crate) fn open(dir: &Path) -> Option<Self> {
        let options = Options::default();
        let families = DB::list_cf(&options, dir).ok()?;
        DB::open_cf_for_read_only(&options, dir, families, false)
            .ok()
            .map(Self)
    }

    /// Every row of a family.
    pub(crate) fn rows(&self, family: &str) -> Vec<Row> {
        let Some(handle) = self.0.cf_handle(family) else {
            return Vec::new();
        };
        self.0
            .iterator_cf(handle, IteratorMode::Start)
            .filter_map(Result::ok)
            .collect()
    }

    /// One row.
    pub(crate) fn get(&self, family: &str, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get_cf(self.0.cf_handle(family)?, key).ok()?
    }
}
