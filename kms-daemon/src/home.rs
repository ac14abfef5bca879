//! The keystore's directory: its lock, its files, and how they reach the disk.

use rustix::fs::FlockOperation;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why a home cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HomeError {
    /// `init` found something in it.
    #[error("{0} is not empty; name a new directory")]
    NotEmpty(PathBuf),
    /// No slot in it.
    #[error("{0} is not a keystore; make one with 'kmsd init --home {0}'")]
    NotAKeystore(PathBuf),
    /// Another daemon holds the lock.
    #[error("another kmsd serves {0}")]
    InUse(PathBuf),
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl HomeError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// A keystore's directory, locked for this process until it is dropped.
pub struct Home {
    path: PathBuf,
    _lock: File,
}

impl Home {
    /// Makes an empty directory, mode 0700, and locks it. An existing empty one will do.
    ///
    /// # Errors
    /// [`HomeError`]; nothing was changed unless it was made.
    pub fn create(path: &Path) -> Result<Self, HomeError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => sync_parent(path)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let mut entries = path.read_dir().map_err(HomeError::io(path))?;
                if entries.next().is_some() {
                    return Err(HomeError::NotEmpty(path.to_owned()));
                }
                let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
                std::fs::set_permissions(path, private).map_err(HomeError::io(path))?;
            }
            Err(error) => return Err(HomeError::io(path)(error)),
        }
        Self::lock(path)
    }

    /// Locks the home of an existing keystore.
    ///
    /// # Errors
    /// [`HomeError::NotAKeystore`], [`HomeError::InUse`].
    pub fn open(path: &Path) -> Result<Self, HomeError> {
        if latest_epoch(path)?.is_none() {
            return Err(HomeError::NotAKeystore(path.to_owned()));
        }
        Self::lock(path)
    }

    /// The slot of a home that need not be locked.
    ///
    /// # Errors
    /// [`HomeError::NotAKeystore`]
    pub fn present_slot(path: &Path) -> Result<PathBuf, HomeError> {
        let epoch = latest_epoch(path)?.ok_or_else(|| HomeError::NotAKeystore(path.to_owned()))?;
        Ok(path.join(format!("slot-{epoch}")))
    }

    fn lock(path: &Path) -> Result<Self, HomeError> {
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(HomeError::io(&lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(HomeError::InUse(path.to_owned())),
            Err(error) => Err(HomeError::io(&lock_path)(error.into())),
        }
    }

    /// The epoch of the newest slot.
    ///
    /// # Errors
    /// [`HomeError::NotAKeystore`] if there is none.
    pub fn epoch(&self) -> Result<u64, HomeError> {
        latest_epoch(&self.path)?.ok_or_else(|| HomeError::NotAKeystore(self.path.clone()))
    }

    /// `slot-E`
    #[must_use]
    pub fn slot(&self, epoch: u64) -> PathBuf {
        self.path.join(format!("slot-{epoch}"))
    }

    /// `slot-E.staged`: it selects nothing until it is renamed.
    #[must_use]
    pub fn staged_slot(&self, epoch: u64) -> PathBuf {
        self.path.join(format!("slot-{epoch}.staged"))
    }

    /// The epochs that have a slot, in order.
    ///
    /// # Errors
    /// [`HomeError::Io`]
    pub fn slots(&self) -> Result<Vec<u64>, HomeError> {
        numbered(&self.path, "slot-", "")
    }

    /// The epochs that have a staged slot, in order.
    ///
    /// # Errors
    /// [`HomeError::Io`]
    pub fn staged_slots(&self) -> Result<Vec<u64>, HomeError> {
        numbered(&self.path, "slot-", ".staged")
    }

    /// The epochs that have a sealed root key, in order.
    ///
    /// # Errors
    /// [`HomeError::Io`]
    pub fn roots(&self) -> Result<Vec<u64>, HomeError> {
        numbered(&self.path, "root-", "")
    }

    /// Lets the staged slot of an epoch select it; durable after [`Self::sync`] only.
    ///
    /// # Errors
    /// [`HomeError::Io`]; nothing was changed.
    pub fn select_slot(&self, epoch: u64) -> Result<(), HomeError> {
        let staged = self.staged_slot(epoch);
        std::fs::rename(&staged, self.slot(epoch)).map_err(HomeError::io(&staged))
    }

    /// Makes the names in the home durable.
    ///
    /// # Errors
    /// [`HomeError::Io`]: nobody knows which of them the disk holds.
    pub fn sync(&self) -> Result<(), HomeError> {
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(HomeError::io(&self.path))
    }

    /// `root-E`
    #[must_use]
    pub fn root(&self, epoch: u64) -> PathBuf {
        self.path.join(format!("root-{epoch}"))
    }

    /// `db/`
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.path.join("db")
    }

    /// `audit.log`
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        audit_log(&self.path)
    }
}

