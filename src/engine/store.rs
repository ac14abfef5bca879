//! RocksDB as the engine uses it: two column families of opaque rows, a log that is synced on request.

mod moment;

pub(crate) use moment::{Cursor, Moment};

use super::error::{Error, Result};
use super::format::rowkey::Family;
use super::slots::sync_dir;
use super::sync::{RwLock, rank};
use rocksdb::properties::{ACTUAL_DELAYED_WRITE_RATE, BACKGROUND_ERRORS};
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor,
    CompactOptions, DB, DBCompressionType, DBRecoveryMode, Direction, ErrorKind, IteratorMode, Options,
    ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};
use std::ffi::CStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const META: &str = "meta";
const CONTENT: &str = "content";
/// Inline blocks of this many bytes and more go to blob files: compaction moves only their references.
const BLOB_BYTES_MIN: u64 = 2048;
/// A memtable that is never full: more than any log holds.
const UNBOUNDED_BYTES: usize = 1 << 40;
/// Rows read at first by an iterator, and at most, with at most so many bytes.
const ROWS_MIN: usize = 16;
const ROWS_MAX: usize = 1024;
const ROWS_BYTES_MAX: usize = 1 << 20;
/// Blob files are compacted if more than one byte in so many is garbage, and at least so many bytes.
const GARBAGE_SHARE: u64 = 10;
const GARBAGE_BYTES_MIN: u64 = 1 << 20;
/// The share of blob files, the oldest ones, that an ordinary compaction copies from.
const GARBAGE_AGE_CUTOFF: f64 = 0.25;
/// How RocksDB calls a sync that it did not try because a write to the file had failed.
const PREVIOUS_ERROR: &str = "previous error";
/// How it calls syncs that failed (env/io_posix.cc).
const FAILED_SYNCS: [&str; 4] = [
    "While fdatasync",
    "While fsync",
    "While msync",
    "While sync_file_range",
];

/// How long a batch waits at least that RocksDB does not take at present.
const STALL_MIN: Duration = Duration::from_millis(1);

/// A table file with this many deletions among so many neighbouring rows is compacted.
const DELETIONS_MIN: usize = 2048;
const DELETIONS_WINDOW: usize = 4096;

/// One change of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Put(Family, Vec<u8>, Vec<u8>),
    Delete(Family, Vec<u8>),
    /// Removes the rows from the first key up to, and without, the second.
    DeleteRange(Family, Vec<u8>, Vec<u8>),
}

/// A row's key and value.
pub(crate) type Row = (Box<[u8]>, Box<[u8]>);

/// How much the database may take of memory and of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Block cache and memtables together, in bytes.
    pub(crate) cache_bytes: usize,
    /// One memtable, in bytes.
    pub(crate) write_buffer_bytes: usize,
    /// The log is cut, by flushing the oldest memtable, past this many bytes.
    pub(crate) log_bytes_max: u64,
}

/// How a database is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// With a background that flushes and compacts.
    Roomy,
    /// On a host that is full: what the log held stays in memory, and nothing but the log is written.
    Tight,
    /// On a host where there is no room even for that; or because nothing is to be written.
    ReadOnly,
}

struct Open {
    db: DB,
    mode: Mode,
}

/// The open database. It can be closed and opened again under those who use it.
pub(crate) struct Store {
    dir: PathBuf,
    sizes: Sizes,
    /// Held for reading within each call alone; `None` if it could not be opened again.
    open: RwLock<Option<Open>, rank::Store>,
    /// What the last batch took, in bytes.
    written: AtomicU64,
    /// Whether a sync of the log has failed, which no later one makes good. Set with `open` held, so that nobody comes
    /// between.
    has_lost: AtomicBool,
    /// Whether it is about to be closed, for whoever keeps it open long.
    is_closing: AtomicBool,
}

impl Store {
    /// Makes a new database.
    pub(crate) fn create(dir: &Path, sizes: Sizes) -> Result<Self> {
        let (options, families) = describe(sizes, Mode::Roomy, true)?;
        let db = DB::open_cf_descriptors(&options, dir, families).map_err(|error| failed("open", &error))?;
        Ok(Self::with(
            dir,
            sizes,
            Open {
                db,
                mode: Mode::Roomy,
            },
        ))
    }

