//! Slot files: one per large file, nothing in them but 4 KiB slots of ciphertext at 4 KiB offsets.

use super::error::{Error, Result};
use super::format::chunk::CHUNK;
use super::sync::{Mutex, rank};
use super::types::{Domain, Ino};
use lru::LruCache;
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Open slot files kept; more are reopened on use.
const OPEN_FILES_MAX: usize = 512;
const SHARDS: u64 = 256;

/// The slot files of a volume.
pub(crate) struct Slots {
    dir: PathBuf,
    read_only: bool,
    open: Mutex<LruCache<Ino, Arc<SlotFile>>, rank::SlotFiles>,
}

/// A file where slot files are.
pub(crate) struct FoundFile {
    pub(crate) path: PathBuf,
    /// Whose slot file it is, if its name says so.
    pub(crate) ino: Option<Ino>,
    /// What it takes of the host's space.
    pub(crate) allocated_bytes: u64,
    /// When it was last written.
    pub(crate) modified: SystemTime,
}

impl FoundFile {
    fn foreign(path: PathBuf) -> Self {
        Self {
            path,
            ino: None,
            allocated_bytes: 0,
            modified: SystemTime::UNIX_EPOCH,
        }
    }
}

/// One open slot file.
pub(crate) struct SlotFile(File);

impl Slots {
    /// Makes the directories of a new volume.
    pub(crate) fn create(dir: &Path) -> Result<()> {
        for shard in 0..SHARDS {
            let shard = dir.join(format!("{shard:02x}"));
            std::fs::create_dir_all(&shard).map_err(|error| Error::io("create data directory", &error))?;
        }
        sync_dir(dir)
    }

    pub(crate) fn new(dir: PathBuf, read_only: bool) -> Self {
        let open = LruCache::new(NonZeroUsize::new(OPEN_FILES_MAX).unwrap_or(NonZeroUsize::MIN));
        Self {
            dir,
            read_only,
            open: Mutex::new(open),
        }
    }

    fn path(&self, ino: Ino) -> PathBuf {
        self.dir
            .join(format!("{:02x}", ino.0 % SHARDS))
            .join(format!("{:016x}", ino.0))
    }

    /// The slot file of an inode that has published slots.
    pub(crate) fn existing(&self, ino: Ino) -> Result<Arc<SlotFile>> {
        let access = match self.read_only {
            true => OFlags::RDONLY,
            false => OFlags::RDWR,
        };
        self.get(ino, access | OFlags::CLOEXEC)
    }

    /// The slot file of an inode that has none published: what an earlier crash left in it is thrown away.
    pub(crate) fn fresh(&self, ino: Ino) -> Result<Arc<SlotFile>> {
        self.restore_shard(ino)?;
        let file = self.get(
            ino,
            OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC,
        )?;
        if let Some(parent) = self.path(ino).parent() {
            sync_dir(parent)?;
        }
        Ok(file)
    }

    /// Makes a directory that a backup left out because it was empty.
    fn restore_shard(&self, ino: Ino) -> Result<()> {
        let path = self.path(ino);
        let Some(shard) = path.parent().filter(|shard| !shard.exists()) else {
            return Ok(());
        };
        std::fs::create_dir_all(shard).map_err(|error| Error::io("create data directory", &error))?;
        sync_dir(&self.dir)
    }

    fn get(&self, ino: Ino, flags: OFlags) -> Result<Arc<SlotFile>> {
        if let Some(file) = self.open.lock().get(&ino) {
            return Ok(Arc::clone(file));
        }
        let fd = rustix::fs::open(self.path(ino), flags, Mode::RUSR | Mode::WUSR).map_err(|errno| {
            if errno == rustix::io::Errno::NOENT {
                return Error::Corrupt {
                    what: format!("slot file of inode {}", ino.0),
                };
            }
            Error::io("open slot file", &errno.into())
        })?;
        let file = Arc::new(SlotFile(File::from(fd)));
        self.open.lock().put(ino, Arc::clone(&file));
        Ok(file)
    }

    /// Whether the inode has a slot file, used or not.
    pub(crate) fn exists(&self, ino: Ino) -> bool {
        self.path(ino).exists()
    }

