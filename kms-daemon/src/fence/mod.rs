//! What kmsd can do about a mount without the mount's help: drop what the kernel caches of it, end its process, and end its
//! FUSE connection.

mod attachment;
mod ledger;
mod process;

pub(crate) use attachment::Attachment;
pub(crate) use process::Process;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// A mount's cached pages, and its connection, as kmsd reaches them. Calls may block in the kernel.
pub(crate) trait Reach: Send + Sync {
    /// Drops everything that the kernel may cache of the mount, once.
    ///
    /// # Errors
    /// In words: why something may still be cached.
    fn invalidate(&self) -> Result<(), String>;

    /// Has every request of the mount fail from now on.
    ///
    /// # Errors
    /// In words: why it cannot.
    fn abort(&self) -> Result<(), String>;

    /// Whether the filesystem has ended, and its cache with it.
    fn is_gone(&self) -> bool;
}

/// A holder's process.
pub(crate) trait Life: Send + Sync {
    /// Whether it has ended.
    fn has_exited(&self) -> bool;

    /// Ends it by force.
    ///
    /// # Errors
    /// Those of pidfd_send_signal(2).
    fn kill(&self) -> std::io::Result<()>;

    /// A descriptor that becomes readable when it ends.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// Runs `work` on a thread of its own. `None` if it has not ended in time: it may never, and its thread stays.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = sync_channel(1);
    let spawned = std::thread::Builder::new()
        .name("fence".to_owned())
        .spawn(move || {
            // Nobody may be waiting any more.
            let _ = sender.send(work());
        });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread to fence a mount with");
        return None;
    }
    receiver.recv_timeout(limit).ok()
}

/// Whether a filesystem lives on the anonymous device 0:`minor`: its backing device is registered for as long as its
/// superblock is. Numbers are used again, so that only a "no" is certain.
pub(crate) fn may_be_mounted(minor: u32) -> bool {
    PathBuf::from(format!("/sys/class/bdi/0:{minor}"))
        .try_exists()
        .unwrap_or(true)
}
