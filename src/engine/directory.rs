//! Listing directories. A cookie is the place of an entry in its directory's table, so that it stays good while
//! other entries come and go.

use super::core::{Access, Fetch};
use super::error::{Error, Result};
use super::format::dirent::Dirent;
use super::format::rowkey::{self, Family, Table};
use super::types::{Attr, Cookie, DirEntry, FileKind, Ino, Taken};

/// Entries read under one holding of the directory's lock.
const BATCH: usize = 128;
/// Cookies of the entries that every directory has; places are above.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

/// An entry with the place it was found at.
struct Listed {
    place: u64,
    entry: Dirent,
}

impl Access<'_> {
    /// Shows the entries behind `from`, `.` and `..` first.
    pub(crate) fn readdir(
        &self,
        dir: Ino,
        from: Cookie,
        take: &mut dyn FnMut(&DirEntry<'_>) -> Taken,
    ) -> Result<()> {
        self.list(dir, from, false, &mut |entry, _| take(entry))
    }

    /// The same with attributes, but of what lies in another domain, whose keys may not be had. Each entry taken, but `.` and
    /// `..`, counts one reference of the kernel's.
    pub(crate) fn readdirplus(
        &self,
        dir: Ino,
        from: Cookie,
        take: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> Taken,
    ) -> Result<()> {
        self.list(dir, from, true, take)
    }

    fn list(
        &self,
        dir: Ino,
        from: Cookie,
        plus: bool,
        take: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> Taken,
    ) -> Result<()> {
        let node = self.directory(dir)?;
        let parent = node.state.read().record.parent;
        let mut after = from.0;
        for (cookie, name, ino) in [(DOT, b".".as_slice(), dir), (DOT_DOT, b"..", parent)] {
            if after < cookie {
                let attr = if plus { Some(self.attr(ino)?) } else { None };
                let entry = DirEntry {
                    ino,
                    kind: FileKind::Directory,
                    name,
                    cookie: Cookie(cookie),
                };
                if take(&entry, attr.as_ref()) == Taken::Full {
                    return Ok(());
                }
                after = cookie;
            }
        }
        let mut shown_any = after != from.0;
        loop {
            let batch = match self.list_batch(dir, after, plus) {
                // What was shown before, and counted, has to reach the kernel; a later call fails at this place again.
                Err(_) if shown_any => return Ok(()),
                batch => batch?,
            };
            let files = batch
                .iter()
                .filter(|listed| listed.entry.kind == FileKind::Regular);
            let files: Vec<_> = files.map(|listed| listed.entry.ino).collect();
            if !files.is_empty() {
                self.fetch_ahead(Fetch::Files(files));
            }
            let shown = self.show(&batch, plus, take);
            if plus {
                let taken = *shown.as_ref().unwrap_or(&0);
                for listed in batch.iter().skip(taken) {
                    self.forget(listed.entry.ino, 1);
                }
            }
            match shown {
                Err(_) if shown_any => return Ok(()),
                Err(error) => return Err(error),
                Ok(taken) if taken < batch.len() || batch.len() < BATCH => return Ok(()),
                Ok(_) => shown_any = true,
            }
            after = batch.last().map_or(after, |listed| listed.place);
        }
    }

    /// Reads entries; with `plus` each is counted as known to the kernel, under the lock that an unlink takes too.
    fn list_batch(&self, dir: Ino, after: u64, plus: bool) -> Result<Vec<Listed>> {
        let node = self.directory(dir)?;
        let _held = node.state.read();
        let mut batch = Vec::with_capacity(BATCH);
        self.entries(Table::Dirents, dir, after, |place, entry| {
            batch.push(Listed { place, entry });
            Ok(batch.len() < BATCH)
        })?;
        if plus {
            for listed in &batch {
                self.nodes.looked_up(listed.entry.ino);
            }
        }
        Ok(batch)
    }

    /// How many entries were taken.
    fn show(
        &self,
        batch: &[Listed],
        plus: bool,
        take: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> Taken,
    ) -> Result<usize> {
        let attrs = if plus { self.attrs(batch)? } else { Vec::new() };
        for (index, Listed { place, entry }) in batch.iter().enumerate() {
            let shown = DirEntry {
                ino: entry.ino,
                kind: entry.kind,
                name: &entry.name,
                cookie: Cookie(*place),
            };
            if take(&shown, attrs.get(index).and_then(Option::as_ref)) == Taken::Full {
                return Ok(index);
            }
        }
        Ok(batch.len())
    }

    /// Attributes of a whole batch: from the nodes in memory, the others in one read that makes no nodes.
    fn attrs(&self, batch: &[Listed]) -> Result<Vec<Option<Attr>>> {
        let is_own = |ino: Ino| self.keys_of(ino.domain()).is_ok();
        let known: Vec<_> = batch
            .iter()
            .map(|listed| self.nodes.get(listed.entry.ino).filter(|node| is_own(node.ino)))
            .collect();
        let unknown = batch.iter().zip(&known).filter(|(_, node)| node.is_none());
        let keys: Vec<_> = unknown
            .map(|(listed, _)| listed.entry.ino)
            .filter(|ino| is_own(*ino))
            .map(rowkey::inode)
            .collect();
        let mut rows = keys.iter().zip(self.store.multi_get(Family::Meta, &keys)?);
        let attrs = batch.iter().zip(known).map(|(listed, node)| {
            let ino = listed.entry.ino;
            if let Some(node) = node {
                return Ok(Some(node.state.read().record.attr(ino)));
            }
            if !is_own(ino) {
                let there = self.reach(ino.domain());
                return Ok(there.and_then(|there| there.attr(ino)).ok());
            }
            let Some((key, Some(sealed))) = rows.next() else {
                return Err(Error::corrupt_inode(ino));
            };
            Ok(Some(self.open_record(ino, key, &sealed)?.0.attr(ino)))
        });
        attrs.collect()
    }
}
