//! Repairing: each in a commit of its own. Nothing here guesses: what is removed belongs to nothing, what is counted was
//! counted, and what has no name gets one below `lost+found` in the root of its domain.

use super::{Event, Finding};
use crate::engine::batch::Batch;
use crate::engine::core::{Access, Core};
use crate::engine::error::{Error, Result};
use crate::engine::format::dirent::Dirent;
use crate::engine::format::rowkey::{self, Cover, Family, Table};
use crate::engine::format::rowsum::RowSum;
use crate::engine::format::seal::Seal;
use crate::engine::node::Stored;
use crate::engine::runs::Runs;
use crate::engine::staged::Staged;
use crate::engine::table::Search;
use crate::engine::types::{Domain, FileKind, Ino, NewNode};

/// Where what has no name gets one.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// What would repair a problem.
pub(super) enum Fix {
    DeleteRow(Family, Vec<u8>),
    Counts(Ino, Recount),
    Reconnect(Ino),
    MarkOrphan(Ino),
    /// A page of runs, and the record that it should have.
    Bitmap(Ino, u64, Vec<u8>),
    /// Runs of the slot file that nothing uses.
    Punch(Ino, Vec<u64>),
    RemoveSlotFile(Ino),
    /// A domain's count of inodes, and what it should be.
    Inodes(Domain, u64, u64),
    /// The same of blocks.
    Blocks(Domain, u64, u64),
    /// By how much the sum in an inode's record is to change.
    Rows(Ino, RowSum),
    /// By how much the sum in a domain's root is to change.
    Root(Domain, RowSum),
}

impl Fix {
    /// Whose keys it needs.
    fn domain(&self) -> Domain {
        match self {
            Self::DeleteRow(_, key) => rowkey::domain_of(key).unwrap_or_default(),
            Self::Counts(ino, _)
            | Self::Reconnect(ino)
            | Self::MarkOrphan(ino)
            | Self::Bitmap(ino, ..)
            | Self::Punch(ino, _)
            | Self::RemoveSlotFile(ino)
            | Self::Rows(ino, _) => ino.domain(),
            Self::Inodes(domain, ..) | Self::Blocks(domain, ..) | Self::Root(domain, _) => *domain,
        }
    }

    /// What was counted is written before anything changes it, and the sums of what there is before all.
    fn turn(&self) -> u8 {
        match self {
            Self::Rows(..) | Self::Root(..) => 0,
            Self::Counts(..) => 1,
            _ => 2,
        }
    }
}

/// Counts of an inode's record that are to be others.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Recount {
    pub(super) nlink: Option<u32>,
    pub(super) children: Option<u64>,
    pub(super) xattrs: Option<u32>,
    /// Blocks and runs.
    pub(super) content: Option<(u64, u64)>,
}

