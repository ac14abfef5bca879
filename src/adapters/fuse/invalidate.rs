//! What the kernel caches of a file, made to go: pages, attributes, symlink targets.
//!
//! Invalidation writes dirty pages back first, through requests that a FUSE loop has to answer: it is never done on
//! one.

use super::residue::Residue;
use crate::engine::{CacheObserver, Error, Ino, Seek, Volume};
use fuse_device::{Found, FuseDevice};
use fuser::{Errno, ReplyLseek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Searches for data or holes that may wait to be laundered.
const LAUNDRY_MAX: usize = 256;

/// Inodes whose pages are dropped at once. Fewer than there are loops, which answer the write-backs.
const PURGERS: usize = 8;

/// Drops what the kernel caches when the volume goes dark.
pub(super) struct Purger {
    pub(super) device: Arc<FuseDevice>,
    pub(super) residue: Arc<Residue>,
}

impl Purger {
    /// Several inodes at once: a dirty one waits for its write-back.
    fn drop_pages(&self, inodes: &[Ino]) {
        let next = AtomicUsize::new(0);
        let drop_some = || {
            while let Some(ino) = inodes.get(next.fetch_add(1, Ordering::Relaxed)) {
                log_failure(*ino, self.device.drop_pages(ino.0));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..PURGERS.min(inodes.len()) {
                // A host that gives no more threads has it done by this one.
                if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, drop_some) {
                    tracing::debug!(%error, "no thread to purge with");
                }
            }
            drop_some();
        });
    }
}

impl CacheObserver for Purger {
    fn purge(&self, inodes: &[Ino]) {
        // Attributes first: once they are expired, new write(2) calls ask and are refused.
        for ino in inodes {
            log_failure(*ino, self.device.expire_attributes(ino.0));
        }
        self.drop_pages(inodes);
        match self.device.drop_names() {
            Ok(true) => {}
            Ok(false) => {
                tracing::debug!("this kernel keeps the names that it cached; it shows nothing else of them")
            }
            Err(error) => tracing::warn!(%error, "the kernel did not drop the names that it cached"),
        }
    }

    fn forget_name(&self, parent: Ino, name: &[u8]) {
        log_failure(parent, self.device.forget_name(parent.0, name));
    }

    fn wipe(&self) {
        self.residue.wipe_all();
    }
}

fn log_failure(ino: Ino, result: std::io::Result<Found>) {
    match result {
        // The mount is gone: nothing is cached.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ENODEV)) => {
            tracing::warn!(inode = ino.0, %error, "the kernel did not drop its cache");
        }
        _ => {}
    }
}

/// A search that must see what the kernel has not written back.
pub(super) struct Search {
    pub(super) ino: Ino,
    pub(super) offset: u64,
    pub(super) what: Seek,
    pub(super) reply: ReplyLseek,
}

/// Keeps what the kernel caches of files true: answers searches in files with writers, after having their dirty pages
/// written back, and expires attributes that changed behind its back.
pub(super) struct Laundry {
    searches: SyncSender<Search>,
    device: Arc<FuseDevice>,
}

impl Laundry {
    /// Starts the thread, which holds the volume. It ends with the last sender.
    pub(super) fn start(
        volume: Arc<Volume>,
        device: Arc<FuseDevice>,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (sender, searches) = sync_channel(LAUNDRY_MAX);
        let for_thread = Arc::clone(&device);
        let thread = std::thread::Builder::new()
            .name("laundry".to_owned())
            .spawn(move || launder(&volume, &for_thread, &searches))?;
        let laundry = Self {
            searches: sender,
            device,
        };
        Ok((laundry, thread))
    }

    /// Has the kernel ask for an inode's attributes again. That touches no page and waits for no request, so that it may
    /// be done on a loop.
    pub(super) fn expire_attributes(&self, ino: Ino) {
        log_failure(ino, self.device.expire_attributes(ino.0));
    }

    /// Takes a search over. With too many waiting, its caller is told to try again.
    pub(super) fn take(&self, search: Search) {
        if let Err(error) = self.searches.try_send(search) {
            let (std::sync::mpsc::TrySendError::Full(search)
            | std::sync::mpsc::TrySendError::Disconnected(search)) = error;
            search.reply.error(Errno::from_i32(libc::EAGAIN));
        }
    }
}

fn launder(volume: &Volume, device: &FuseDevice, searches: &Receiver<Search>) {
    while let Ok(Search {
        ino,
        offset,
        what,
        reply,
    }) = searches.recv()
    {
        log_failure(ino, device.drop_pages(ino.0));
        let found = catch_unwind(AssertUnwindSafe(|| volume.seek(ino, offset, what)));
        let found = found.unwrap_or_else(|_| {
            tracing::error!(inode = ino.0, "a search for data or holes panicked");
            Err(Error::Posix(libc::EIO))
        });
        answer_search(reply, found.map_err(|error| error.errno()));
    }
}

pub(super) fn answer_search(reply: ReplyLseek, found: Result<u64, i32>) {
    match found {
        Ok(at) => reply.offset(i64::try_from(at).unwrap_or(i64::MAX)),
        Err(errno) => reply.error(Errno::from_i32(errno)),
    }
}
