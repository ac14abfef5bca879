//! Inodes not yet born: numbers reserved durably and, for regular files, DEKs issued ahead, so that a create
//! waits for neither the log nor the KMS.

use super::core::{Access, Fetch};
use super::error::{Error, Result};
use super::keyring::{FreshKey, KEYS_PER_CALL_MAX};
use super::sync::{Mutex, rank};
use super::types::{Domain, Ino};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

/// Numbers reserved at a time for inodes that need no key.
const PLAIN_BATCH: u64 = 256;

/// The pools. That of files has a second lock for refilling, which waits for the KMS: who only takes waits for neither.
pub(crate) struct Nursery {
    /// DEKs asked for in one call; below half of it a refill is started.
    batch: usize,
    files: Mutex<VecDeque<(Ino, FreshKey)>, rank::NurseryFiles>,
    files_refill: Mutex<(), rank::NurseryRefill>,
    plain: Mutex<VecDeque<Ino>, rank::NurseryPlain>,
    /// A refill was asked for, and that was not heard yet.
    is_asked_for: AtomicBool,
}

impl Nursery {
    pub(crate) fn new(dek_prefetch: usize) -> Self {
        Self {
            batch: dek_prefetch.clamp(1, KEYS_PER_CALL_MAX),
            files: Mutex::default(),
            files_refill: Mutex::default(),
            plain: Mutex::default(),
            is_asked_for: AtomicBool::new(false),
        }
    }

    /// Drops every key. The numbers go with them: they are never reused.
    pub(crate) fn clear(&self) {
        self.files.lock().clear();
    }

    /// A refill that was asked for begins, or never will: it may be asked for again.
    pub(crate) fn note_heard(&self) {
        self.is_asked_for.store(false, Ordering::Release);
    }

    fn take_file(&self) -> (Option<(Ino, FreshKey)>, usize) {
        let mut files = self.files.lock();
        (files.pop_front(), files.len())
    }
}

impl Access<'_> {
    /// A number and a DEK for a new regular file.
    pub(crate) fn unborn_file(&self) -> Result<(Ino, FreshKey)> {
        loop {
            let (taken, left) = self.home().nursery.take_file();
            let nursery = &self.home().nursery;
            // Again and again, if the KMS was away when it was asked.
            if left <= nursery.batch / 2 && !nursery.is_asked_for.swap(true, Ordering::AcqRel) {
                self.fetch_ahead(Fetch::Nursery(self.home().id));
            }
            match taken {
                Some(taken) => return Ok(taken),
                None => self.refill_nursery(0)?,
            }
        }
    }

    /// Fetches one more batch, if no more than `left_max` are left.
    pub(crate) fn refill_nursery(&self, left_max: usize) -> Result<()> {
        let _one_at_a_time = self.home().nursery.files_refill.lock();
        if self.home().nursery.files.lock().len() > left_max {
            return Ok(());
        }
        let inodes = self.reserve(self.home().nursery.batch as u64)?;
        let keys = self.home().keyring.issue(&inodes)?;
        self.home()
            .nursery
            .files
            .lock()
            .extend(inodes.into_iter().zip(keys));
        Ok(())
    }

    /// As many as are worth a refill in the background.
    pub(crate) fn refill_nursery_ahead(&self) -> Result<()> {
        self.refill_nursery(self.home().nursery.batch / 2)
    }

    /// A number for a new inode of any other kind.
    pub(crate) fn unborn_plain(&self) -> Result<Ino> {
        let mut plain = self.home().nursery.plain.lock();
        if plain.is_empty() {
            plain.extend(self.reserve(PLAIN_BATCH)?);
        }
        plain.pop_front().ok_or(Error::Posix(libc::ENOSPC))
    }

    fn reserve(&self, count: u64) -> Result<Vec<Ino>> {
        let (keys, domain) = (self.keys_of(Domain::FIRST)?, self.home().id);
        let first = self.committer.reserve_inodes(keys, domain, count)?;
        Ok((first..first.saturating_add(count)).map(Ino).collect())
    }
}