/// Bytes kept for revocation on a full disk: the database's logs, written out when it is opened anew, and as much again.
const RESERVE_BYTES: u64 = 32 << 20;

impl Home {
    fn reserve(&self) -> PathBuf {
        self.path.join("reserve")
    }

    /// Takes the space of the reserve, unless it is there.
    ///
    /// # Errors
    /// ENOSPC among others.
    pub fn fill_reserve(&self) -> Result<(), HomeError> {
        let path = self.reserve();
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(HomeError::io(&path))?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES)
            .map_err(|errno| HomeError::io(&path)(errno.into()))
    }

    /// Gives the space of the reserve back to the host.
    ///
    /// # Errors
    /// [`HomeError::Io`]
    pub fn release_reserve(&self) -> Result<(), HomeError> {
        let path = self.reserve();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HomeError::io(&path)(error)),
            _ => Ok(()),
        }
    }

    /// Whether there is room for the database to be opened anew without the reserve.
    #[must_use]
    pub fn has_room(&self) -> bool {
        rustix::fs::statvfs(&self.path)
            .is_ok_and(|host| host.f_bavail.saturating_mul(host.f_frsize) >= RESERVE_BYTES)
    }
}

/// The audit log of a home that need not be locked.
#[must_use]
pub fn audit_log(home: &Path) -> PathBuf {
    home.join("audit.log")
}

/// Writes a new file, mode 0600, and returns when it and its name are on the disk.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), HomeError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(HomeError::io(path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(HomeError::io(path))?;
    sync_parent(path)
}

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<(), HomeError> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(HomeError::io(parent))
}

/// Overwrites a file, then removes it; durable when this returns. `overwritten` is called between the two. What that is worth
/// depends on what lies under the file: old bytes may live on in flash, journals, snapshots and backups.
pub(crate) fn erase(
    path: &Path,
    overwritten: impl FnOnce() -> Result<(), HomeError>,
) -> Result<(), HomeError> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(HomeError::io(path))?;
    let length = file.metadata().map_err(HomeError::io(path))?.len();
    let zeros = vec![0; usize::try_from(length).unwrap_or_default()];
    std::os::unix::fs::FileExt::write_all_at(&file, &zeros, 0)
        .and_then(|()| file.sync_all())
        .map_err(HomeError::io(path))?;
    overwritten()?;
    remove(path)
}

/// Removes a file, durably; one that is not there is removed already.
pub(crate) fn remove(path: &Path) -> Result<(), HomeError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HomeError::io(path)(error)),
        _ => sync_parent(path),
    }
}

fn latest_epoch(path: &Path) -> Result<Option<u64>, HomeError> {
    match numbered(path, "slot-", "") {
        Err(HomeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        epochs => Ok(epochs?.last().copied()),
    }
}

/// The numbers in the names of files, in order. A name with a number that we would have written otherwise is not ours.
fn numbered(path: &Path, prefix: &str, suffix: &str) -> Result<Vec<u64>, HomeError> {
    let mut numbers = Vec::new();
    for entry in path.read_dir().map_err(HomeError::io(path))? {
        let name = entry.map_err(HomeError::io(path))?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(prefix)?.strip_suffix(suffix));
        let parsed = number.and_then(|number| number.parse::<u64>().ok());
        numbers.extend(parsed.filter(|parsed| Some(parsed.to_string().as_str()) == number));
    }
    numbers.sort_unstable();
    Ok(numbers)
}