/// Repairs what can be, and makes it durable.
pub(super) fn repair(core: &Core, findings: &mut [Finding], watch: &mut dyn FnMut(Event<'_>)) -> Result<()> {
    for turn in 0..=2 {
        let is_next = |finding: &&mut Finding| finding.fix.as_ref().is_some_and(|fix| fix.turn() == turn);
        for finding in findings.iter_mut().filter(is_next) {
            let Some(fix) = &finding.fix else { continue };
            match core.drain(fix.domain()).and_then(|access| access.apply(fix)) {
                Ok(()) => {
                    finding.problem.is_repaired = true;
                    watch(Event::Repaired(&finding.problem));
                }
                Err(Error::KeyRevoked) => return Err(Error::KeyRevoked),
                Err(error) => {
                    let detail = &mut finding.problem.detail;
                    *detail = format!("{detail}; it could not be repaired: {error}");
                }
            }
        }
    }
    core.committer.sync_to(core.committer.committed())
}

impl Access<'_> {
    fn apply(&self, fix: &Fix) -> Result<()> {
        let mut batch = Batch::default();
        match fix {
            Fix::DeleteRow(Family::Content, key) => batch.delete(Family::Content, key.clone()),
            Fix::DeleteRow(Family::Meta, key) => {
                let delete = |batch: &mut Batch| {
                    let old = self.stored_seal(key)?;
                    self.delete_row(batch, key.clone(), old.as_ref())
                };
                match rowkey::cover(key) {
                    Some(Cover::Inode(ino)) => return self.change_rows(ino, delete),
                    _ => delete(&mut batch)?,
                }
            }
            Fix::Counts(ino, recount) => return self.recount(*ino, *recount),
            Fix::Reconnect(ino) => return self.reconnect(*ino),
            Fix::MarkOrphan(ino) => {
                let key = rowkey::orphan(*ino);
                // One that is damaged may be there.
                let old = self.stored_seal(&key)?;
                self.put_row(&mut batch, key, &[], old.as_ref())?;
                self.commit(batch)?;
                self.orphaned(*ino);
                return Ok(());
            }
            Fix::Bitmap(ino, page, bits) => {
                let key = rowkey::bitmap(*ino, *page);
                return self.change_rows(*ino, |batch| {
                    let old = self.stored_seal(&key)?;
                    match bits.iter().all(|byte| *byte == 0) {
                        true => self.delete_row(batch, key.clone(), old.as_ref()),
                        false => self.put_row(batch, key.clone(), bits, old.as_ref()).map(|_| ()),
                    }
                });
            }
            Fix::Rows(ino, change) => return self.restate(*ino, *change),
            Fix::Root(domain, change) => batch.adjust(*domain, *change),
            Fix::Punch(ino, runs) => {
                let slots = self.slots.existing(*ino)?;
                return runs.iter().try_for_each(|run| slots.punch(*run));
            }
            Fix::RemoveSlotFile(ino) => {
                // Bitmaps are looked for where there is a slot file.
                self.change_rows(*ino, |batch| self.delete_bitmaps(batch, *ino))?;
                return self.slots.remove(*ino);
            }
            Fix::Inodes(domain, before, after) => {
                let delta = i128::from(*after) - i128::from(*before);
                batch.count_inodes(*domain, i64::try_from(delta).unwrap_or(0));
            }
            Fix::Blocks(domain, before, after) => batch.count_blocks(*domain, *before, *after),
        }
        self.commit(batch).map(|_| ())
    }

    fn delete_bitmaps(&self, batch: &mut Batch, ino: Ino) -> Result<()> {
        let (from, to) = (rowkey::bitmap(ino, 0), rowkey::bitmap(ino, u64::MAX));
        self.store.scan(Family::Meta, &from, &to, |key, sealed| {
            self.delete_row(batch, key.to_vec(), Seal::of_row(sealed).as_ref())?;
            Ok(true)
        })
    }

    /// Changes rows of an inode, and its record, if it has one, with them.
    fn change_rows(&self, ino: Ino, change: impl FnOnce(&mut Batch) -> Result<()>) -> Result<()> {
        let mut batch = Batch::default();
        let node = match self.node(ino) {
            // Nothing covers them.
            Err(Error::Posix(libc::ESTALE) | Error::Corrupt { .. }) => {
                change(&mut batch)?;
                batch.take_change_of(ino);
                return self.commit(batch).map(|_| ());
            }
            node => node?,
        };
        let mut state = node.state.write();
        change(&mut batch)?;
        let stored = self.put_inode(&mut batch, ino, &state.record_to_store(), Some(&state.stored))?;
        self.commit(batch)?;
        state.stored = stored;
        // What was read of bitmaps may be another now.
        state.file.runs = Runs::default();
        Ok(())
    }

    /// Has an inode's record say what its rows add up to.
    fn restate(&self, ino: Ino, change: RowSum) -> Result<()> {
        let node = self.node(ino)?;
        let mut state = node.state.write();
        let mut rows = state.stored.rows;
        if let Some(rows) = &mut rows {
            rows.merge(change);
        }
        let old = Stored { rows, ..state.stored };
        let mut batch = Batch::default();
        let stored = self.put_inode(&mut batch, ino, &state.record_to_store(), Some(&old))?;
        self.commit(batch)?;
        state.stored = stored;
        Ok(())
    }

    fn recount(&self, ino: Ino, recount: Recount) -> Result<()> {
        let node = self.node(ino)?;
        let mut state = node.state.write();
        let mut batch = Batch::default();
        let mut record = state.record_to_store();
        record.nlink = recount.nlink.unwrap_or(record.nlink);
        record.children = recount.children.unwrap_or(record.children);
        record.xattrs = recount.xattrs.unwrap_or(record.xattrs);
        if let Some((blocks, runs)) = recount.content {
            batch.count_blocks(ino.domain(), record.content.blocks, blocks);
            record.content.blocks = blocks;
            record.content.runs = runs;
        }
        let stored = self.put_inode(&mut batch, ino, &record, Some(&state.stored))?;
        self.commit(batch)?;
        state.stored = stored;
        state.published = record.content;
        state.record = record;
        Ok(())
    }

    /// Names a lost inode after its number.
    fn reconnect(&self, ino: Ino) -> Result<()> {
        let dir = self.directory(self.lost_and_found(ino.domain().root())?)?;
        let node = self.node(ino)?;
        let mut staged = Staged::lock(&[&dir, &node]);
        let name = format!("#{}", ino.0).into_bytes();
        let Search::Absent(Some(place)) = self.search::<Dirent>(Table::Dirents, dir.ino, &name)? else {
            return Err(Error::Posix(libc::EEXIST));
        };
        let now = self.now();
        let mut batch = Batch::default();
        let record = staged.record(ino)?;
        let kind = record.kind;
        record.ctime = now;
        if kind == FileKind::Directory {
            record.parent = dir.ino;
        } else {
            record.nlink = 1;
        }
        self.put_entry(
            &mut batch,
            Table::Dirents,
            dir.ino,
            place,
            Dirent { ino, kind, name },
        )?;
        let parent = staged.record(dir.ino)?;
        parent.children = parent.children.saturating_add(1);
        if kind == FileKind::Directory {
            parent.nlink = parent.nlink.saturating_add(1);
        }
        parent.mtime = now;
        parent.ctime = now;
        staged.commit(self, batch)
    }

    fn lost_and_found(&self, root: Ino) -> Result<Ino> {
        // Whoever the volume belongs to may look into it.
        let owner = self.attr(root)?;
        let dir = NewNode {
            kind: FileKind::Directory,
            perm: 0o700,
            umask: 0,
            uid: owner.uid,
            gid: owner.gid,
            rdev: 0,
        };
        let made = match self.make(root, LOST_AND_FOUND, &dir, &[]) {
            Err(Error::Posix(libc::EEXIST)) => self.lookup(root, LOST_AND_FOUND)?,
            made => made?,
        };
        self.forget(made.ino, 1);
        Ok(made.ino)
    }
}