    /// Opens a database that is there, recovering the log up to the first record that was cut.
    ///
    /// # Errors
    /// ENOSPC if there is no room for that in [`Mode::Roomy`]; from [`Mode::Tight`] it falls back to what needs none.
    pub(crate) fn open(dir: &Path, sizes: Sizes, mode: Mode) -> Result<Self> {
        let opened = match mode {
            Mode::Tight => {
                sync_logs(dir)?;
                open_with_room(dir, sizes, mode)?
            }
            Mode::Roomy | Mode::ReadOnly => open(dir, sizes, mode)?,
        };
        Ok(Self::with(dir, sizes, opened))
    }

    fn with(dir: &Path, sizes: Sizes, open: Open) -> Self {
        Self {
            dir: dir.to_path_buf(),
            sizes,
            open: RwLock::new(Some(open)),
            written: AtomicU64::new(0),
            has_lost: AtomicBool::new(false),
            is_closing: AtomicBool::new(false),
        }
    }

    /// Closes the database and opens it again in `mode`, or in the next one that finds room. What was written before is
    /// durable then.
    ///
    /// # Errors
    /// If what was written may be lost, or the database cannot be read any more.
    pub(crate) fn reopen(&self, mode: Mode) -> Result<()> {
        self.is_closing.store(true, Ordering::Release);
        let mut place = self.open.write();
        self.is_closing.store(false, Ordering::Release);
        // RocksDB's threads end with it.
        *place = None;
        let synced = match self.has_lost.load(Ordering::Acquire) {
            // The kernel told of that once, and may call what it could not write clean: another sync of it means nothing.
            true => Err(Error::Poisoned),
            false => sync_logs(&self.dir),
        };
        self.has_lost.store(synced.is_err(), Ordering::Release);
        let opened = open_with_room(&self.dir, self.sizes, mode)?;
        tracing::info!(mode = ?opened.mode, "opened the database again");
        *place = Some(opened);
        synced
    }

    pub(crate) fn mode(&self) -> Mode {
        self.open.read().as_ref().map_or(Mode::ReadOnly, |open| open.mode)
    }

    /// Uses the database. Whoever is called here must not call the store.
    fn with_db<T>(&self, work: impl FnOnce(&DB) -> Result<T>) -> Result<T> {
        match &*self.open.read() {
            Some(open) => work(&open.db),
            None => Err(not_open()),
        }
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.with_db(|db| {
            db.get_cf(column(db, family)?, key)
                .map_err(|error| failed("read", &error))
        })
    }

    pub(crate) fn multi_get(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>> {
        self.with_db(|db| {
            let found = db.batched_multi_get_cf(column(db, family)?, keys, false);
            let rows = found.into_iter().map(|row| match row {
                Ok(row) => Ok(row.map(|row| row.to_vec())),
                Err(error) => Err(failed("read", &error)),
            });
            rows.collect()
        })
    }

    /// Shows the rows from key `from` up to, and without, key `to` until `show` says false.
    pub(crate) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: &[u8],
        mut show: impl FnMut(&[u8], &[u8]) -> Result<bool>,
    ) -> Result<()> {
        for row in self.rows(family, from, to) {
            let (key, value) = row?;
            if !show(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    /// The rows from key `from` up to, and without, key `to`.
    pub(crate) fn rows(&self, family: Family, from: &[u8], to: &[u8]) -> Rows<'_> {
        Rows {
            store: self,
            family,
            next: from.to_vec(),
            to: to.to_vec(),
            read: Vec::new().into_iter(),
            count: ROWS_MIN,
            is_at_end: false,
        }
    }

    /// Appends one batch to the log and applies it; not yet durable. Waits as long as RocksDB's background is behind.
    ///
    /// # Errors
    /// With ENOSPC it may be there all the same, and nothing more is taken until the database has been opened again.
    pub(crate) fn write<'a>(&self, changes: impl Iterator<Item = &'a Change> + Clone) -> Result<()> {
        // RocksDB's own wait has no end on a full host, and would keep the database from being opened again.
        while !self.try_write(changes.clone())? {
            std::thread::sleep(self.stall());
        }
        Ok(())
    }

    /// False if RocksDB takes nothing at present.
    fn try_write<'a>(&self, changes: impl Iterator<Item = &'a Change>) -> Result<bool> {
        self.with_db(|db| {
            let mut batch = WriteBatch::default();
            for change in changes {
                match change {
                    Change::Put(family, key, value) => batch.put_cf(column(db, *family)?, key, value),
                    Change::Delete(family, key) => batch.delete_cf(column(db, *family)?, key),
                    Change::DeleteRange(family, from, to) => {
                        batch.delete_range_cf(column(db, *family)?, from, to)
                    }
                }
            }
            let bytes = batch.size_in_bytes() as u64;
            let mut options = WriteOptions::default();
            options.set_no_slowdown(true);
            match db.write_opt(batch, &options) {
                Ok(()) => {
                    self.written.store(bytes, Ordering::Relaxed);
                    Ok(true)
                }
                // Whatever is behind because it found no room stays behind.
                Err(error) if error.kind() == ErrorKind::Incomplete => {
                    match property(db, BACKGROUND_ERRORS) {
                        0 => Ok(false),
                        _ => Err(Error::Posix(libc::ENOSPC)),
                    }
                }
                Err(error) => Err(log_failed("log append", &error)),
            }
        })
    }

