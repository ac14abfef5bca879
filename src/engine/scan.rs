//! Verifying that a domain's rows are those that were last written: a scan of all of them, at one moment, against the sums
//! that stand sealed in each inode's record and in the root record (docs/integrity.md). It finds what was put back as it once
//! was, dropped or added, which no tag tells.

use super::error::Result;
use super::format::inode::InodeRecord;
use super::format::root::{DomainRoot, RootRecord};
use super::format::rowkey::{self, Family, Kind};
use super::format::rowsum::RowSum;
use super::format::seal::Seal;
use super::keys::DomainKeys;
use super::store::{Cursor, Moment, Store};
use super::types::{Domain, Ino};

/// Rows between two looks at whether to go on: keys may have to go, and wait for this.
const ROWS_PER_LOOK: u64 = 256;

/// What more there is of an inode than its record.
const OF_INODES: [Kind; 4] = [Kind::Bitmap, Kind::Chunk, Kind::Dirent, Kind::Xattr];
/// What a domain's root covers, besides inode records.
const OF_DOMAINS: [Kind; 3] = [Kind::Domain, Kind::Orphan, Kind::Usage];

/// Something that is not what was last written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// The rows of an inode: its record says another sum, which is so far from what there is.
    Rows(Ino, RowSum),
    /// An inode's record does not open, and nothing can be said of its rows.
    Record(Ino),
    /// There are rows of an inode that is not there.
    Stray(Ino),
    /// There are rows that no format knows.
    Unknown,
    /// The records of the domain: its root says another sum.
    Root(RowSum),
    /// The root record does not open, or is not there.
    NoRoot,
}

/// How much was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Scanned {
    pub(crate) inodes: u64,
    pub(crate) rows: u64,
}

/// A scan under way.
struct Scan<'s> {
    moment: &'s Moment<'s>,
    keys: &'s DomainKeys,
    go_on: &'s dyn Fn(u64) -> Result<()>,
    found: &'s mut dyn FnMut(Mismatch),
    scanned: Scanned,
}

/// Scans a domain whose rows are summed up, and tells what it `found`. `go_on` is asked now and then, with the inodes looked at so
/// far.
///
/// # Errors
/// EAGAIN if the scan has to begin again; those of `go_on`; storage's own.
pub(crate) fn scan(
    store: &Store,
    keys: &DomainKeys,
    go_on: &dyn Fn(u64) -> Result<()>,
    found: &mut dyn FnMut(Mismatch),
) -> Result<Scanned> {
    store.at_one_moment(|moment| {
        let mut scan = Scan {
            moment,
            keys,
            go_on,
            found,
            scanned: Scanned::default(),
        };
        let mut sum = RowSum::default();
        scan.inodes(&mut sum)?;
        for kind in OF_DOMAINS {
            scan.each(kind, &mut sum)?;
        }
        scan.unknown()?;
        scan.root(sum)?;
        Ok(scan.scanned)
    })
}

impl<'s> Scan<'s> {
    fn all(&self, kind: Kind) -> Result<Cursor<'s>> {
        let (from, to) = rowkey::all(self.keys.domain(), kind);
        self.moment.cursor(Family::Meta, &from, &to)
    }

    fn add(&mut self, sum: &mut RowSum, key: &[u8], row: &[u8]) -> Result<()> {
        if self.scanned.rows.is_multiple_of(ROWS_PER_LOOK) {
            (self.go_on)(self.scanned.inodes)?;
            self.moment.go_on()?;
        }
        self.scanned.rows += 1;
        match Seal::of_row(row) {
            Some(seal) => self.keys.replace_in(sum, key, None, Some(&seal)),
            None => (self.found)(Mismatch::Unknown),
        }
        Ok(())
    }

    /// Every inode's record, and its other rows beside it.
    fn inodes(&mut self, sum: &mut RowSum) -> Result<()> {
        let mut records = self.all(Kind::Inode)?;
        let mut others = Vec::with_capacity(OF_INODES.len());
        for kind in OF_INODES {
            others.push(self.all(kind)?);
        }
        while let Some((key, row)) = records.row()? {
            let ino = Ino(rowkey::last_number(key).unwrap_or_default());
            self.add(sum, key, row)?;
            let says = self.keys.open_row(Family::Meta, key, row);
            let says = says.and_then(|plain| InodeRecord::decode(&plain).ok());
            let mut is = RowSum::default();
            for other in &mut others {
                self.rows_of(other, ino, &mut is)?;
            }
            match says.and_then(|(_, rows)| rows) {
                Some(says) if says == is => {}
                Some(says) => (self.found)(Mismatch::Rows(ino, is.minus(says))),
                None => (self.found)(Mismatch::Record(ino)),
            }
            self.scanned.inodes += 1;
            records.advance();
        }
        for other in &mut others {
            self.rows_of(other, Ino(u64::MAX), &mut RowSum::default())?;
        }
        Ok(())
    }

    /// Sums up the rows of one inode, which come next, behind those of inodes that are not there.
    fn rows_of(&mut self, rows: &mut Cursor<'_>, ino: Ino, sum: &mut RowSum) -> Result<()> {
        let mut stray = None;
        while let Some((key, row)) = rows.row()? {
            let (of, _) = rowkey::numbers(key);
            if of > ino {
                break;
            }
            if of == ino {
                self.add(sum, key, row)?;
            } else if stray.replace(of) != Some(of) {
                (self.found)(Mismatch::Stray(of));
            }
            rows.advance();
        }
        Ok(())
    }

    fn each(&mut self, kind: Kind, sum: &mut RowSum) -> Result<()> {
        let mut rows = self.all(kind)?;
        while let Some((key, row)) = rows.row()? {
            self.add(sum, key, row)?;
            // The first domain's root covers the roots of all others.
            if kind == Kind::Usage {
                let other = rowkey::last_number(key).and_then(|number| u16::try_from(number).ok());
                let root = rowkey::root(Domain(other.unwrap_or_default()));
                if let Some(row) = self.moment.get(Family::Meta, &root)? {
                    self.add(sum, &root, &row)?;
                }
            }
            rows.advance();
        }
        Ok(())
    }

    /// Rows between the kinds.
    fn unknown(&mut self) -> Result<()> {
        let (mut from, end) = rowkey::all_rows(self.keys.domain());
        let mut kinds: Vec<_> = OF_INODES.into_iter().chain(OF_DOMAINS).collect();
        kinds.extend([Kind::Inode, Kind::Root]);
        kinds.sort_unstable_by_key(|kind| *kind as u8);
        let known = kinds
            .into_iter()
            .map(|kind| rowkey::all(self.keys.domain(), kind));
        for (begins, ends) in known.chain(std::iter::once((end, Vec::new()))) {
            if self.moment.cursor(Family::Meta, &from, &begins)?.row()?.is_some() {
                (self.found)(Mismatch::Unknown);
            }
            from = ends;
        }
        Ok(())
    }

    fn root(&mut self, is: RowSum) -> Result<()> {
        let key = rowkey::root(self.keys.domain());
        let row = self.moment.get(Family::Meta, &key)?;
        let plain = row.and_then(|row| self.keys.open_row(Family::Meta, &key, &row));
        let says = plain.and_then(|plain| match self.keys.domain() {
            Domain::FIRST => RootRecord::decode(&plain).ok()?.sum,
            _ => DomainRoot::decode(&plain).ok().map(|root| root.sum),
        });
        match says {
            Some(says) if says == is => {}
            Some(says) => (self.found)(Mismatch::Root(is.minus(says))),
            None => (self.found)(Mismatch::NoRoot),
        }
        Ok(())
    }
}
