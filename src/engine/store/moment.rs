//! What the database holds at one moment, whatever is committed meanwhile.

use super::{Store, column, failed};
use crate::engine::error::{Error, Result};
use crate::engine::format::rowkey::Family;
use rocksdb::{DB, DBRawIteratorWithThreadMode, ReadOptions, SnapshotWithThreadMode};
use std::sync::atomic::Ordering;

/// How much is read ahead of a cursor, in bytes.
const READAHEAD_BYTES: usize = 1 << 20;

/// The database as of one moment.
pub(crate) struct Moment<'d> {
    store: &'d Store,
    db: &'d DB,
    snapshot: SnapshotWithThreadMode<'d, DB>,
}

impl Store {
    /// Shows what is there now. The database stays open meanwhile: a `look` that takes long asks [`Moment::go_on`].
    pub(crate) fn at_one_moment<T>(&self, look: impl FnOnce(&Moment<'_>) -> Result<T>) -> Result<T> {
        self.with_db(|db| {
            look(&Moment {
                store: self,
                db,
                snapshot: db.snapshot(),
            })
        })
    }
}

impl Moment<'_> {
    /// To be asked now and then.
    ///
    /// # Errors
    /// EAGAIN: the database is to be closed, and opened again.
    pub(crate) fn go_on(&self) -> Result<()> {
        match self.store.is_closing.load(Ordering::Acquire) {
            true => Err(Error::Posix(libc::EAGAIN)),
            false => Ok(()),
        }
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let found = self.snapshot.get_cf(column(self.db, family)?, key);
        found.map_err(|error| failed("read", &error))
    }

    /// The rows from key `from` up to, and without, key `to`, which are read past the cache.
    pub(crate) fn cursor(&self, family: Family, from: &[u8], to: &[u8]) -> Result<Cursor<'_>> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        options.fill_cache(false);
        options.set_readahead_size(READAHEAD_BYTES);
        let mut rows = self
            .snapshot
            .raw_iterator_cf_opt(column(self.db, family)?, options);
        rows.seek(from);
        Ok(Cursor(rows))
    }
}

/// A place among the rows of a moment.
pub(crate) struct Cursor<'m>(DBRawIteratorWithThreadMode<'m, DB>);

impl Cursor<'_> {
    /// The row here; none at the end.
    pub(crate) fn row(&mut self) -> Result<Option<(&[u8], &[u8])>> {
        match self.0.item() {
            Some(row) => Ok(Some(row)),
            None => {
                let status = self.0.status();
                status.map(|()| None).map_err(|error| failed("scan", &error))
            }
        }
    }

    /// Goes on to the next row.
    pub(crate) fn advance(&mut self) {
        if self.0.valid() {
            self.0.next();
        }
    }
}
