//! Room on the host: a reserve that only the database, and what frees space, may use.
//!
//! Content that grows is refused below a margin of free space, so that our own writes never take what RocksDB needs to
//! store and to compact what it took in. Others may fill the host to its last block: then the ballast, a file that takes
//! space for nothing, is given up, and the database goes on in what that leaves.

use super::error::{Error, Result};
use super::store::Sizes;
use super::sync::{Mutex, rank};
use rustix::fs::{FallocateFlags, Mode, OFlags, StatVfs};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};

/// The ballast's name in the volume's directory.
pub(crate) const BALLAST: &str = "ballast";
/// The margin: a sixteenth of the host within these bounds, in bytes.
const MARGIN_BYTES_MIN: u64 = 16 << 20;
const MARGIN_BYTES_MAX: u64 = 512 << 20;
/// The ballast is an eighth of the margin and at least this, in bytes.
const BALLAST_BYTES_MIN: u64 = 8 << 20;
/// A log and its memtables take half the margin at most, and no more than these.
const WRITE_BUFFER_BYTES_MAX: u64 = 32 << 20;
const LOG_BYTES_MAX: u64 = 256 << 20;
/// How often a ballast that could not be reserved is not tried: about a minute, at once a second.
const RESTORE_PAUSES: u32 = 60;
/// Bytes that are taken in before the host is asked again how much it has.
const CREDIT_BYTES_MAX: i64 = 64 << 20;

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Room {
    /// For what frees space.
    Reserve,
    /// For that, and for new versions of what is there.
    Low,
    /// For everything.
    Plenty,
}

/// What is kept free on a host of some size, and how the database is bounded so that this is enough for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// In bytes.
    pub(crate) margin: u64,
    /// In bytes.
    pub(crate) ballast: u64,
}

impl Limits {
    /// For the host of `dir`.
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        let host = rustix::fs::statvfs(dir)?;
        Ok(Self::for_host(host.f_blocks.saturating_mul(host.f_frsize)))
    }

    fn for_host(bytes: u64) -> Self {
        let margin = (bytes / 16).clamp(MARGIN_BYTES_MIN, MARGIN_BYTES_MAX);
        Self {
            margin,
            ballast: (margin / 8).max(BALLAST_BYTES_MIN),
        }
    }

    pub(crate) fn sizes(self, cache_bytes: usize) -> Sizes {
        // Two families, each with a memtable that fills and one that is being stored.
        let write_buffer = (self.margin / 8).min(WRITE_BUFFER_BYTES_MAX);
        Sizes {
            cache_bytes,
            write_buffer_bytes: usize::try_from(write_buffer).unwrap_or(usize::MAX),
            log_bytes_max: (self.margin / 2).min(LOG_BYTES_MAX),
        }
    }
}

/// Watches the host's free space, and holds the ballast.
pub(crate) struct Space {
    dir: PathBuf,
    limits: Limits,
    /// Bytes that may still be taken in before the host is asked again.
    credit: AtomicI64,
    room: AtomicU8,
    ballast: Mutex<Ballast, rank::Ballast>,
}

/// Held while it changes.
struct Ballast {
    is_there: bool,
    /// How often it is not to be taken again though there is plenty: the last attempt failed.
    pauses: u32,
}

impl Space {
    /// For a volume that is to be written.
    pub(crate) fn new(dir: &Path, limits: Limits) -> Self {
        let allocated = std::fs::metadata(dir.join(BALLAST)).map(|ballast| ballast.blocks() * 512);
        let is_there = allocated.is_ok_and(|bytes| bytes >= limits.ballast);
        Self {
            dir: dir.to_path_buf(),
            limits,
            credit: AtomicI64::new(0),
            room: AtomicU8::new(Room::Plenty as u8),
            ballast: Mutex::new(Ballast { is_there, pauses: 0 }),
        }
    }

    /// Takes `bytes` of the room there is, and says for what there was enough; `pending` were taken before and are not stored
    /// yet.
    pub(crate) fn take(&self, bytes: u64, pending: u64) -> Result<Room> {
        let wanted = i64::try_from(bytes).unwrap_or(i64::MAX);
        if self.credit.fetch_sub(wanted, Ordering::Relaxed) < wanted {
            return self.look_for(bytes, pending);
        }
        Ok(self.room())
    }

    /// How much there was when the host was last asked.
    pub(crate) fn room(&self) -> Room {
        match self.room.load(Ordering::Relaxed) {
            0 => Room::Reserve,
            1 => Room::Low,
            _ => Room::Plenty,
        }
    }

    /// Asks the host how much it has, `pending` bytes of which are taken.
    pub(crate) fn look(&self, pending: u64) -> Result<Room> {
        self.look_for(1, pending)
    }

    /// The same for `bytes` more, which are taken if there is plenty.
    fn look_for(&self, bytes: u64, pending: u64) -> Result<Room> {
        let free = self.free()?;
        let above = self.usable(free).saturating_sub(pending);
        let is_low = free >= self.missing_ballast();
        let room_for = |bytes: u64| match is_low {
            _ if above >= bytes => Room::Plenty,
            // New versions may have their place reserved. If not, the log finds room for them or refuses them.
            true => Room::Low,
            false => Room::Reserve,
        };
        // Half of what is left, since others take from it as well.
        let room = room_for(bytes);
        let left = if room == Room::Plenty {
            above - bytes
        } else {
            above
        };
        let credit = i64::try_from(left / 2).unwrap_or(i64::MAX).min(CREDIT_BYTES_MAX);
        self.credit.store(credit, Ordering::Relaxed);
        let now = room_for(1);
        if self.room.swap(now as u8, Ordering::Relaxed) != now as u8 {
            tracing::info!(
                room = ?now,
                free,
                margin = self.limits.margin,
                "the host's room has changed"
            );
        }
        Ok(room)
    }