    /// How long to wait for the background. Where it does not stop writes but delays them, each attempt is charged what the
    /// last batch takes at the rate that it allows, whether it succeeds or not (WriteController::GetDelay).
    fn stall(&self) -> Duration {
        let rate = self.with_db(|db| Ok(property(db, ACTUAL_DELAYED_WRITE_RATE)));
        let charged = self.written.load(Ordering::Relaxed).saturating_mul(2_000_000);
        let micros = charged.checked_div(rate.unwrap_or_default()).unwrap_or_default();
        STALL_MIN + Duration::from_micros(micros)
    }

    /// Makes every batch written before the call durable.
    pub(crate) fn sync_log(&self) -> std::result::Result<(), SyncError> {
        let open = self.open.read();
        if self.has_lost.load(Ordering::Acquire) {
            return Err(SyncError::Failed(Error::Poisoned));
        }
        let synced = match &*open {
            // Opening it made everything durable, and nothing was written since.
            Some(open) if open.mode == Mode::ReadOnly => return Ok(()),
            Some(open) => open.db.flush_wal(true),
            None => return Err(SyncError::Failed(not_open())),
        };
        synced.map_err(|error| {
            if error.as_ref().contains(PREVIOUS_ERROR) {
                return SyncError::AppendFailed;
            }
            self.has_lost.store(true, Ordering::Release);
            SyncError::Failed(log_failed("log sync", &error))
        })
    }

    /// Moves everything from the log into table files, durably: an orderly stop leaves no log to lose. On a full host the log
    /// stays.
    pub(crate) fn flush(&self) -> Result<()> {
        if self.mode() != Mode::Roomy {
            return Ok(());
        }
        self.with_db(|db| {
            for family in [Family::Meta, Family::Content] {
                db.flush_cf(column(db, family)?)
                    .map_err(|error| log_failed("flush", &error))?;
            }
            Ok(())
        })
    }
}

/// Giving the host back what deleted rows take.
impl Store {
    /// Bytes that are in memory and in the log alone: as much, and something besides, is written when they are flushed.
    pub(crate) fn flush_bytes(&self) -> u64 {
        self.sum(c"rocksdb.cur-size-all-mem-tables")
    }

    fn sum(&self, property: &CStr) -> u64 {
        let families = [Family::Meta, Family::Content];
        families.iter().map(|family| self.number(*family, property)).sum()
    }

    fn number(&self, family: Family, property: &CStr) -> u64 {
        let number = self.with_db(|db| {
            db.property_int_value_cf(column(db, family)?, property)
                .map_err(|error| failed("property", &error))
        });
        number.ok().flatten().unwrap_or_default()
    }

