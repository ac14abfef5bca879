//! A mounted volume: the FUSE session and what belongs to it.

use super::filesystem::CmkFs;
use super::invalidate::{Laundry, Purger};
use super::mount::{MountFlags, mount, unmount};
use super::mountinfo::{self, Device};
use super::residue::Residue;
use crate::engine::Volume;
use fuser::{Config, Session, SessionACL};
use parking_lot::RwLock;
use std::fs::File;
use std::io::{Error, Result, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Loops that read requests. Handlers block on storage, so that there are more of them than processors; the
/// writes that a purge provokes always find one.
const LOOPS: usize = 10;
/// The mount's read-ahead, in KiB; the kernel's default of 128 caps sequential reads.
const READ_AHEAD_KB: &str = "4096";
/// Dirty pages that the mount may have, in percent of what the whole host may: the default for FUSE is 1.
const DIRTY_PERCENT: &str = "100";
/// fusectl: a directory for each connection.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// What the kernel may cache of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Reads and writes go through the page cache, and are written back in the background.
    #[default]
    Writeback,
    /// Nothing that is read or written; what is mapped, programs that run among it, still is.
    None,
}

/// A mount that is being served.
pub struct Mounted {
    place: Unmounter,
    serving: JoinHandle<Result<()>>,
    laundry: Arc<RwLock<Option<Laundry>>>,
    laundering: JoinHandle<()>,
}

/// Ends one mount, and nothing else that may have come to lie on its mount point.
#[derive(Debug, Clone)]
pub struct Unmounter {
    mountpoint: PathBuf,
    device: Device,
}

impl Unmounter {
    fn of(mountpoint: &Path) -> Result<Self> {
        let mount = mountinfo::find(mountpoint)?.ok_or_else(|| Error::other("it was unmounted at once"))?;
        Ok(Self {
            mountpoint: mountpoint.to_owned(),
            device: mount.device,
        })
    }

    /// Unmounts it; with `lazily` a busy mount leaves the tree now and ends when its last user does. False if it is
    /// not there any more, or lies under another mount.
    ///
    /// # Errors
    /// EBUSY for a busy mount that is not unmounted lazily.
    pub fn unmount(&self, lazily: bool) -> Result<bool> {
        match mountinfo::find(&self.mountpoint)? {
            Some(mount) if mount.device == self.device => unmount(&self.mountpoint, lazily).map(|()| true),
            _ => Ok(false),
        }
    }
}

/// Undoes a mount that nobody serves, or not all of whose loops do.
struct Breaker {
    place: Unmounter,
    /// fusectl's file of this very connection; its number may be another's once it has ended. Absent where fusectl is not
    /// mounted.
    abort: Option<File>,
}

impl Breaker {
    fn of(place: &Unmounter) -> Self {
        let path = PathBuf::from(CONNECTIONS)
            .join(place.device.minor.to_string())
            .join("abort");
        let abort = File::options().write(true).open(path);
        Self {
            place: place.clone(),
            abort: abort
                .inspect_err(|error| tracing::debug!(%error, "this connection cannot be aborted"))
                .ok(),
        }
    }

    /// Has every request fail, those that wait included, and takes the mount out of the tree. Whether the connection is known to
    /// have ended.
    fn undo(&self) -> bool {
        if let Some(mut abort) = self.abort.as_ref()
            && let Err(error) = abort.write_all(b"1")
        {
            tracing::debug!(%error, "the connection has ended before");
        }
        if let Err(error) = self.place.unmount(true) {
            tracing::error!(%error, "a mount that is not served could not be undone");
        }
        self.abort.is_some()
    }
}

impl Mounted {
    /// Mounts `volume` and serves it; returns when the kernel's first request was answered.
    ///
    /// # Errors
    /// Why it could not be mounted.
    pub fn start(
        volume: &Arc<Volume>,
        source: &Path,
        mountpoint: &Path,
        flags: MountFlags,
        cache: CacheMode,
    ) -> Result<Self> {
        let device = mount(source, mountpoint, flags)?;
        let place = Unmounter::of(mountpoint).inspect_err(|_| {
            if let Err(error) = unmount(mountpoint, true) {
                tracing::error!(%error, "a mount that is not served could not be undone");
            }
        })?;
        let breaker = Arc::new(Breaker::of(&place));
        Self::serve(volume, place, &breaker, device, cache).inspect_err(|_| {
            breaker.undo();
        })
    }