    /// Bytes that the host has.
    pub(crate) fn free(&self) -> Result<u64> {
        Ok(available(&rustix::fs::statvfs(&self.dir)?))
    }

    /// Bytes of `available` that may be filled before the margin is reached.
    pub(crate) fn usable(&self, available: u64) -> u64 {
        available
            .saturating_sub(self.limits.margin)
            .saturating_sub(self.missing_ballast())
    }

    /// Whether the log may take `bytes` of what there is, the ballast included: half as much as that is left for what frees
    /// space.
    pub(crate) fn has_room_for_log(&self, bytes: u64) -> Result<bool> {
        let ballast = self.limits.ballast.saturating_sub(self.missing_ballast());
        Ok(self.free()?.saturating_add(ballast) >= bytes.saturating_add(self.limits.ballast / 2))
    }

    /// Bytes that the ballast is to take again.
    fn missing_ballast(&self) -> u64 {
        match self.ballast.lock().is_there {
            true => 0,
            false => self.limits.ballast,
        }
    }

    /// Gives the ballast's space to whoever needs it. The database goes on in that.
    pub(crate) fn give_up_ballast(&self) {
        let mut ballast = self.ballast.lock();
        if !std::mem::take(&mut ballast.is_there) {
            return;
        }
        match std::fs::remove_file(self.dir.join(BALLAST)) {
            Ok(()) => tracing::warn!("the host is full: the ballast is given up for what frees space"),
            Err(error) => tracing::error!(%error, "the ballast could not be given up"),
        }
    }

    /// Takes the ballast's space if there is plenty besides. A host that cannot reserve space goes without.
    pub(crate) fn restore_ballast(&self) -> Result<()> {
        let mut ballast = self.ballast.lock();
        if ballast.is_there || self.free()? < self.limits.margin.saturating_add(self.limits.ballast) {
            return Ok(());
        }
        if ballast.pauses > 0 {
            ballast.pauses -= 1;
            return Ok(());
        }
        let path = self.dir.join(BALLAST);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let reserved = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .and_then(|file| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.limits.ballast));
        match reserved {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                tracing::info!("the host cannot reserve space: the volume has no ballast");
                // An empty file says that it was tried.
                ballast.is_there = true;
                Ok(())
            }
            Err(errno) => {
                let _gone = std::fs::remove_file(&path);
                ballast.pauses = RESTORE_PAUSES;
                Err(Error::io("reserve the ballast", &errno.into()))
            }
            Ok(()) => {
                ballast.is_there = true;
                Ok(())
            }
        }
    }
}

/// Bytes of a host that anyone may use.
fn available(host: &StatVfs) -> u64 {
    host.f_bavail.saturating_mul(host.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_there_is_above_the_margin_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let free = || available(&rustix::fs::statvfs(dir.path()).unwrap());
        // Others use this host as well.
        const SLACK: u64 = 1 << 30;
        let limits = Limits {
            margin: free() - 2 * SLACK,
            ballast: 0,
        };
        let space = Space::new(dir.path(), limits);
        assert_eq!(space.take(4 * SLACK, 0), Ok(Room::Low));
        assert_eq!(space.take(4096, 0), Ok(Room::Plenty));
        assert_eq!(space.take(4 * SLACK, 0), Ok(Room::Low));
        assert_eq!(space.take(SLACK, 2 * SLACK), Ok(Room::Low));
        assert_eq!(space.room(), Room::Low);
        // What is taken is not there for the next.
        let limits = Limits {
            margin: free() - (4 << 20),
            ballast: 0,
        };
        let space = Space::new(dir.path(), limits);
        space.take(3 << 20, 0).unwrap();
        assert!(space.credit.load(Ordering::Relaxed) <= 1 << 20);
    }

    #[test]
    fn a_ballast_that_cannot_be_reserved_is_not_tried_at_once_again() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            margin: 0,
            ballast: 8192,
        };
        let space = Space::new(dir.path(), limits);
        let path = dir.path().join(BALLAST);
        std::fs::create_dir(&path).unwrap();
        assert!(space.restore_ballast().is_err());
        std::fs::remove_dir(&path).unwrap();
        for _ in 0..RESTORE_PAUSES {
            assert!(space.restore_ballast().is_ok() && !path.exists());
        }
        assert!(space.restore_ballast().is_ok() && path.exists());
    }

    #[test]
    fn the_margin_holds_the_log_and_twice_the_memtables() {
        for host in [0, 64 << 20, 1 << 30, 8 << 30, 1 << 50] {
            let limits = Limits::for_host(host);
            let sizes = limits.sizes(128 << 20);
            assert!(sizes.log_bytes_max + 4 * sizes.write_buffer_bytes as u64 <= limits.margin);
            assert!(limits.ballast * 2 <= limits.margin);
        }
    }
}