    /// Compacts everything, as long as the host has `room`, in bytes, for the copies that this makes, and `go_on` says so.
    /// False if something was left for want of room.
    pub(crate) fn compact(
        &self,
        room: impl Fn() -> Result<u64>,
        go_on: impl Fn() -> Result<()>,
    ) -> Result<bool> {
        if self.mode() != Mode::Roomy || self.flush_bytes() > room()? {
            return Ok(false);
        }
        self.flush()?;
        for family in [Family::Content, Family::Meta] {
            go_on()?;
            if self.number(family, c"rocksdb.live-sst-files-size") > room()? / 2 {
                return Ok(false);
            }
            // Of blob files only those go in which nothing is left.
            self.compact_family(family, 0.0)?;
        }
        let files = || self.number(Family::Content, c"rocksdb.num-blob-files");
        let bytes = || self.number(Family::Content, c"rocksdb.live-blob-file-size");
        let mut left = files();
        while left > 0 && self.mode() == Mode::Roomy {
            go_on()?;
            let garbage = self.number(Family::Content, c"rocksdb.live-blob-file-garbage-size");
            if garbage <= (bytes() / GARBAGE_SHARE).max(GARBAGE_BYTES_MIN) {
                break;
            }
            // The oldest files, as many as there is room to copy.
            let file_bytes = (bytes() / files().max(1)).max(1);
            let some = (room()? / 2 / file_bytes).clamp(1, left);
            self.compact_family(Family::Content, (some as f64 + 0.5) / files().max(1) as f64)?;
            left -= some;
        }
        self.with_db(|db| collect_garbage(db, GARBAGE_AGE_CUTOFF))?;
        Ok(self.mode() == Mode::Roomy)
    }

    fn compact_family(&self, family: Family, garbage_age_cutoff: f64) -> Result<()> {
        self.with_db(|db| {
            collect_garbage(db, garbage_age_cutoff)?;
            let mut options = CompactOptions::default();
            options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
            // Its errors show in the next write.
            let all: Option<&[u8]> = None;
            db.compact_range_cf_opt(column(db, family)?, all, all, &options);
            Ok(())
        })
    }
}

/// Lets compactions copy what is left in the oldest blob files: this share of them.
fn collect_garbage(db: &DB, age_cutoff: f64) -> Result<()> {
    let age_cutoff = age_cutoff.min(1.0).to_string();
    let options = [("blob_garbage_collection_age_cutoff", age_cutoff.as_str())];
    db.set_options_cf(column(db, Family::Content)?, &options)
        .map_err(|error| failed("options", &error))
}

/// Why the log could not be synced.
#[derive(Debug)]
pub(crate) enum SyncError {
    /// An append failed before, which is the writer's matter; this sync did nothing.
    AppendFailed,
    /// The sync itself.
    Failed(Error),
}

/// Rows in the order of their keys, read some at a time: those of one reading are of one moment.
pub(crate) struct Rows<'s> {
    store: &'s Store,
    family: Family,
    next: Vec<u8>,
    to: Vec<u8>,
    read: std::vec::IntoIter<Row>,
    count: usize,
    is_at_end: bool,
}

impl Rows<'_> {
    fn read_more(&mut self) -> Result<()> {
        let (count, mut bytes) = (self.count, 0);
        let mut read = Vec::with_capacity(count);
        self.store.with_db(|db| {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(self.to.as_slice());
            let mode = IteratorMode::From(&self.next, Direction::Forward);
            for row in db.iterator_cf_opt(column(db, self.family)?, options, mode) {
                let row = row.map_err(|error| failed("scan", &error))?;
                bytes += row.1.len();
                read.push(row);
                if read.len() == count || bytes >= ROWS_BYTES_MAX {
                    return Ok(());
                }
            }
            self.is_at_end = true;
            Ok(())
        })?;
        self.count = (count * 2).min(ROWS_MAX);
        if let Some((key, _)) = read.last() {
            self.next = [key, [0].as_slice()].concat();
        }
        self.read = read.into_iter();
        Ok(())
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if let Some(row) = self.read.next() {
            return Some(Ok(row));
        }
        if self.is_at_end {
            return None;
        }
        match self.read_more() {
            Ok(()) => self.read.next().map(Ok),
            Err(error) => {
                self.is_at_end = true;
                Some(Err(error))
            }
        }
    }
}

/// A number that RocksDB has for the whole database; 0 if it does not tell.
fn property(db: &DB, name: &rocksdb::properties::PropName) -> u64 {
    db.property_int_value(name).ok().flatten().unwrap_or_default()
}

fn not_open() -> Error {
    Error::Storage {
        errno: libc::EIO,
        message: "the database could not be opened again".to_owned(),
    }
}

fn column(db: &DB, family: Family) -> Result<&ColumnFamily> {
    let name = match family {
        Family::Meta => META,
        Family::Content => CONTENT,
    };
    db.cf_handle(name).ok_or_else(|| Error::Corrupt {
        what: format!("column family {name}"),
    })
}

