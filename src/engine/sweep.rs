//! After an unclean stop: content may lie in slot files that no commit came to name, in files that were never born among
//! them. It is looked for in the background, and its space given back.
//!
//! What a chunk record names, or the bitmap, or memory, is never touched, nor what belongs to an inode that is not durably
//! gone. Where these disagree, or are damaged, the file is left for fsck.
//!
//! `VOLUME/unclean` is there while the volume is open for writing, and until a sweep is complete.

use super::commit::Written;
use super::core::{Access, Core};
use super::error::{Error, Result};
use super::format::rowkey::{self, Family};
use super::publish::Publishing;
use super::runs::{PAGE_RUNS, RunSet};
use super::slots::{FoundFile, sync_dir};
use super::types::{Domain, Ino};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

const NAME: &str = "unclean";
/// Slot files older than the mark by this much were written by mounts that ended well.
const MARGIN: Duration = Duration::from_secs(60);

/// Runs given back under one holding of a file's locks.
const RUNS_MAX: usize = 256;

/// What is to be swept.
#[derive(Debug, Clone)]
pub(crate) struct Sweep {
    /// Inode numbers of a domain below this were given out by earlier mounts, or never will be.
    born_before: BTreeMap<Domain, u64>,
    /// Slot files that were not modified since are left alone.
    since: SystemTime,
}

impl Sweep {
    /// Whether an inode was there before this mount. Of a domain that is gone, or was never made, nothing is looked for here.
    fn is_of_before(&self, ino: Ino) -> bool {
        self.born_before
            .get(&ino.domain())
            .is_some_and(|limit| ino.0 < *limit)
    }
}

/// Marks the volume as open. What is to be swept, if it was not closed the last time: the mark is as old as the first mount
/// that was not.
pub(crate) fn begin(dir: &Path, last: &Written) -> Result<Option<Sweep>> {
    let path = dir.join(NAME);
    match File::create_new(&path) {
        Ok(_) => sync_dir(dir).map(|()| None),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let marked = std::fs::metadata(&path).and_then(|mark| mark.modified());
            let since = marked.ok().and_then(|marked| marked.checked_sub(MARGIN));
            let others = last
                .usage
                .iter()
                .map(|(domain, counted)| (*domain, counted.usage.ino_limit));
            let first = std::iter::once((Domain::FIRST, last.root.ino_limit));
            Ok(Some(Sweep {
                born_before: first.chain(others).collect(),
                since: since.unwrap_or(SystemTime::UNIX_EPOCH),
            }))
        }
        Err(error) => Err(Error::io("mark the volume as open", &error)),
    }
}

/// Notes that the volume was closed, and nothing is to be swept.
pub(crate) fn end(dir: &Path) -> Result<()> {
    match std::fs::remove_file(dir.join(NAME)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io("mark the volume as closed", &error))
        }
        _ => Ok(()),
    }
}

impl Core {
    /// Sweeps every slot file, unless the volume is closed or goes dark before. Not by records that were put back: what is to be
    /// verified is, before.
    pub(crate) fn sweep(&self, sweep: &Sweep) {
        if !self.wait_until_verified() {
            tracing::info!("the next mount sweeps");
            return;
        }
        let mut is_complete = true;
        let swept = self.slots.each_file(|file| {
            self.go_on_sweeping()?;
            match file.ino.filter(|_| file.modified >= sweep.since) {
                // What is left of a domain that is gone is given up as a whole.
                Some(ino) if self.is_untrusted(ino.domain()) => {
                    tracing::debug!(inode = ino.0, "a slot file is not swept: its records are not known to be the last");
                    is_complete = false;
                    Ok(())
                }
                Some(ino) if self.domains.of(ino).is_ok() && sweep.is_of_before(ino) => match self.sweep_file(ino, &file) {
                    // Of a domain whose key may not be used, while the volume's own may.
                    Err(error) if self.is_dark(ino.domain()) && !self.is_dark(Domain::FIRST) => {
                        tracing::info!(inode = ino.0, %error, "a slot file is not swept; a later mount tries again");
                        is_complete = false;
                        Ok(())
                    }
                    // Damage is for fsck; what storage refuses keeps no other file from it.
                    Err(error @ Error::Corrupt { .. }) => {
                        tracing::warn!(inode = ino.0, %error, "a slot file is not swept");
                        Ok(())
                    }
                    Err(error @ Error::Storage { .. }) => {
                        tracing::warn!(inode = ino.0, %error, "a slot file is not swept; the next mount tries again");
                        is_complete = false;
                        Ok(())
                    }
                    swept => swept,
                },
                _ => Ok(()),
            }
        });
        match swept {
            Ok(()) => self.is_unswept.store(!is_complete, Ordering::Release),
            Err(error) => tracing::info!(%error, "the next mount sweeps again"),
        }
    }

