//! A mounted volume: the FUSE session and what belongs to it.

use super::filesystem::CmkFs;
use super::invalidate::{Laundry, Purger};
use super::mount::{MountFlags, mount, unmount};
use crate::engine::Volume;
use fuser::{Config, Session, SessionACL};
use parking_lot::RwLock;
use std::io::{Error, Result};
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

/// What the kernel may cache of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Reads and writes go through the page cache, and are written back in the background.
    #[default]
    Writeback,
    /// Nothing: no plaintext stays in the page cache.
    None,
}

/// A mount that is being served.
pub struct Mounted {
    mountpoint: PathBuf,
    serving: JoinHandle<Result<()>>,
    laundry: Arc<RwLock<Option<Laundry>>>,
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
        let started = Self::serve(volume, mountpoint, device, cache);
        if started.is_err()
            && let Err(error) = unmount(mountpoint, true)
        {
            tracing::error!(%error, "a mount that is not served could not be undone");
        }
        started
    }

    fn serve(
        volume: &Arc<Volume>,
        mountpoint: &Path,
        device: std::os::fd::OwnedFd,
        cache: CacheMode,
    ) -> Result<Self> {
        let laundry = Arc::new(RwLock::new(None));
        let filesystem = CmkFs::new(Arc::clone(volume), cache, Arc::clone(&laundry));
        let mut config = Config::default();
        config.n_threads = Some(LOOPS);
        config.clone_fd = true;
        config.acl = SessionACL::All;
        let session = Session::from_fd(filesystem, device, SessionACL::All, config)?;
        volume.set_observer(Arc::new(Purger(session.notifier())));
        *laundry.write() = Some(Laundry::start(Arc::clone(volume), session.notifier())?);
        let serving = std::thread::Builder::new()
            .name("serve".to_owned())
            .spawn(move || session.run())?;
        let mounted = Self {
            mountpoint: mountpoint.to_owned(),
            serving,
            laundry,
        };
        // Goes through the kernel to our own loops: the mount answers.
        let device_number = std::fs::metadata(mountpoint)?.dev();
        tune(device_number);
        Ok(mounted)
    }

    /// Waits until the mount is gone, whoever unmounted it.
    ///
    /// # Errors
    /// Why the session broke off.
    pub fn wait(self) -> Result<()> {
        let ended = self
            .serving
            .join()
            .map_err(|_| Error::other("the session panicked"))?;
        // Ends the laundry, which holds the volume.
        *self.laundry.write() = None;
        ended
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }
}

/// Lifts limits that the kernel sets for a FUSE mount it does not trust, where that is permitted.
fn tune(device: u64) {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let bdi = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}"));
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
