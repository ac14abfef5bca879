//! Chained tables: directory entries and extended attributes, found by the PRF of their names.

use super::commit::Batch;
use super::core::Access;
use super::error::{Error, Result};
use super::format::dirent::{CHAIN_MAX, Entry, Place};
use super::format::rowkey::{self, Family, Table};
use super::types::Ino;
use std::collections::BTreeSet;

/// Longest name, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// What a search for a name found.
pub(crate) enum Search<T> {
    /// The entry and its place.
    Found(u64, T),
    /// No such name; where it could be put.
    Absent(Option<u64>),
}

impl<T> Search<T> {
    pub(crate) fn found(self) -> Option<(u64, T)> {
        match self {
            Self::Found(place, entry) => Some((place, entry)),
            Self::Absent(_) => None,
        }
    }
}

impl Access<'_> {
    fn at_place<T: Entry>(&self, table: Table, ino: Ino, place: u64) -> Result<Option<Place<T>>> {
        let plain = self.row(ino, &rowkey::entry(table, ino, place))?;
        plain
            .map(|plain| Place::decode(&plain).map_err(|_| Error::corrupt_inode(ino)))
            .transpose()
    }

    /// Looks `name` up in a table of `ino`, whose lock is held.
    pub(crate) fn search<T: Entry>(&self, table: Table, ino: Ino, name: &[u8]) -> Result<Search<T>> {
        let first = self.keys_of(ino.domain())?.first_place(table, ino, name)?;
        let mut free = None;
        for place in first..first + CHAIN_MAX {
            match self.at_place::<T>(table, ino, place)? {
                None => return Ok(Search::Absent(free.or(Some(place)))),
                Some(Place::Removed) => free = free.or(Some(place)),
                Some(Place::Present(entry)) if entry.name() == name => {
                    return Ok(Search::Found(place, entry));
                }
                Some(Place::Present(_)) => {}
            }
        }
        Ok(Search::Absent(free))
    }

    pub(crate) fn put_entry<T: Entry>(
        &self,
        batch: &mut Batch,
        table: Table,
        ino: Ino,
        place: u64,
        entry: T,
    ) -> Result<()> {
        self.put_row(
            batch,
            rowkey::entry(table, ino, place),
            &Place::Present(entry).encode(),
        )
    }

    /// Fills the empty table of a new inode.
    pub(crate) fn put_first_entries<T: Entry>(
        &self,
        batch: &mut Batch,
        table: Table,
        ino: Ino,
        entries: Vec<T>,
    ) -> Result<()> {
        let mut taken = BTreeSet::new();
        for entry in entries {
            let first = self
                .keys_of(ino.domain())?
                .first_place(table, ino, entry.name())?;
            let free = (first..first + CHAIN_MAX).find(|place| !taken.contains(place));
            let place = free.ok_or(Error::Posix(libc::ENOSPC))?;
            taken.insert(place);
            self.put_entry(batch, table, ino, place, entry)?;
        }
        Ok(())
    }

    /// Empties a place: without a trace if it is the last of its chain and `chain_grows` is not set, which says that
    /// the same batch adds to that chain; else with the mark that the chain goes on.
    pub(crate) fn remove_entry<T: Entry>(
        &self,
        batch: &mut Batch,
        table: Table,
        ino: Ino,
        place: u64,
        chain_grows: bool,
    ) -> Result<()> {
        let key = rowkey::entry(table, ino, place);
        let is_last = place % CHAIN_MAX == CHAIN_MAX - 1
            || self
                .store
                .get(Family::Meta, &rowkey::entry(table, ino, place + 1))?
                .is_none();
        if is_last && !chain_grows {
            batch.delete(Family::Meta, key);
            return Ok(());
        }
        self.put_row(batch, key, &Place::<T>::Removed.encode())
    }

    /// Shows the entries behind place `after`, in order of their places, until `show` says false.
    pub(crate) fn entries<T: Entry>(
        &self,
        table: Table,
        ino: Ino,
        after: u64,
        mut show: impl FnMut(u64, T) -> Result<bool>,
    ) -> Result<()> {
        let from = rowkey::entry(table, ino, after.saturating_add(1));
        let to = rowkey::entry(table, ino, u64::MAX);
        self.store.scan(Family::Meta, &from, &to, |key, sealed| {
            let plain = self.open_row(ino, key, sealed)?;
            match Place::decode(&plain).map_err(|_| Error::corrupt_inode(ino))? {
                Place::Removed => Ok(true),
                Place::Present(entry) => show(rowkey::last_number(key).unwrap_or(u64::MAX), entry),
            }
        })
    }
}

/// Whether two places are of one chain.
pub(crate) fn same_chain(one: u64, other: u64) -> bool {
    one / CHAIN_MAX == other / CHAIN_MAX
}

/// Refuses what can be no name of a directory entry.
pub(crate) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Error::Posix(libc::ENAMETOOLONG));
    }
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return Err(Error::Posix(libc::EINVAL));
    }
    Ok(())
}

/// Refuses names that no operation may create or remove.
pub(crate) fn check_new_name(name: &[u8]) -> Result<()> {
    check_name(name)?;
    if name == b"." || name == b".." {
        Err(Error::Posix(libc::EINVAL))
    } else {
        Ok(())
    }
}