    fn go_on_sweeping(&self) -> Result<()> {
        if self.upkeep_bell.is_stopped() {
            return Err(Error::Posix(libc::EINTR));
        }
        // After a failed sync nobody knows which commits will be there.
        self.committer.check()
    }

    /// Gives back what nothing names in a slot file.
    fn sweep_file(&self, ino: Ino, file: &FoundFile) -> Result<()> {
        let Some(named) = self.drain(ino.domain())?.named_runs(ino)? else {
            return self.sweep_unborn(ino, file);
        };
        let slots = match self.slots.existing(ino) {
            // Removed since.
            Err(Error::Corrupt { .. }) => return Ok(()),
            slots => slots?,
        };
        let mut unnamed = Vec::new();
        let mut run = 0;
        while let Some(next) = slots.next_run_with_data(run)? {
            self.go_on_sweeping()?;
            if !named.contains(next) {
                unnamed.push(next);
            }
            run = next.saturating_add(1);
        }
        drop(slots);
        for runs in unnamed.chunks(RUNS_MAX) {
            self.go_on_sweeping()?;
            self.drain(ino.domain())?.give_back(ino, runs)?;
        }
        Ok(())
    }

    /// Removes the slot file of an inode that is not there: never born, or gone. One that is gone in memory alone may come
    /// back with a crash: first that is made durable.
    fn sweep_unborn(&self, ino: Ino, file: &FoundFile) -> Result<()> {
        self.committer.sync_to(self.committer.committed())?;
        let access = self.drain(ino.domain())?;
        let is_anything = access.stored_record(ino)?.is_some()
            || access.store.get(Family::Meta, &rowkey::orphan(ino))?.is_some()
            || access.has_chunks(ino)?;
        if is_anything {
            return Ok(());
        }
        tracing::info!(
            inode = ino.0,
            bytes = file.allocated_bytes,
            "removed a slot file of no inode"
        );
        self.slots.remove(ino)
    }
}

impl Access<'_> {
    /// The runs that an inode's chunk records name; `None` if there is no such inode.
    fn named_runs(&self, ino: Ino) -> Result<Option<RunSet>> {
        if self.stored_record(ino)?.is_none() {
            return Ok(None);
        }
        let mut named = RunSet::default();
        let (from, to) = (rowkey::chunk(ino, 0), rowkey::chunk(ino, u64::MAX));
        self.store.scan(Family::Meta, &from, &to, |key, sealed| {
            self.go_on()?;
            if let Some(run) = self.open_chunk(ino, key, sealed)?.run {
                named.insert(run);
            }
            Ok(true)
        })?;
        Ok(Some(named))
    }

    fn has_chunks(&self, ino: Ino) -> Result<bool> {
        let mut has_any = false;
        let (from, to) = (rowkey::chunk(ino, 0), rowkey::chunk(ino, u64::MAX));
        self.store.scan(Family::Meta, &from, &to, |_, _| {
            has_any = true;
            Ok(false)
        })?;
        Ok(has_any)
    }

    /// Punches those of the runs that are not in use. What was named since they were found is; what was freed since, by a
    /// commit that may not be durable, still is.
    fn give_back(&self, ino: Ino, runs: &[u64]) -> Result<()> {
        let node = match self.node(ino) {
            Err(Error::Posix(libc::ESTALE)) => return Ok(()),
            node => node?,
        };
        let _right = Publishing::begin(&node);
        let mut state = node.state.write();
        // It may have been reclaimed while this waited: nothing is in use then, and all may come back with a crash.
        if self.stored_record(ino)?.is_none() {
            return Ok(());
        }
        self.committer.check()?;
        let slots = self.slots.existing(ino)?;
        let mut count = 0_u64;
        for run in runs {
            self.go_on()?;
            self.load_run_page(&node, &mut state, run / PAGE_RUNS)?;
            if !state.file.runs.is_used(*run) {
                slots.punch(*run)?;
                count += 1;
            }
        }
        tracing::info!(inode = ino.0, runs = count, "gave back what no commit named");
        Ok(())
    }
}
