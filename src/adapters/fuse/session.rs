//! A mounted volume: the FUSE session and what belongs to it.

use super::filesystem::CmkFs;
use super::invalidate::{Laundry, Purger};
use super::mount::{MountFlags, mount, unmount};
use super::mountinfo::{Device, Table};
use super::residue::Residue;
use crate::adapters::kms::MountHandles;
use crate::engine::{InodeLedger, Volume};
use fuse_device::{AbortHandle, FuseDevice};
use fuser::{Config, Session, SessionACL};
use parking_lot::RwLock;
use std::io::{Error, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Loops that read requests. Handlers block on storage, so that there are more of them than processors; the
/// writes that a purge provokes always find one.
const LOOPS: usize = 10;
/// The mount's read-ahead, in KiB; the kernel's default of 128 caps sequential reads.
const READ_AHEAD_KB: &str = "4096";
/// Dirty pages that the mount may have, in percent of what the whole host may: the default for FUSE is 1.
const DIRTY_PERCENT: &str = "100";

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
    mounts: Arc<Table>,
}

impl Unmounter {
    fn of(mountpoint: &Path) -> Result<Self> {
        let mounts = Table::open()?;
        let mount = mounts
            .find(mountpoint)?
            .ok_or_else(|| Error::other("it was unmounted at once"))?;
        Ok(Self {
            mountpoint: mountpoint.to_owned(),
            device: mount.device,
            mounts: Arc::new(mounts),
        })
    }

    /// Unmounts it; with `lazily` a busy mount leaves the tree now and ends when its last user does. False if it is
    /// not there any more, or lies under another mount.
    ///
    /// # Errors
    /// EBUSY for a busy mount that is not unmounted lazily.
    pub fn unmount(&self, lazily: bool) -> Result<bool> {
        match self.mounts.find(&self.mountpoint)? {
            Some(mount) if mount.device == self.device => unmount(&self.mountpoint, lazily).map(|()| true),
            _ => Ok(false),
        }
    }
}

/// Undoes a mount that nobody serves, or not all of whose loops do.
struct Breaker {
    place: Unmounter,
    /// Absent where fusectl cannot be had.
    abort: Option<AbortHandle>,
    is_used: AtomicBool,
}

impl Breaker {
    fn of(place: &Unmounter) -> Self {
        let abort = AbortHandle::open(place.device.minor);
        Self {
            place: place.clone(),
            abort: abort
                .inspect_err(
                    |error| tracing::warn!(%error, "this connection cannot be aborted: no access to fusectl"),
                )
                .ok(),
            is_used: AtomicBool::new(false),
        }
    }

    /// Has every request fail, those that wait included, and takes the mount out of the tree. Whether the connection is known to
    /// have ended.
    fn undo(&self) -> bool {
        self.is_used.store(true, Ordering::Release);
        if let Some(abort) = self.abort.as_ref()
            && let Err(error) = abort.abort()
        {
            tracing::debug!(%error, "the connection has ended before");
        }
        if let Err(error) = self.place.unmount(true) {
            tracing::error!(%error, "a mount that is not served could not be undone");
        }
        self.abort.is_some()
    }

    /// Whether the mount was undone here.
    fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }
}

impl Mounted {
    /// Mounts `volume` and serves it; returns when the kernel's first request was answered. What the kernel learns of is listed in
    /// `ledger`; `attach` hands kmsd what it needs to revoke the mount without its help; nothing is served before.
    ///
    /// # Errors
    /// Why it could not be mounted.
    pub fn start(
        volume: &Arc<Volume>,
        source: &Path,
        mountpoint: &Path,
        flags: MountFlags,
        cache: CacheMode,
        ledger: Arc<dyn InodeLedger>,
        attach: impl FnOnce(MountHandles) -> Result<()>,
    ) -> Result<Self> {
        let device = mount(source, mountpoint, flags)?;
        let place = Unmounter::of(mountpoint).inspect_err(|_| {
            if let Err(error) = unmount(mountpoint, true) {
                tracing::error!(%error, "a mount that is not served could not be undone");
            }
        })?;
        let breaker = Arc::new(Breaker::of(&place));
        // Before the first request is answered: what the kernel learns, kmsd can have it forget.
        let residue = Arc::new(Residue::new(place.mountpoint.clone(), LOOPS));
        volume.set_ledger(ledger);
        hand_over(volume, &place, &device, &residue, attach)
            .and_then(|notices| Self::serve(volume, place, &breaker, (device, notices), cache, residue))
            .inspect_err(|_| {
                breaker.undo();
            })
    }

    fn serve(
        volume: &Arc<Volume>,
        place: Unmounter,
        breaker: &Arc<Breaker>,
        (device, notices): (OwnedFd, Arc<FuseDevice>),
        cache: CacheMode,
        residue: Arc<Residue>,
    ) -> Result<Self> {
        let laundry = Arc::new(RwLock::new(None));
        let filesystem = CmkFs::new(Arc::clone(volume), cache, Arc::clone(&laundry), residue);
        let mut config = Config::default();
        config.n_threads = Some(LOOPS);
        config.clone_fd = true;
        config.acl = SessionACL::All;
        let session = Session::from_fd(filesystem, device, SessionACL::All, config)?;
        let (cleaner, laundering) = Laundry::start(Arc::clone(volume), notices)?;
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
        let answered = mounted.answer().and_then(|is_there| match is_there {
            false if breaker.is_used() => Err(Error::other("the session broke off at once; see the log")),
            is_there => Ok(is_there),
        });
        match answered {
            Ok(true) => {
                tune(mounted.place.device);
                Ok(mounted)
            }
            Ok(false) => {
                tracing::info!("it was unmounted as soon as it was there");
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

    /// Goes through the kernel to our own loops: the mount answers. False if what lies below answers instead: it was unmounted, by
    /// somebody, or by the breaker if the loops never began.
    fn answer(&self) -> Result<bool> {
        let answered = std::fs::metadata(&self.place.mountpoint)?.dev();
        let answered = Device {
            major: rustix::fs::major(answered),
            minor: rustix::fs::minor(answered),
        };
        Ok(answered == self.place.device)
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

/// Has the kernel's caches purged through a descriptor of their own; hands kmsd its means. That
/// descriptor.
fn hand_over(
    volume: &Volume,
    place: &Unmounter,
    device: &OwnedFd,
    residue: &Arc<Residue>,
    attach: impl FnOnce(MountHandles) -> Result<()>,
) -> Result<Arc<FuseDevice>> {
    let clone = || FuseDevice::clone_of(device.as_fd());
    let notices = Arc::new(clone()?);
    volume.set_observer(Arc::new(Purger {
        device: Arc::clone(&notices),
        residue: Arc::clone(residue),
    }));
    attach(MountHandles {
        device: clone()?,
        abort: AbortHandle::open(place.device.minor).ok(),
        device_minor: place.device.minor,
    })?;
    Ok(notices)
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
