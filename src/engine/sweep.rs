//! After an unclean stop: content may lie in slot files that no commit came to name, in files that were never born among
//! them. It is looked for in the background, and its space given back.
//!
//! `VOLUME/unclean` is there while the volume is open for writing, and until a sweep is complete. It holds nothing, and
//! whoever removes it gains nothing: space alone is at stake.

use super::check::leaked_runs;
use super::core::{Access, Core};
use super::error::{Error, Result};
use super::format::root::RootRecord;
use super::publish::Publishing;
use super::runs::PAGE_RUNS;
use super::slots::{FoundFile, sync_dir};
use super::types::Ino;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

const NAME: &str = "unclean";
/// Slot files older than the seal file by this much hold nothing that was under way: all of it was published before.
const MARGIN: Duration = Duration::from_secs(60);

/// What is to be swept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sweep {
    /// Inode numbers below this were given out by earlier mounts, or never will be.
    born_before: u64,
    /// Slot files that were not modified since are left alone.
    since: SystemTime,
}

/// Marks the volume as open. What is to be swept, if it was not closed the last time.
pub(crate) fn begin(dir: &Path, root: &RootRecord) -> Result<Option<Sweep>> {
    match File::create_new(dir.join(NAME)) {
        Ok(_) => sync_dir(dir).map(|()| None),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let sealed = std::fs::metadata(dir.join(super::seal::NAME)).and_then(|seal| seal.modified());
            let since = sealed.ok().and_then(|sealed| sealed.checked_sub(MARGIN));
            Ok(Some(Sweep {
                born_before: root.ino_limit,
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
    /// Sweeps every slot file, unless the volume is closed before.
    pub(crate) fn sweep(&self, sweep: &Sweep) {
        let mut given_back = 0_u64;
        let swept = self.slots.each_file(|file| {
            if self.key_bell.is_stopped() {
                return Err(Error::Posix(libc::EINTR));
            }
            match file.ino.filter(|_| file.modified >= sweep.since) {
                Some(ino) if ino.0 < sweep.born_before => {
                    given_back += self.drain()?.sweep_file(ino, &file)?;
                    Ok(())
                }
                _ => Ok(()),
            }
        });
        match swept {
            Ok(()) => {
                self.is_unswept.store(false, Ordering::Release);
                tracing::info!(bytes = given_back, "swept after an unclean stop");
            }
            Err(error) => tracing::info!(%error, "the next mount sweeps again"),
        }
    }
}

impl Access<'_> {
    /// Gives back what nothing names in a slot file; how many bytes.
    fn sweep_file(&self, ino: Ino, file: &FoundFile) -> Result<u64> {
        let node = match self.node(ino) {
            Ok(node) => node,
            // Never born, or gone: no inode has this number again.
            Err(Error::Posix(libc::ESTALE)) => {
                self.slots.remove(ino)?;
                return Ok(file.allocated_bytes);
            }
            // Damage is for fsck.
            Err(Error::Corrupt { .. }) => return Ok(0),
            Err(error) => return Err(error),
        };
        let _right = Publishing::begin(&node);
        let mut state = node.state.write();
        if !state.file.has_slot_file {
            self.slots.remove(ino)?;
            return Ok(file.allocated_bytes);
        }
        let slots = self.slots.existing(ino)?;
        for page in 0..=slots.length()? / (PAGE_RUNS * super::format::chunk::CHUNK as u64) {
            self.load_run_page(&node, &mut state, page)?;
        }
        let leaked = leaked_runs(&slots, |run| state.file.runs.is_used(run))?;
        for run in &leaked {
            slots.punch(*run)?;
        }
        Ok(leaked.len() as u64 * super::format::chunk::CHUNK as u64)
    }
}