fn open(dir: &Path, sizes: Sizes, mode: Mode) -> Result<Open> {
    let (options, families) = describe(sizes, mode, false)?;
    let db = match mode {
        Mode::Roomy | Mode::Tight => DB::open_cf_descriptors(&options, dir, families),
        // The log is recovered in memory alone.
        Mode::ReadOnly => DB::open_cf_descriptors_read_only(&options, dir, families, false),
    };
    let db = db.map_err(|error| failed("open", &error))?;
    Ok(Open { db, mode })
}

/// Opens it in `mode`, or in the next one that finds room.
fn open_with_room(dir: &Path, sizes: Sizes, mode: Mode) -> Result<Open> {
    let next = match mode {
        Mode::Roomy => Mode::Tight,
        Mode::Tight | Mode::ReadOnly => Mode::ReadOnly,
    };
    match open(dir, sizes, mode) {
        Err(error) if error.is_no_room() && next != mode => open_with_room(dir, sizes, next),
        opened => opened,
    }
}

/// Makes the logs of a closed database durable: RocksDB never syncs one that it found.
fn sync_logs(dir: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io("sync the log", &error);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let log = File::options().write(true).open(path).map_err(failed)?;
            log.sync_all().map_err(failed)?;
        }
    }
    sync_dir(dir)
}

/// The options of the database, and its column families with theirs.
fn describe(sizes: Sizes, mode: Mode, create: bool) -> Result<(Options, [ColumnFamilyDescriptor; 2])> {
    // Each log says where the one before it ends: of logs that are not synced yet the kernel may lose an older one's pages
    // and keep a younger one's, which must not be replayed then.
    // A batch that is delayed is charged twice, so the rate is twice the usual one.
    let mut settings = "track_and_verify_wals=true;delayed_write_rate=33554432".to_owned();
    if mode == Mode::Tight {
        // Blocks that are allocated ahead would be missing for what needs them now.
        settings += ";avoid_flush_during_recovery=true;allow_fallocate=false";
    }
    let options = Options::default().get_options_from_string(settings);
    let mut options = options.map_err(|error| failed("options", &error))?;
    options.create_if_missing(create);
    options.create_missing_column_families(create);
    options.set_error_if_exists(create);
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_max_background_jobs(2);
    options.set_max_open_files(1024);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    let cache = Cache::new_lru_cache(sizes.cache_bytes);
    if mode == Mode::Tight {
        options.set_max_total_wal_size(UNBOUNDED_BYTES as u64);
    } else {
        options.set_max_total_wal_size(sizes.log_bytes_max);
        options.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager_with_cache(
            sizes.cache_bytes / 2,
            false,
            cache.clone(),
        ));
    }
    let family = |name, blob_bytes_min| {
        ColumnFamilyDescriptor::new(name, family_options(&cache, sizes, mode, blob_bytes_min))
    };
    let families = [family(META, None), family(CONTENT, Some(BLOB_BYTES_MIN))];
    Ok((options, families))
}

fn family_options(cache: &Cache, sizes: Sizes, mode: Mode, blob_bytes_min: Option<u64>) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_bloom_filter(10.0, false);
    table.set_format_version(5);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    // Sealed values do not compress.
    options.set_compression_type(DBCompressionType::None);
    if mode == Mode::Tight {
        options.set_write_buffer_size(UNBOUNDED_BYTES);
        options.set_disable_auto_compactions(true);
    } else {
        options.set_write_buffer_size(sizes.write_buffer_bytes);
    }
    options.set_level_compaction_dynamic_level_bytes(true);
    // A directory emptied and filled again must not be read through its tombstones.
    options.add_compact_on_deletion_collector_factory(DELETIONS_WINDOW, DELETIONS_MIN, 0.5);
    if let Some(bytes) = blob_bytes_min {
        options.set_enable_blob_files(true);
        options.set_min_blob_size(bytes);
        options.set_blob_compression_type(DBCompressionType::None);
        options.set_enable_blob_gc(true);
        options.set_blob_gc_age_cutoff(GARBAGE_AGE_CUTOFF);
        options.set_blob_file_size(sizes.write_buffer_bytes as u64);
    }
    options
}

fn failed(what: &str, error: &rocksdb::Error) -> Error {
    failed_with(what, error, errno_of)
}

/// What failed while the log was written or synced, here or by one of RocksDB's threads before: that latches the error, and
/// answers the next append with it.
fn log_failed(what: &str, error: &rocksdb::Error) -> Error {
    failed_with(what, error, log_errno_of)
}

