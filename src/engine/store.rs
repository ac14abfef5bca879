//! RocksDB as the engine uses it: two column families of opaque rows, a log that is synced on request.

use super::error::{Error, Result};
use super::format::rowkey::Family;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode,
    Direction, IteratorMode, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};
use std::path::Path;

const META: &str = "meta";
const CONTENT: &str = "content";
/// Inline blocks of this many bytes and more go to blob files: compaction moves only their references.
const BLOB_BYTES_MIN: u64 = 2048;
/// The log is cut, by flushing the oldest memtable, past this many bytes.
const LOG_BYTES_MAX: u64 = 256 << 20;

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
/// Rows in the order of their keys.
pub(crate) type Rows<'s> = Box<dyn Iterator<Item = Result<Row>> + 's>;

/// The open database.
pub(crate) struct Store {
    db: DB,
}

impl Store {
    /// Makes a new database.
    pub(crate) fn create(dir: &Path, cache_bytes: usize) -> Result<Self> {
        Self::open_with(dir, cache_bytes, true)
    }

    /// Opens a database that is there, recovering the log up to the first record that was cut.
    pub(crate) fn open(dir: &Path, cache_bytes: usize) -> Result<Self> {
        Self::open_with(dir, cache_bytes, false)
    }

    /// Opens a database and changes nothing of it: the log is recovered in memory alone.
    pub(crate) fn open_read_only(dir: &Path, cache_bytes: usize) -> Result<Self> {
        let (options, families) = describe(cache_bytes, false);
        let db = DB::open_cf_descriptors_read_only(&options, dir, families, false)
            .map_err(|error| failed("open", &error))?;
        Ok(Self { db })
    }

    fn open_with(dir: &Path, cache_bytes: usize, create: bool) -> Result<Self> {
        let (options, families) = describe(cache_bytes, create);
        let db = DB::open_cf_descriptors(&options, dir, families).map_err(|error| failed("open", &error))?;
        Ok(Self { db })
    }

    fn family(&self, family: Family) -> Result<&ColumnFamily> {
        let name = match family {
            Family::Meta => META,
            Family::Content => CONTENT,
        };
        self.db.cf_handle(name).ok_or_else(|| Error::Corrupt {
            what: format!("column family {name}"),
        })
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db
            .get_cf(self.family(family)?, key)
            .map_err(|error| failed("read", &error))
    }

    pub(crate) fn multi_get(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>> {
        let found = self.db.batched_multi_get_cf(self.family(family)?, keys, false);
        found
            .into_iter()
            .map(|row| match row {
                Ok(row) => Ok(row.map(|row| row.to_vec())),
                Err(error) => Err(failed("read", &error)),
            })
            .collect()
    }

    /// Shows the rows from key `from` up to, and without, key `to` until `show` says false.
    pub(crate) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: &[u8],
        mut show: impl FnMut(&[u8], &[u8]) -> Result<bool>,
    ) -> Result<()> {
        for row in self.rows(family, from, to)? {
            let (key, value) = row?;
            if !show(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    /// The rows from key `from` up to, and without, key `to`, as they are now.
    pub(crate) fn rows(&self, family: Family, from: &[u8], to: &[u8]) -> Result<Rows<'_>> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to.to_vec());
        let mode = IteratorMode::From(from, Direction::Forward);
        let rows = self.db.iterator_cf_opt(self.family(family)?, options, mode);
        Ok(Box::new(
            rows.map(|row| row.map_err(|error| failed("scan", &error))),
        ))
    }

    /// Appends one batch to the log and applies it; not yet durable.
    pub(crate) fn write<'a>(&self, changes: impl Iterator<Item = &'a Change>) -> Result<()> {
        let mut batch = WriteBatch::default();
        for change in changes {
            match change {
                Change::Put(family, key, value) => batch.put_cf(self.family(*family)?, key, value),
                Change::Delete(family, key) => batch.delete_cf(self.family(*family)?, key),
                Change::DeleteRange(family, from, to) => {
                    batch.delete_range_cf(self.family(*family)?, from, to)
                }
            }
        }
        self.db
            .write_opt(batch, &WriteOptions::default())
            .map_err(|error| failed("log append", &error))
    }

    /// Makes every batch written before the call durable.
    pub(crate) fn sync_log(&self) -> Result<()> {
        self.db
            .flush_wal(true)
            .map_err(|error| failed("log sync", &error))
    }

    /// Moves everything from the log into table files, durably: an orderly stop leaves no log to lose.
    pub(crate) fn flush(&self) -> Result<()> {
        for family in [Family::Meta, Family::Content] {
            self.db
                .flush_cf(self.family(family)?)
                .map_err(|error| failed("flush", &error))?;
        }
        Ok(())
    }
}

/// The options of the database, and its column families with theirs.
fn describe(cache_bytes: usize, create: bool) -> (Options, [ColumnFamilyDescriptor; 2]) {
    let mut options = Options::default();
    options.create_if_missing(create);
    options.create_missing_column_families(create);
    options.set_error_if_exists(create);
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_max_total_wal_size(LOG_BYTES_MAX);
    options.set_max_background_jobs(2);
    options.set_max_open_files(1024);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    let cache = Cache::new_lru_cache(cache_bytes);
    options.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager_with_cache(
        cache_bytes / 2,
        false,
        cache.clone(),
    ));
    let families = [
        ColumnFamilyDescriptor::new(META, family_options(&cache, None)),
        ColumnFamilyDescriptor::new(CONTENT, family_options(&cache, Some(BLOB_BYTES_MIN))),
    ];
    (options, families)
}

fn family_options(cache: &Cache, blob_bytes_min: Option<u64>) -> Options {
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
    options.set_write_buffer_size(32 << 20);
    options.set_level_compaction_dynamic_level_bytes(true);
    // A directory emptied and filled again must not be read through its tombstones.
    options.add_compact_on_deletion_collector_factory(DELETIONS_WINDOW, DELETIONS_MIN, 0.5);
    if let Some(bytes) = blob_bytes_min {
        options.set_enable_blob_files(true);
        options.set_min_blob_size(bytes);
        options.set_blob_compression_type(DBCompressionType::None);
        options.set_enable_blob_gc(true);
    }
    options
}

fn failed(what: &str, error: &rocksdb::Error) -> Error {
    let message = format!("{what}: {error}");
    if error.kind() == rocksdb::ErrorKind::Corruption {
        return Error::Corrupt { what: message };
    }
    // RocksDB reports a full disk as an I/O error whose text carries strerror(3)'s words.
    let errno = if message.contains("No space left") {
        libc::ENOSPC
    } else {
        libc::EIO
    };
    Error::Storage { errno, message }
}