    fn serve(
        volume: &Arc<Volume>,
        place: Unmounter,
        breaker: &Arc<Breaker>,
        device: std::os::fd::OwnedFd,
        cache: CacheMode,
    ) -> Result<Self> {
        let laundry = Arc::new(RwLock::new(None));
        let residue = Arc::new(Residue::new(place.mountpoint.clone(), LOOPS));
        let filesystem = CmkFs::new(
            Arc::clone(volume),
            cache,
            Arc::clone(&laundry),
            Arc::clone(&residue),
        );
        let mut config = Config::default();
        config.n_threads = Some(LOOPS);
        config.clone_fd = true;
        config.acl = SessionACL::All;
        let session = Session::from_fd(filesystem, device, SessionACL::All, config)?;
        volume.set_observer(Arc::new(Purger {
            notifier: session.notifier(),
            residue,
        }));
        let (cleaner, laundering) = Laundry::start(Arc::clone(volume), session.notifier())?;
        *laundry.write() = Some(cleaner);
        let broken = (Arc::clone(breaker), Arc::clone(volume), Arc::clone(&laundry));
        let serving = std::thread::Builder::new()
            .name("serve".to_owned())
            .spawn(move || {
                session.run().inspect_err(|error| {
                    tracing::error!(%error, "the session broke off");
                    let (breaker, volume, laundry) = &broken;
                    // The kernel ends a connection when its last descriptor is closed. Where no loop ever began, these hold it.
                    volume.clear_observer();
                    *laundry.write() = None;
                    // Where some did, they go on.
                    breaker.undo();
                })
            })?;
        let mounted = Self {
            place,
            serving,
            laundry,
            laundering,
        };
        match mounted.answer() {
            Ok(device) => {
                tune(device);
                Ok(mounted)
            }
            Err(error) => {
                // Else somebody may keep it going, and would be waited for.
                if breaker.undo()
                    && let Err(error) = mounted.wait()
                {
                    tracing::debug!(%error, "the session ended");
                }
                Err(error)
            }
        }
    }

    /// Goes through the kernel to our own loops: the mount answers. If they never began it was undone, and what lay below
    /// answers instead.
    fn answer(&self) -> Result<Device> {
        let answered = std::fs::metadata(&self.place.mountpoint)?.dev();
        let answered = Device {
            major: rustix::fs::major(answered),
            minor: rustix::fs::minor(answered),
        };
        if answered != self.place.device {
            return Err(Error::other("the session broke off at once; see the log"));
        }
        Ok(answered)
    }

    /// Waits until the mount is gone, whoever unmounted it.
    ///
    /// # Errors
    /// Why the session broke off.
    pub fn wait(self) -> Result<()> {
        let ended = self.serving.join();
        // Ends the laundry. Nothing may hold the volume when the process ends: RocksDB's threads would find its mutexes gone.
        *self.laundry.write() = None;
        if self.laundering.join().is_err() {
            tracing::error!("the laundry panicked");
        }
        ended.map_err(|_| Error::other("the session panicked"))?
    }

    /// What ends it.
    #[must_use]
    pub fn unmounter(&self) -> Unmounter {
        self.place.clone()
    }
}

/// Lifts limits that the kernel sets for a FUSE mount it does not trust, where that is permitted.
fn tune(device: Device) {
    let bdi = PathBuf::from(format!("/sys/class/bdi/{}:{}", device.major, device.minor));
    for (name, value) in [
        ("read_ahead_kb", READ_AHEAD_KB),
        ("strict_limit", "0"),
        ("max_ratio", DIRTY_PERCENT),
    ] {
        if let Err(error) = std::fs::write(bdi.join(name), value) {
            tracing::debug!(%error, name, "a limit of the mount stays as it is");
        }
    }
}