fn failed_with(what: &str, error: &rocksdb::Error, errno_of: impl Fn(&str) -> i32) -> Error {
    let message = format!("{what}: {error}");
    if error.kind() == rocksdb::ErrorKind::Corruption {
        return Error::Corrupt { what: message };
    }
    let errno = errno_of(error.as_ref());
    Error::Storage { errno, message }
}

/// RocksDB reports a full disk as an I/O error whose text carries strerror(3)'s words.
fn errno_of(text: &str) -> i32 {
    match text {
        full if full.contains("No space left") => libc::ENOSPC,
        full if full.contains("Disk quota exceeded") => libc::EDQUOT,
        _ => libc::EIO,
    }
}

/// The same for the log. Whatever kept a sync from storing pages, they may be gone: there is no trying again (rule R6).
fn log_errno_of(text: &str) -> i32 {
    match FAILED_SYNCS.iter().any(|sync| text.contains(sync)) {
        true => libc::EIO,
        false => errno_of(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> Sizes {
        Sizes {
            cache_bytes: 8 << 20,
            write_buffer_bytes: 1 << 20,
            log_bytes_max: 64 << 20,
        }
    }

    #[test]
    fn a_sync_that_found_no_room_is_no_append_without_room() {
        for (why, errno) in [
            ("No space left on device", libc::ENOSPC),
            ("Disk quota exceeded", libc::EDQUOT),
        ] {
            let error = |what: &str| format!("IO error: {why}: While {what}: /v/meta/000012.log: {why}");
            for sync in ["fdatasync", "fsync", "sync_file_range returned -1"] {
                assert_eq!(log_errno_of(&error(sync)), libc::EIO);
            }
            assert_eq!(log_errno_of(&error("appending to file")), errno);
        }
    }

    /// A host of its own with room for `bytes`, until it is dropped.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new(bytes: u64) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("none", dir.path(), "tmpfs", flags, Some(size.as_c_str())).unwrap();
            Self(dir)
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }

    #[test]
    fn a_batch_waits_for_no_flush_that_found_no_room() {
        // Memtables fill faster than they are stored; the store of the first ends without room while batches wait for it.
        for round in 0..3 {
            let host = Host::new((20 + round) << 20);
            let store = Store::create(&host.0.path().join("meta"), sizes()).unwrap();
            let batch = |number: u64| {
                let row = |row: u64| {
                    let key = [number.to_be_bytes(), row.to_be_bytes()].concat();
                    Change::Put(Family::Meta, key, vec![1; 1000])
                };
                (0..3000).map(row).collect::<Vec<_>>()
            };
            let (end, ended) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let failed = (0..100).find_map(|number| store.write(batch(number).iter()).err());
                drop(store);
                end.send(failed).unwrap();
            });
            let failed = ended.recv_timeout(Duration::from_secs(60)).unwrap();
            assert!(failed.unwrap().is_no_room());
        }
    }

    #[test]
    fn batches_that_rocksdb_delays_or_stops_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("meta"), sizes()).unwrap();
        let triggers = [
            ("level0_file_num_compaction_trigger", "100"),
            ("level0_slowdown_writes_trigger", "2"),
        ];
        let set = store.with_db(|db| Ok(db.set_options_cf(column(db, Family::Meta)?, &triggers)));
        set.unwrap().unwrap();
        for number in 0..2000_u64 {
            let key = number.to_be_bytes().to_vec();
            let row = Change::Put(Family::Meta, key, vec![1; 10_000]);
            store.write(std::iter::once(&row)).unwrap();
        }
        assert!(
            store
                .with_db(|db| Ok(property(db, ACTUAL_DELAYED_WRITE_RATE)))
                .unwrap()
                > 0
        );
    }

    #[test]
    fn a_log_that_a_sync_failed_for_is_not_durable_for_being_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("meta"), sizes()).unwrap();
        for mode in [Mode::Tight, Mode::ReadOnly] {
            store.reopen(mode).unwrap();
            assert!(store.sync_log().is_ok());
        }
        store.has_lost.store(true, Ordering::Release);
        assert_eq!(store.reopen(Mode::Tight), Err(Error::Poisoned));
        assert!(matches!(store.sync_log(), Err(SyncError::Failed(_))));
        // What is there can be read.
        assert_eq!(store.get(Family::Meta, b"key"), Ok(None));
    }
}
