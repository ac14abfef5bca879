//! Links and counts: what inodes say of themselves, against what was found.

use super::repair::{Fix, Recount};
use super::{Check, Fault};
use crate::engine::types::{FileKind, Ino};
use std::collections::HashSet;

impl Check<'_> {
    pub(super) fn check_links(&mut self) {
        let mut inodes: Vec<_> = self.inodes.keys().copied().collect();
        inodes.sort_unstable();
        for ino in inodes {
            self.check_inode(ino);
        }
        self.check_reachable();
    }

    fn check_inode(&mut self, ino: Ino) {
        let Some(known) = self.inodes.get(&ino) else {
            return;
        };
        let found = &known.found;
        let is_dir = known.kind == Some(FileKind::Directory);
        let mut wrong = Vec::new();
        let mut recount = Recount::default();
        let mut compare = |what: &str, says: u64, is: u64| {
            if says != is {
                wrong.push(format!("{what}: {says}, should be {is}"));
            }
            says != is
        };
        let links = match is_dir {
            true => found.subdirectories.saturating_add(2),
            false => found.names,
        };
        // What is lost or unlinked is a case of its own.
        let is_linked = known.nlink > 0 && (is_dir || found.names > 0);
        if !self.is_name_damaged {
            if is_linked && compare("links", u64::from(known.nlink), u64::from(links)) {
                recount.nlink = Some(links);
            }
            if is_dir && compare("entries", known.children, found.children) {
                recount.children = Some(found.children);
            }
        }
        let is_countable = !found.are_xattrs_damaged;
        if is_countable
            && compare(
                "extended attributes",
                u64::from(known.xattrs),
                u64::from(found.xattrs),
            )
        {
            recount.xattrs = Some(found.xattrs);
        }
        let is_lost = known.nlink > 0 && found.names == 0 && ino != Ino::ROOT;
        // Its name would be in another domain.
        let is_root = ino == ino.domain().root();
        let is_unmarked = known.nlink == 0 && !found.is_orphan && found.children == 0;
        let is_named_orphan = known.nlink == 0 && found.names > 0;
        let has_lost_entries = known.nlink == 0 && found.children > 0;
        let has_many_names = is_dir && found.names > 1;
        let whole = !self.is_name_damaged;
        if !wrong.is_empty() {
            let fix = Fix::Counts(ino, recount);
            self.found(Fault::Count, Some(ino), wrong.join("; "), Some(fix));
        }
        if is_lost && whole {
            let detail = "it has no name".to_owned();
            let fix = (!is_root).then_some(Fix::Reconnect(ino));
            self.found(Fault::Lost, Some(ino), detail, fix);
        }
        if is_named_orphan {
            let detail = "it has a name, but no links".to_owned();
            self.found(Fault::Name, Some(ino), detail, None);
        } else if is_unmarked {
            let detail = "it has no links, and is not marked as unlinked".to_owned();
            let fix = whole.then_some(Fix::MarkOrphan(ino));
            self.found(Fault::Lost, Some(ino), detail, fix);
        }
        if has_lost_entries {
            let detail = "a directory without links has entries".to_owned();
            self.found(Fault::Unreachable, Some(ino), detail, None);
        }
        if has_many_names {
            let detail = "a directory with more than one name".to_owned();
            self.found(Fault::Name, Some(ino), detail, None);
        }
    }

    /// Directories that have names, but only from one another.
    fn check_reachable(&mut self) {
        let mut reached = HashSet::from([Ino::ROOT]);
        let mut unreachable = Vec::new();
        for (&ino, known) in &self.inodes {
            if known.kind != Some(FileKind::Directory) {
                continue;
            }
            let mut path = Vec::new();
            let mut seen = HashSet::new();
            let mut at = ino;
            let is_reached = loop {
                if reached.contains(&at) {
                    break true;
                }
                if !seen.insert(at) {
                    break false;
                }
                path.push(at);
                match self.inodes.get(&at).and_then(|known| known.found.name) {
                    Some((dir, _)) => at = dir,
                    // What has no name at all is lost, and was told.
                    None => break true,
                }
            };
            if is_reached {
                reached.extend(path);
            } else {
                unreachable.push(ino);
            }
        }
        unreachable.sort_unstable();
        for ino in unreachable {
            let detail = "its names lead in a circle".to_owned();
            self.found(Fault::Unreachable, Some(ino), detail, None);
        }
    }
}
