//! Inode records, orphan records, extended attributes: rows that are looked at one by one.

use super::repair::Fix;
use super::{Check, Fault, Found, Known};
use crate::engine::error::{Error, Result};
use crate::engine::format::dirent::{Entry, Place, Xattr};
use crate::engine::format::rowkey::{self, Family, Kind, Table};
use crate::engine::types::{Domain, FileKind, Ino};

/// Rows between two reports of progress.
pub(super) const PROGRESS_ROWS: u64 = 10_000;

impl Check<'_> {
    /// Shows every row of a kind, of every domain whose keys may be used: its inode, its last number and the sealed value.
    pub(super) fn each_row(
        &mut self,
        kind: Kind,
        phase: &'static str,
        total: Option<u64>,
        mut show: impl FnMut(&mut Self, &[u8], &[u8]) -> Result<()>,
    ) -> Result<()> {
        let core = self.core;
        let mut done = 0_u64;
        self.progress(phase, 0, total);
        for domain in self.access.reached() {
            let (from, to) = rowkey::all(domain, kind);
            let mut shown = Ok(());
            let scanned = core.store.scan(Family::Meta, &from, &to, |key, sealed| {
                shown = self.access.go_on().and_then(|()| show(self, key, sealed));
                done += 1;
                if done.is_multiple_of(PROGRESS_ROWS) {
                    self.progress(phase, done, total);
                }
                Ok(shown.is_ok())
            });
            self.progress(phase, done, total);
            shown.and_then(|()| self.tolerate(phase, scanned))?;
        }
        Ok(())
    }

    /// A database that is damaged in itself gives no more rows, and the check goes on with what it has.
    pub(super) fn tolerate(&mut self, what: &str, scanned: Result<()>) -> Result<()> {
        match scanned {
            Err(Error::Corrupt { what: error }) => {
                self.is_incomplete = true;
                self.is_name_damaged = true;
                let detail = format!("{what} cannot be read to their end, and nothing is repaired: {error}");
                self.found(Fault::Record, None, detail, None);
                Ok(())
            }
            scanned => scanned,
        }
    }

    pub(super) fn check_inodes(&mut self) -> Result<()> {
        let root = self.core.committer.root();
        self.each_row(Kind::Inode, "inodes", Some(root.inodes), |check, key, sealed| {
            let ino = Ino(rowkey::last_number(key).unwrap_or_default());
            let (record, _) = match check.access.open_record(ino, key, sealed) {
                Ok(found) => found,
                Err(Error::Corrupt { what }) => {
                    check.damaged.insert(ino);
                    check.found(
                        Fault::Record,
                        Some(ino),
                        format!("{what} fails authentication"),
                        None,
                    );
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            check.counts.inodes += 1;
            match record.kind {
                FileKind::Directory => check.counts.directories += 1,
                FileKind::Regular => check.counts.files += 1,
                _ => {}
            }
            check.counts.blocks = check.counts.blocks.saturating_add(record.content.blocks);
            let known = Known {
                kind: Some(record.kind),
                nlink: record.nlink,
                children: record.children,
                xattrs: record.xattrs,
                blocks: record.content.blocks,
                runs: record.content.runs,
                parent: record.parent,
                found: Found::default(),
            };
            check.inodes.insert(ino, known);
            if ino.0 >= check.core.committer.holds(ino.domain()).ino_limit {
                let detail = "its number has not been given out".to_owned();
                check.found(Fault::Record, Some(ino), detail, None);
            }
            Ok(())
        })?;
        self.each_row(Kind::Orphan, "unlinked inodes", None, |check, key, sealed| {
            let ino = Ino(rowkey::last_number(key).unwrap_or_default());
            if check.access.open_row(ino, key, sealed).is_err() {
                // One of an inode without links is found to lack its mark, and gets another.
                let is_stray = check.inodes.get(&ino).is_none_or(|known| known.nlink > 0);
                if is_stray && !check.damaged.contains(&ino) {
                    let detail = "the mark of an unlinked inode fails authentication".to_owned();
                    let fix = Fix::DeleteRow(Family::Meta, key.to_vec());
                    check.found(Fault::Record, Some(ino), detail, Some(fix));
                }
                return Ok(());
            }
            // Without an inode, its slot file is still to be removed.
            check.counts.orphans += 1;
            match check.inodes.get_mut(&ino) {
                Some(known) if known.nlink == 0 => known.found.is_orphan = true,
                Some(_) => {
                    let detail = "marked as unlinked, but it has links".to_owned();
                    let fix = Fix::DeleteRow(Family::Meta, key.to_vec());
                    check.found(Fault::LeftOver, Some(ino), detail, Some(fix));
                }
                None if check.damaged.contains(&ino) => {}
                None => {
                    check.unlinked.insert(ino);
                }
            }
            Ok(())
        })
    }

    pub(super) fn check_attributes(&mut self) -> Result<()> {
        self.each_row(Kind::Xattr, "extended attributes", None, |check, key, sealed| {
            let (ino, place) = rowkey::numbers(key);
            let entry = check
                .access
                .open_row(ino, key, sealed)
                .ok()
                .and_then(|plain| Place::<Xattr>::decode(&plain).ok());
            let Some(entry) = entry else {
                let detail = "an extended attribute fails authentication".to_owned();
                if let Some(known) = check.inodes.get_mut(&ino) {
                    known.found.are_xattrs_damaged = true;
                }
                check.found(Fault::Record, Some(ino), detail, None);
                return Ok(());
            };
            let Place::Present(xattr) = entry else {
                return Ok(());
            };
            if !check.is_in_its_chain(Table::Xattrs, ino, place, xattr.name())? {
                let detail = "an extended attribute cannot be found by its name".to_owned();
                check.found(Fault::Name, Some(ino), detail, None);
            }
            match check.inodes.get_mut(&ino) {
                Some(known) => known.found.xattrs = known.found.xattrs.saturating_add(1),
                None if check.damaged.contains(&ino) => {}
                None => {
                    let fix = Fix::DeleteRow(Family::Meta, key.to_vec());
                    let detail = "an extended attribute of no inode".to_owned();
                    check.found(Fault::LeftOver, Some(ino), detail, Some(fix));
                }
            }
            Ok(())
        })
    }

    pub(super) fn check_counters(&mut self) {
        if !self.damaged.is_empty() {
            // Nobody can say how many blocks those have.
            return;
        }
        self.counts.blocks = self.inodes.values().map(|known| known.blocks).sum();
        for domain in self.access.reached() {
            let says = self.core.committer.holds(domain);
            let known = self.inodes.iter().filter(|(ino, _)| ino.domain() == domain);
            let known = known.map(|(_, known)| known.blocks);
            let (inodes, blocks) = known.fold((0, 0), |(inodes, sum), blocks| (inodes + 1, sum + blocks));
            let who = match domain {
                Domain::FIRST => "the volume".to_owned(),
                other => format!("key domain {}", other.0),
            };
            let mut compare = |what: &str, before: u64, after: u64, fix: Fix| {
                if before != after {
                    let detail = format!("{who} counts {before} {what}, there are {after}");
                    self.found(Fault::Counter, None, detail, Some(fix));
                }
            };
            let (before, after) = (says.inodes, inodes);
            compare("inodes", before, after, Fix::Inodes(domain, before, after));
            let (before, after) = (says.blocks, blocks);
            compare("blocks", before, after, Fix::Blocks(domain, before, after));
        }
    }
}