    /// Shows every file below the directory of slot files.
    pub(crate) fn each_file(&self, mut show: impl FnMut(FoundFile) -> Result<()>) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("read the data directory", &error);
        let list = |dir: &Path| -> Result<Vec<PathBuf>> {
            let entries = std::fs::read_dir(dir).map_err(failed)?;
            let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed));
            paths.collect()
        };
        let is_shard = |dir: &Path| {
            let name = dir.file_name().and_then(OsStr::to_str).unwrap_or_default();
            name.len() == 2 && u8::from_str_radix(name, 16).is_ok() && dir.is_dir()
        };
        for shard in list(&self.dir)? {
            if !is_shard(&shard) {
                show(FoundFile::foreign(shard))?;
                continue;
            }
            for path in list(&shard)? {
                let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
                let ino = u64::from_str_radix(name, 16).ok().map(Ino);
                let metadata = match path.symlink_metadata() {
                    // Removed since it was listed.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    metadata => metadata.map_err(failed)?,
                };
                match ino.filter(|ino| self.path(*ino) == path && metadata.is_file()) {
                    Some(ino) => show(FoundFile {
                        ino: Some(ino),
                        allocated_bytes: metadata.blocks().saturating_mul(512),
                        modified: metadata.modified().map_err(failed)?,
                        path,
                    })?,
                    None => show(FoundFile::foreign(path))?,
                }
            }
        }
        Ok(())
    }

    /// Removes every slot file of a domain that is durably gone, durably.
    ///
    /// # Errors
    /// Storage's, and that of `go_on`, which is asked at each file.
    pub(crate) fn remove_all(&self, domain: Domain, go_on: impl Fn() -> Result<()>) -> Result<()> {
        let mut shards = BTreeSet::new();
        self.each_file(|file| {
            go_on()?;
            if let Some(ino) = file.ino.filter(|ino| ino.domain() == domain) {
                self.remove(ino)?;
                shards.extend(file.path.parent().map(Path::to_path_buf));
            }
            Ok(())
        })?;
        shards.iter().try_for_each(|shard| sync_dir(shard))
    }

    /// Removes a slot file whose inode is durably gone.
    pub(crate) fn remove(&self, ino: Ino) -> Result<()> {
        self.open.lock().pop(&ino);
        match std::fs::remove_file(self.path(ino)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove slot file", &error))
            }
            _ => Ok(()),
        }
    }
}

impl SlotFile {
    /// Reads ciphertext; a file cut short is corruption, found here before any tag is checked.
    pub(crate) fn read(&self, ino: Ino, offset: u64, into: &mut [u8]) -> Result<()> {
        self.0
            .read_exact_at(into, offset)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Error::Corrupt {
                    what: format!("slot file of inode {} at byte {offset}", ino.0),
                },
                _ => Error::io("read slots", &error),
            })
    }

    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.0
            .write_all_at(from, offset)
            .map_err(|error| Error::io("write slots", &error))
    }

    pub(crate) fn sync(&self) -> Result<()> {
        self.0
            .sync_data()
            .map_err(|error| Error::io("sync slots", &error))
    }

    /// Takes the space of a run, so that later writes into it find room.
    pub(crate) fn reserve(&self, run: u64) -> Result<()> {
        self.fallocate(FallocateFlags::empty(), run)
    }

    /// Gives the space of a run back.
    pub(crate) fn punch(&self, run: u64) -> Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, run)
    }

    /// Bytes up to its end.
    pub(crate) fn length(&self) -> Result<u64> {
        let metadata = self.0.metadata();
        metadata
            .map(|metadata| metadata.len())
            .map_err(|error| Error::io("stat slot file", &error))
    }

    /// The first run from `run` on that the host has data in.
    pub(crate) fn next_run_with_data(&self, run: u64) -> Result<Option<u64>> {
        let from = run.saturating_mul(CHUNK as u64);
        match rustix::fs::seek(&self.0, SeekFrom::Data(from)) {
            Ok(at) => Ok(Some(at / CHUNK as u64)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(errno) => Err(Error::io("seek in slot file", &errno.into())),
        }
    }

    fn fallocate(&self, flags: FallocateFlags, run: u64) -> Result<()> {
        let offset = run.saturating_mul(CHUNK as u64);
        match rustix::fs::fallocate(&self.0, flags, offset, CHUNK as u64) {
            Err(errno) if errno != rustix::io::Errno::OPNOTSUPP => {
                Err(Error::io("allocate slots", &errno.into()))
            }
            _ => Ok(()),
        }
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| Error::io("sync directory", &error))
}
