//! Directory entries: each opens, lies where it is looked for, and leads to an inode of its kind.

use super::{Check, Fault};
use crate::engine::error::Result;
use crate::engine::format::dirent::{CHAIN_MAX, Dirent, Entry, Place};
use crate::engine::format::domain::DomainState;
use crate::engine::format::rowkey::{self, Family, Kind, Table};
use crate::engine::table::check_new_name;
use crate::engine::types::{FileKind, Ino};

/// Directories that a path goes through at most, in case they go in a circle.
const DEPTH_MAX: usize = 4096;

impl Check<'_> {
    pub(super) fn check_names(&mut self) -> Result<()> {
        self.each_row(Kind::Dirent, "names", None, |check, key, sealed| {
            let (dir, place) = rowkey::numbers(key);
            let entry = check
                .access
                .open_row(dir, key, sealed)
                .ok()
                .and_then(|plain| Place::<Dirent>::decode(&plain).ok());
            match entry {
                Some(Place::Removed) => Ok(()),
                Some(Place::Present(entry)) => check.check_name(dir, place, &entry),
                None => {
                    check.is_name_damaged = true;
                    let detail = "an entry fails authentication".to_owned();
                    check.found(Fault::Record, Some(dir), detail, None);
                    Ok(())
                }
            }
        })
    }

    fn check_name(&mut self, dir: Ino, place: u64, entry: &Dirent) -> Result<()> {
        let name = |detail: &str| detail.to_owned();
        match self.inodes.get_mut(&dir) {
            Some(known) if known.kind == Some(FileKind::Directory) => {
                known.found.children += 1;
                if entry.kind == FileKind::Directory {
                    known.found.subdirectories = known.found.subdirectories.saturating_add(1);
                }
            }
            Some(_) => self.found(
                Fault::Name,
                Some(dir),
                name("an entry of what is no directory"),
                None,
            ),
            None if self.damaged.contains(&dir) => {}
            // Its children are lost, and get other names.
            None => {
                self.found(Fault::Name, Some(dir), name("an entry of no directory"), None);
                return Ok(());
            }
        }
        if check_new_name(&entry.name).is_err()
            || !self.is_in_its_chain(Table::Dirents, dir, place, entry.name())?
        {
            self.found(
                Fault::Name,
                Some(dir),
                name("an entry that cannot be found by its name"),
                None,
            );
        }
        let Some(child) = self.inodes.get_mut(&entry.ino) else {
            // The root of a domain whose keys may not be used.
            let is_dark = self.access.keys_of(entry.ino.domain()).is_err()
                && entry.ino == entry.ino.domain().root()
                && self.is_named_as_root(dir, entry);
            if !is_dark && !self.damaged.contains(&entry.ino) {
                let detail = format!("an entry leads to inode {}, which is not there", entry.ino.0);
                self.found(Fault::Name, Some(dir), detail, None);
            }
            return Ok(());
        };
        child.found.names = child.found.names.saturating_add(1);
        child.found.name = child.found.name.or(Some((dir, place)));
        let is_kind_right = child.kind == Some(entry.kind);
        let is_parent_right = entry.kind != FileKind::Directory || child.parent == dir;
        let is_domain_right = entry.ino.domain() == dir.domain() || self.is_named_as_root(dir, entry);
        if !is_kind_right {
            self.found(
                Fault::Name,
                Some(entry.ino),
                name("a name gives it another type"),
                None,
            );
        }
        if !is_domain_right {
            let detail = name("its key domain's record gives another place or name");
            self.found(Fault::Name, Some(entry.ino), detail, None);
        }
        if !is_parent_right {
            self.found(
                Fault::Name,
                Some(entry.ino),
                name("it names another directory as its parent"),
                None,
            );
        }
        Ok(())
    }

    /// Whether the record of a domain says that its root has this name.
    fn is_named_as_root(&self, dir: Ino, entry: &Dirent) -> bool {
        let record = self.access.domain_record(entry.ino.domain());
        record.is_ok_and(|record| {
            record.state != DomainState::Removed && record.parent == dir && record.name == entry.name
        })
    }

    /// Whether looking the name up ends at this place: it is of the name's chain, and none before it is empty.
    pub(super) fn is_in_its_chain(&self, table: Table, ino: Ino, place: u64, name: &[u8]) -> Result<bool> {
        let first = self.access.keys_of(ino.domain())?.first_place(table, ino, name)?;
        if place < first || place >= first + CHAIN_MAX {
            return Ok(false);
        }
        for before in first..place {
            let key = rowkey::entry(table, ino, before);
            if self.core.store.get(Family::Meta, &key)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A path of an inode, as far as names lead to it.
    pub(super) fn path_of(&self, ino: Ino) -> Option<Vec<u8>> {
        let mut parts = Vec::new();
        let mut at = ino;
        while at != Ino::ROOT {
            let (dir, place) = self.inodes.get(&at)?.found.name?;
            let row = self.access.row(dir, &rowkey::entry(Table::Dirents, dir, place));
            let Place::Present(entry) = Place::<Dirent>::decode(&row.ok()??).ok()? else {
                return None;
            };
            parts.push(entry.name);
            if parts.len() > DEPTH_MAX {
                return None;
            }
            at = dir;
        }
        parts.push(Vec::new());
        parts.reverse();
        let path = parts.join(&b'/');
        Some(if path.is_empty() { b"/".to_vec() } else { path })
    }
}
