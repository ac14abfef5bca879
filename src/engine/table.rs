//! Chained tables: directory entries and extended attributes, found by the PRF of their names.

use super::batch::Batch;
use super::core::Access;
use super::error::{Error, Result};
use super::format::dirent::{CHAIN_MAX, Entry, Place};
use super::format::rowkey::{self, Family, Table};
use super::format::seal::Seal;
use super::types::Ino;
use std::collections::BTreeSet;

/// Longest name, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// A place of a table, and what is stored there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) place: u64,
    /// Of the entry, or of the mark of a removed one; none where nothing is.
    pub(crate) seal: Option<Seal>,
}

impl Spot {
    fn empty(place: u64) -> Self {
        Self { place, seal: None }
    }
}

/// What a search for a name found.
pub(crate) enum Search<T> {
    /// The entry and where it is.
    Found(Spot, T),
    /// No such name; where it could be put.
    Absent(Option<Spot>),
}

impl<T> Search<T> {
    pub(crate) fn found(self) -> Option<(Spot, T)> {
        match self {
            Self::Found(spot, entry) => Some((spot, entry)),
            Self::Absent(_) => None,
        }
    }
}

impl Access<'_> {
    fn at_place<T: Entry>(&self, table: Table, ino: Ino, place: u64) -> Result<(Spot, Option<Place<T>>)> {
        let key = rowkey::entry(table, ino, place);
        let Some(sealed) = self.store.get(Family::Meta, &key)? else {
            return Ok((Spot::empty(place), None));
        };
        let plain = self.open_row(ino, &key, &sealed)?;
        let found = Place::decode(&plain).map_err(|_| Error::corrupt_inode(ino))?;
        let seal = Seal::of_row(&sealed);
        Ok((Spot { place, seal }, Some(found)))
    }

    /// Looks `name` up in a table of `ino`, whose lock is held.
    pub(crate) fn search<T: Entry>(&self, table: Table, ino: Ino, name: &[u8]) -> Result<Search<T>> {
        let first = self.keys_of(ino.domain())?.first_place(table, ino, name)?;
        let mut free = None;
        for place in first..first + CHAIN_MAX {
            let (spot, found) = self.at_place::<T>(table, ino, place)?;
            match found {
                None => return Ok(Search::Absent(free.or(Some(spot)))),
                Some(Place::Removed) => free = free.or(Some(spot)),
                Some(Place::Present(entry)) if entry.name() == name => {
                    return Ok(Search::Found(spot, entry));
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
        spot: Spot,
        entry: T,
    ) -> Result<()> {
        let key = rowkey::entry(table, ino, spot.place);
        let plain = Place::Present(entry).encode();
        self.put_row(batch, key, &plain, spot.seal.as_ref()).map(|_| ())
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
            self.put_entry(batch, table, ino, Spot::empty(place), entry)?;
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
        spot: Spot,
        chain_grows: bool,
    ) -> Result<()> {
        let Spot { place, seal } = spot;
        let key = rowkey::entry(table, ino, place);
        let is_last = place % CHAIN_MAX == CHAIN_MAX - 1
            || self
                .store
                .get(Family::Meta, &rowkey::entry(table, ino, place + 1))?
                .is_none();
        if is_last && !chain_grows {
            return self.delete_row(batch, key, seal.as_ref());
        }
        let plain = Place::<T>::Removed.encode();
        self.put_row(batch, key, &plain, seal.as_ref()).map(|_| ())
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
pub(crate) fn same_chain(one: Spot, other: Spot) -> bool {
    one.place / CHAIN_MAX == other.place / CHAIN_MAX
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
