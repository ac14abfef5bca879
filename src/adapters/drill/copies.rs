//! Copies of everything that kmsd and the volume write: whole ones at chosen moments, and by hard links every file that was
//! there in between.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A copy that changed while it was made is made again, so often.
const TRIES_MAX: usize = 20;
/// Between two looks for new files.
const LOOK: Duration = Duration::from_millis(2);
/// Files that are allocated and hold nothing (docs/format.md, docs/kms-format.md).
const WITHOUT_CONTENT: [&str; 2] = ["reserve", "ballast"];

/// Copies a directory that is in use until it did not change meanwhile; what `leaves_out` says of a name is left out.
///
/// # Errors
/// It cannot be read, or never stood still.
pub fn copy(from: &Path, to: &Path, leaves_out: impl Fn(&str) -> bool + Copy) -> io::Result<()> {
    for _ in 0..TRIES_MAX {
        let before = shape(from)?;
        match copy_once(from, to, leaves_out) {
            Ok(()) if shape(from)? == before => return Ok(()),
            // A file that went while the copy was made.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        fs::remove_dir_all(to)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(io::Error::other(format!("{} never stood still", from.display())))
}

fn has_content(entry: &DirEntry) -> bool {
    !WITHOUT_CONTENT.iter().any(|name| entry.file_name() == *name)
}

/// Names, sizes and times.
fn shape(dir: &Path) -> io::Result<BTreeMap<PathBuf, (u64, i64, i64)>> {
    let mut shape = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = entry.metadata();
        match found {
            Ok(found) if found.is_dir() => shape.extend(self::shape(&entry.path())?),
            Ok(found) => {
                shape.insert(entry.path(), (found.len(), found.mtime(), found.mtime_nsec()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(shape)
}

fn copy_once(from: &Path, to: &Path, leaves_out: impl Fn(&str) -> bool + Copy) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let to = to.join(entry.file_name());
        if kind.is_dir() {
            copy_once(&entry.path(), &to, leaves_out)?;
        } else if kind.is_file() && has_content(&entry) && !leaves_out(&entry.file_name().to_string_lossy()) {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

/// Keeps a hard link to every file that it sees in some directories, so that what is removed later stays.
pub struct Collector {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<u64>>>,
}

impl Collector {
    /// Begins. `to` is made, on the same filesystem as the directories.
    ///
    /// # Errors
    /// `to` cannot be made.
    pub fn start(
        dirs: Vec<PathBuf>,
        to: PathBuf,
        leaves_out: impl Fn(&str) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        fs::create_dir_all(&to)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_over);
        let thread = std::thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || {
                let mut kept = 0;
                while !until.load(Ordering::Relaxed) {
                    for dir in &dirs {
                        kept += look(dir, &to, &leaves_out)?;
                    }
                    std::thread::sleep(LOOK);
                }
                Ok(kept)
            })?;
        Ok(Self {
            is_over,
            thread: Some(thread),
        })
    }

    /// Ends; answers how many files were kept.
    ///
    /// # Errors
    /// A file could not be kept.
    pub fn finish(mut self) -> io::Result<u64> {
        self.is_over.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        ended
            .unwrap_or(Ok(Ok(0)))
            .unwrap_or_else(|_| Err(io::Error::other("the collector panicked")))
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its outcome was not asked for.
            let _ended = thread.join();
        }
    }
}

fn look(dir: &Path, to: &Path, leaves_out: &impl Fn(&str) -> bool) -> io::Result<u64> {
    let mut kept = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let (true, true, false) = (
            entry.file_type()?.is_file(),
            has_content(&entry),
            leaves_out(&name),
        ) else {
            continue;
        };
        let inode = std::os::unix::fs::DirEntryExt::ino(&entry);
        let link = to.join(format!("{name}-{inode}"));
        match fs::hard_link(entry.path(), link) {
            Ok(()) => kept += 1,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_everything_but_what_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("db")).unwrap();
        for name in ["slot-1", "root-1", "reserve", "db/000001.sst"] {
            fs::write(from.join(name), name).unwrap();
        }
        copy(&from, &to, |name| name.starts_with("slot-")).unwrap();
        assert!(to.join("root-1").exists() && to.join("db/000001.sst").exists());
        assert!(!to.join("slot-1").exists() && !to.join("reserve").exists());
    }

    #[test]
    fn a_file_that_is_removed_stays_collected() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir(&from).unwrap();
        let collector =
            Collector::start(vec![from.clone()], to.clone(), |name| name.starts_with("slot-")).unwrap();
        fs::write(from.join("slot-1"), "secret").unwrap();
        fs::write(from.join("000001.sst"), "rows").unwrap();
        while fs::read_dir(&to).unwrap().next().is_none() {
            std::thread::sleep(LOOK);
        }
        fs::remove_file(from.join("000001.sst")).unwrap();
        assert_eq!(collector.finish().unwrap(), 1);
        let kept: Vec<_> = fs::read_dir(&to)
            .unwrap()
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect();
        assert_eq!(kept, [b"rows"]);
    }
}
