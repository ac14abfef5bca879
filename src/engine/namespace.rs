//! Names: making, finding, linking, renaming and removing them. Each operation is one batch.

use super::batch::Batch;
use super::core::Access;
use super::error::{Error, Result};
use super::format::dirent::Dirent;
use super::format::domain::{DomainRecord, DomainState};
use super::format::inode::{ContentState, InodeRecord};
use super::format::rowkey::Table;
use super::node::Node;
use super::staged::Staged;
use super::table::{Search, Spot, check_name, check_new_name, same_chain};
use super::types::{Attr, Domain, FileKind, Ino, NewNode, Owner, RenameFlags, SGID, Timestamp};
use std::sync::Arc;

/// Most hard links of a file, and most subdirectories of a directory plus two.
const LINKS_MAX: u32 = i32::MAX as u32;
/// Longest symlink target, in bytes: PATH_MAX without its NUL.
const TARGET_BYTES_MAX: usize = 4095;

/// A name and the inode it stands for, as found before any lock was taken.
struct Named {
    dir: Arc<Node>,
    name: Vec<u8>,
    child: Arc<Node>,
    kind: FileKind,
}

impl Access<'_> {
    /// Finds a name, and counts one reference of the kernel's to the inode.
    pub(crate) fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr> {
        check_name(name)?;
        if name == b"." {
            // Of any kind: the kernel finds the inode of an NFS handle so (fuse_get_dentry).
            self.nodes.looked_up(parent);
            return self
                .attr(parent)
                .and_then(named_still)
                .inspect_err(|_| self.forget(parent, 1));
        }
        let dir = self.directory(parent)?;
        let ino = {
            // Counted under the directory's lock: an unlink that follows sees that the kernel knows the inode.
            let held = dir.state.read();
            let ino = match name {
                b".." => held.record.parent,
                _ => self.entry(parent, name)?.1.ino,
            };
            self.nodes.looked_up(ino);
            ino
        };
        let found = match self.keys_of(ino.domain()) {
            Ok(_) => self.attr(ino),
            // The root of another domain.
            Err(_) => self.reach(ino.domain()).and_then(|there| there.attr(ino)),
        };
        found.map_err(|error| {
            self.forget(ino, 1);
            missing_is_corrupt(ino, error)
        })
    }

    pub(crate) fn attr(&self, ino: Ino) -> Result<Attr> {
        let node = self.node(ino)?;
        let state = node.state.read();
        Ok(state.record.attr(ino))
    }

    pub(crate) fn entry(&self, dir: Ino, name: &[u8]) -> Result<(Spot, Dirent)> {
        self.search(Table::Dirents, dir, name)?
            .found()
            .ok_or(Error::Posix(libc::ENOENT))
    }

    fn named(&self, parent: Ino, name: &[u8]) -> Result<Named> {
        let dir = self.directory(parent)?;
        let (child, kind) = {
            let _held = dir.state.read();
            let (_, entry) = self.entry(parent, name)?;
            let child = self
                .node(entry.ino)
                .map_err(|error| missing_is_corrupt(entry.ino, error))?;
            (child, entry.kind)
        };
        Ok(Named {
            dir,
            name: name.to_vec(),
            child,
            kind,
        })
    }

    /// The domain that a name leads to, if that is not the directory's own.
    fn leads_to(&self, parent: Ino, name: &[u8]) -> Result<Option<Domain>> {
        if parent.domain() != Domain::FIRST || self.domains.is_single() {
            return Ok(None);
        }
        let dir = self.directory(parent)?;
        let _held = dir.state.read();
        let found = self.search::<Dirent>(Table::Dirents, parent, name)?.found();
        let domain = found.map(|(_, entry)| entry.ino.domain());
        Ok(domain.filter(|domain| *domain != Domain::FIRST))
    }

    /// Has `work` done with access to what a name leads to; again if it comes to lead elsewhere meanwhile.
    fn reaching<T>(&self, parent: Ino, name: &[u8], work: impl Fn(&Access<'_>) -> Result<T>) -> Result<T> {
        loop {
            let done = match self.leads_to(parent, name)? {
                Some(domain) => work(&self.reach(domain)?),
                None => work(self),
            };
            match done {
                Err(Error::Posix(libc::EXDEV)) => {}
                done => return done,
            }
        }
    }

    /// The place of a name that was found before, or `None` if it no longer stands for the same inode.
    fn still_named(&self, named: &Named) -> Result<Option<Spot>> {
        let found = self
            .search::<Dirent>(Table::Dirents, named.dir.ino, &named.name)?
            .found();
        Ok(found
            .filter(|(_, entry)| entry.ino == named.child.ino)
            .map(|(spot, _)| spot))
    }

    /// Makes an inode under a new name, and counts one reference of the kernel's to it.
    pub(crate) fn make(&self, parent: Ino, name: &[u8], node: &NewNode, target: &[u8]) -> Result<Attr> {
        check_new_name(name)?;
        if target.len() > TARGET_BYTES_MAX {
            return Err(Error::Posix(libc::ENAMETOOLONG));
        }
        let dir = self.directory(parent)?;
        self.take_room_to_grow()?;
        let (ino, key) = match node.kind {
            FileKind::Regular => {
                let (ino, key) = self.unborn_file()?;
                (ino, Some(key))
            }
            _ => (self.unborn_plain()?, None),
        };
        let mut staged = Staged::lock(&[&dir]);
        let now = self.now();
        let inherited = self.inherit(&staged, parent, node)?;
        let node = &NewNode {
            perm: inherited.perm,
            ..*node
        };
        let record = InodeRecord {
            xattrs: inherited.xattrs.len() as u32,
            wrapped_dek: key
                .as_ref()
                .map_or_else(|| [].into(), |(wrapped, _)| Arc::clone(wrapped)),
            target: target.into(),
            ..new_record(Some(&staged.state(parent)?.record), parent, node, now)
        };
        let mut batch = Batch::default();
        let place = self.free_place(&staged, parent, name)?;
        let entry = Dirent {
            ino,
            kind: node.kind,
            name: name.to_vec(),
        };
        self.put_entry(&mut batch, Table::Dirents, parent, place, entry)?;
        self.put_first_entries(&mut batch, Table::Xattrs, ino, inherited.xattrs)?;
        let stored = self.put_inode(&mut batch, ino, &record, None)?;
        batch.count_inodes(ino.domain(), 1);
        let dir = staged.record(parent)?;
        dir.children = dir.children.saturating_add(1);
        if node.kind == FileKind::Directory {
            add_link(dir)?;
        }
        touch(dir, now);
        staged.commit(self, batch)?;
        let attr = record.attr(ino);
        if let Some((_, key)) = key {
            self.home().keyring.remember(ino, key);
        }
        self.nodes.insert_new(Node::new(ino, record, stored, false));
        self.nodes.looked_up(ino);
        Ok(attr)
    }

    /// A place for a new name in a locked directory.
    fn free_place(&self, staged: &Staged<'_>, dir: Ino, name: &[u8]) -> Result<Spot> {
        if staged.state(dir)?.record.nlink == 0 {
            return Err(Error::Posix(libc::ENOENT));
        }
        match self.search::<Dirent>(Table::Dirents, dir, name)? {
            Search::Found(..) => Err(Error::Posix(libc::EEXIST)),
            Search::Absent(place) => place.ok_or(Error::Posix(libc::ENOSPC)),
        }
    }

    pub(crate) fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        let state = node.state.read();
        match state.record.kind {
            FileKind::Symlink => Ok(state.record.target.to_vec()),
            _ => Err(Error::Posix(libc::EINVAL)),
        }
    }

    /// Gives an inode one more name, and counts one reference of the kernel's to it.
    pub(crate) fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr> {
        check_new_name(name)?;
        if ino.domain() != parent.domain() {
            return Err(Error::Posix(libc::EXDEV));
        }
        let dir = self.directory(parent)?;
        let node = self.node(ino)?;
        if node.state.read().record.kind == FileKind::Directory {
            return Err(Error::Posix(libc::EPERM));
        }
        self.take_room_to_grow()?;
        self.publish(&node)?;
        let mut staged = Staged::lock(&[&dir, &node]);
        if staged.state(ino)?.record.nlink == 0 {
            return Err(Error::Posix(libc::ENOENT));
        }
        let now = self.now();
        let mut batch = Batch::default();
        let place = self.free_place(&staged, parent, name)?;
        let record = staged.record(ino)?;
        add_link(record)?;
        record.ctime = now;
        let kind = record.kind;
        self.put_entry(
            &mut batch,
            Table::Dirents,
            parent,
            place,
            Dirent {
                ino,
                kind,
                name: name.to_vec(),
            },
        )?;
        let dir = staged.record(parent)?;
        dir.children = dir.children.saturating_add(1);
        touch(dir, now);
        staged.commit(self, batch)?;
        self.nodes.looked_up(ino);
        Ok(staged.state(ino)?.record.attr(ino))
    }

    /// Removes the name of anything but a directory.
    pub(crate) fn unlink(&self, parent: Ino, name: &[u8]) -> Result<()> {
        check_new_name(name)?;
        let removed = self.remove(parent, name, |kind, _| match kind {
            FileKind::Directory => Err(Error::Posix(libc::EISDIR)),
            _ => Ok(()),
        });
        removed.map_err(|error| match error {
            // The root of another domain.
            Error::Posix(libc::EXDEV) => Error::Posix(libc::EISDIR),
            error => error,
        })
    }

    /// Removes an empty directory.
    pub(crate) fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        match name {
            b"." => return Err(Error::Posix(libc::EINVAL)),
            b".." => return Err(Error::Posix(libc::ENOTEMPTY)),
            _ => {}
        }
        self.reaching(parent, name, |access| {
            access.remove(parent, name, |kind, children| match (kind, children) {
                (FileKind::Directory, 0) => Ok(()),
                (FileKind::Directory, _) => Err(Error::Posix(libc::ENOTEMPTY)),
                _ => Err(Error::Posix(libc::ENOTDIR)),
            })
        })
    }

    fn remove(&self, parent: Ino, name: &[u8], check: impl Fn(FileKind, u64) -> Result<()>) -> Result<()> {
        loop {
            let named = self.named(parent, name)?;
            let child = named.child.ino;
            let mut staged = Staged::lock(&[&named.dir, &named.child]);
            let Some(place) = self.still_named(&named)? else {
                continue;
            };
            let record = &staged.state(child)?.record;
            check(record.kind, record.children)?;
            let now = self.now();
            let mut batch = Batch::default();
            self.remove_entry::<Dirent>(&mut batch, Table::Dirents, parent, place, false)?;
            self.drop_link(&mut batch, &mut staged, child, now)?;
            let dir = staged.record(parent)?;
            dir.children = dir.children.saturating_sub(1);
            if named.kind == FileKind::Directory {
                dir.nlink = dir.nlink.saturating_sub(1);
            }
            touch(dir, now);
            // Its root goes, and the domain with it.
            let ended = (child.domain() != parent.domain()).then(|| self.domain_record(child.domain()));
            let ended = ended.transpose()?.map(|record| DomainRecord {
                state: DomainState::Removed,
                ..record.without_name()
            });
            if let Some(record) = &ended {
                self.put_domain(&mut batch, child.domain(), record)?;
            }
            staged.commit(self, batch)?;
            if let Some(record) = ended {
                self.domains.note(child.domain(), &record);
                // The KMS is told that nothing depends on the key any more.
                self.domains.of(child)?.bell.ring();
            }
            let gone = staged.state(child)?.record.nlink == 0;
            drop(staged);
            if gone {
                self.orphaned(child);
            }
            return Ok(());
        }
    }

    /// Takes a name's share in an inode away; with the last one it becomes an orphan.
    pub(crate) fn drop_link(
        &self,
        batch: &mut Batch,
        staged: &mut Staged<'_>,
        ino: Ino,
        now: Timestamp,
    ) -> Result<()> {
        let record = staged.record(ino)?;
        record.nlink = if record.kind == FileKind::Directory {
            0
        } else {
            record.nlink.saturating_sub(1)
        };
        record.ctime = now;
        if record.nlink == 0 {
            self.put_orphan(batch, ino)?;
        }
        Ok(())
    }

    /// renameat2(2).
    pub(crate) fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        check_new_name(name)?;
        check_new_name(new_name)?;
        if flags.exchange && (flags.no_replace || flags.whiteout.is_some()) {
            return Err(Error::Posix(libc::EINVAL));
        }
        if parent.domain() != new_parent.domain() {
            return Err(Error::Posix(libc::EXDEV));
        }
        let is_same = (parent, name) == (new_parent, new_name);
        self.reaching(parent, name, |access| {
            let is_root_moved = flags.exchange && self.leads_to(parent, name)?.is_some();
            // It stays where it is, as a mount point does.
            if !is_same && (is_root_moved || self.leads_to(new_parent, new_name)?.is_some()) {
                return Err(Error::Posix(libc::EBUSY));
            }
            access.rename_here(parent, name, new_parent, new_name, flags)
        })
    }

    fn rename_here(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        // Nothing else changes which directory is above which.
        let _rename = (parent != new_parent).then(|| self.rename.lock());
        loop {
            let source = self.named(parent, name)?;
            let target = match self.named(new_parent, new_name) {
                Ok(_) if flags.no_replace => return Err(Error::Posix(libc::EEXIST)),
                Ok(target) => Some(target),
                Err(Error::Posix(libc::ENOENT)) if !flags.exchange => None,
                Err(error) => return Err(error),
            };
            if target
                .as_ref()
                .is_some_and(|target| target.child.ino == source.child.ino)
            {
                // Two names of one inode: POSIX wants nothing done.
                return Ok(());
            }
            if parent != new_parent {
                self.refuse_loop(&source, new_parent)?;
                if let Some(target) = target.as_ref().filter(|_| flags.exchange) {
                    self.refuse_loop(target, parent)?;
                }
            }
            // Rule R3: what is in storage under the new name is never older than what was delivered before.
            self.publish(&source.child)?;
            if let Some(target) = target.as_ref().filter(|_| flags.exchange) {
                self.publish(&target.child)?;
            }
            let done = match &target {
                Some(target) if flags.exchange => self.exchange_locked(&source, target)?,
                _ => {
                    let new_dir = self.directory(new_parent)?;
                    self.rename_locked(&source, &new_dir, new_name, target.as_ref(), flags.whiteout)?
                }
            };
            if done {
                return Ok(());
            }
        }
    }

    /// A directory cannot be moved below itself. The rename lock is held.
    fn refuse_loop(&self, moved: &Named, into: Ino) -> Result<()> {
        if moved.kind != FileKind::Directory {
            return Ok(());
        }
        let mut above = into;
        loop {
            if above == moved.child.ino {
                return Err(Error::Posix(libc::EINVAL));
            }
            // Nothing is moved out of its domain, nor above one.
            if above == into.domain().root() {
                return Ok(());
            }
            // A directory that was removed may outlive those above it.
            let dir = self.directory(above).map_err(|_| Error::Posix(libc::ENOENT))?;
            above = dir.state.read().record.parent;
        }
    }

    /// False if the names changed since they were looked up.
    fn rename_locked(
        &self,
        source: &Named,
        new_dir: &Arc<Node>,
        new_name: &[u8],
        target: Option<&Named>,
        whiteout: Option<Owner>,
    ) -> Result<bool> {
        let (old, new, child) = (source.dir.ino, new_dir.ino, source.child.ino);
        let whiteout = whiteout
            .map(|owner| self.unborn_plain().map(|ino| (ino, owner)))
            .transpose()?;
        let mut nodes = vec![&source.dir, new_dir, &source.child];
        nodes.extend(target.map(|target| &target.child));
        let mut staged = Staged::lock(&nodes);
        let Some(place) = self.still_named(source)? else {
            return Ok(false);
        };
        let new_place = match target {
            Some(target) => match self.still_named(target)? {
                Some(place) => place,
                None => return Ok(false),
            },
            None => match self.free_place(&staged, new, new_name) {
                Err(Error::Posix(libc::EEXIST)) => return Ok(false),
                place => place?,
            },
        };
        let is_dir = source.kind == FileKind::Directory;
        let now = self.now();
        let mut batch = Batch::default();

        if let Some(target) = target {
            let replaced = &staged.state(target.child.ino)?.record;
            match (is_dir, replaced.kind == FileKind::Directory) {
                (true, false) => return Err(Error::Posix(libc::ENOTDIR)),
                (false, true) => return Err(Error::Posix(libc::EISDIR)),
                (true, true) if replaced.children > 0 => return Err(Error::Posix(libc::ENOTEMPTY)),
                _ => {}
            }
            self.drop_link(&mut batch, &mut staged, target.child.ino, now)?;
            let dir = staged.record(new)?;
            dir.children = dir.children.saturating_sub(1);
            if is_dir {
                dir.nlink = dir.nlink.saturating_sub(1);
            }
        }
        match whiteout {
            Some((ino, owner)) => {
                self.put_whiteout(&mut batch, &staged, source, place, ino, owner, now)?;
            }
            None => {
                let chain_grows = old == new && same_chain(place, new_place);
                self.remove_entry::<Dirent>(&mut batch, Table::Dirents, old, place, chain_grows)?;
                let dir = staged.record(old)?;
                dir.children = dir.children.saturating_sub(1);
            }
        }
        let entry = Dirent {
            ino: child,
            kind: source.kind,
            name: new_name.to_vec(),
        };
        self.put_entry(&mut batch, Table::Dirents, new, new_place, entry)?;
        let dir = staged.record(new)?;
        dir.children = dir.children.saturating_add(1);
        if is_dir {
            add_link(dir)?;
            let dir = staged.record(old)?;
            dir.nlink = dir.nlink.saturating_sub(1);
            staged.record(child)?.parent = new;
        }
        staged.record(child)?.ctime = now;
        for dir in [old, new] {
            touch(staged.record(dir)?, now);
        }
        let moved = (child.domain() != old.domain()).then(|| self.domain_record(child.domain()));
        let moved = moved.transpose()?.map(|record| DomainRecord {
            parent: new,
            name: new_name.to_vec(),
            ..record
        });
        if let Some(record) = &moved {
            self.put_domain(&mut batch, child.domain(), record)?;
        }
        staged.commit(self, batch)?;
        if let Some(record) = moved {
            self.domains.note(child.domain(), &record);
        }

        if let Some(target) = target {
            let gone = staged.state(target.child.ino)?.record.nlink == 0;
            drop(staged);
            if gone {
                self.orphaned(target.child.ino);
            }
        }
        Ok(true)
    }

    /// Leaves the mark that overlayfs understands, a character device 0:0, under the old name.
    #[expect(
        clippy::too_many_arguments,
        reason = "one step of a rename, called in one place"
    )]
    fn put_whiteout(
        &self,
        batch: &mut Batch,
        staged: &Staged<'_>,
        source: &Named,
        place: Spot,
        ino: Ino,
        owner: Owner,
        now: Timestamp,
    ) -> Result<()> {
        let dir = source.dir.ino;
        let node = NewNode {
            kind: FileKind::CharDevice,
            perm: 0,
            umask: 0,
            uid: owner.uid,
            gid: owner.gid,
            rdev: 0,
        };
        let inherited = self.inherit(staged, dir, &node)?;
        let record = InodeRecord {
            xattrs: inherited.xattrs.len() as u32,
            ..new_record(Some(&staged.state(dir)?.record), dir, &node, now)
        };
        let entry = Dirent {
            ino,
            kind: node.kind,
            name: source.name.clone(),
        };
        self.put_entry(batch, Table::Dirents, dir, place, entry)?;
        self.put_first_entries(batch, Table::Xattrs, ino, inherited.xattrs)?;
        self.put_inode(batch, ino, &record, None)?;
        batch.count_inodes(ino.domain(), 1);
        Ok(())
    }

    /// False if the names changed since they were looked up.
    fn exchange_locked(&self, one: &Named, other: &Named) -> Result<bool> {
        let mut staged = Staged::lock(&[&one.dir, &other.dir, &one.child, &other.child]);
        let (Some(place), Some(other_place)) = (self.still_named(one)?, self.still_named(other)?) else {
            return Ok(false);
        };
        let now = self.now();
        let mut batch = Batch::default();
        for (named, place, with) in [(one, place, other), (other, other_place, one)] {
            let entry = Dirent {
                ino: with.child.ino,
                kind: with.kind,
                name: named.name.clone(),
            };
            self.put_entry(&mut batch, Table::Dirents, named.dir.ino, place, entry)?;
            if with.kind == FileKind::Directory {
                add_link(staged.record(named.dir.ino)?)?;
                let left = staged.record(with.dir.ino)?;
                left.nlink = left.nlink.saturating_sub(1);
                staged.record(with.child.ino)?.parent = named.dir.ino;
            }
            touch(staged.record(named.dir.ino)?, now);
            staged.record(named.child.ino)?.ctime = now;
        }
        staged.commit(self, batch)?;
        Ok(true)
    }
}

/// Refuses what has no name any more: the kernel, which asks about it by its number alone, has let go of it.
fn named_still(attr: Attr) -> Result<Attr> {
    match attr.nlink {
        0 => Err(Error::Posix(libc::ESTALE)),
        _ => Ok(attr),
    }
}

/// A name that leads nowhere is damage, not a race: the directory's lock was held.
pub(crate) fn missing_is_corrupt(ino: Ino, error: Error) -> Error {
    if error == Error::Posix(libc::ESTALE) {
        Error::corrupt_inode(ino)
    } else {
        error
    }
}

/// A record for a new inode; of the directory's record, which the volume's root has none of, it inherits by sgid.
pub(crate) fn new_record(
    dir: Option<&InodeRecord>,
    parent: Ino,
    node: &NewNode,
    now: Timestamp,
) -> InodeRecord {
    let is_dir = node.kind == FileKind::Directory;
    let group = dir.filter(|dir| dir.perm & SGID != 0).map(|dir| dir.gid);
    InodeRecord {
        kind: node.kind,
        perm: if group.is_some() && is_dir {
            node.perm | SGID
        } else {
            node.perm
        } & 0o7777,
        nlink: if is_dir { 2 } else { 1 },
        uid: node.uid,
        gid: group.unwrap_or(node.gid),
        rdev: node.rdev,
        content: ContentState::default(),
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        parent: if is_dir { parent } else { Ino(0) },
        children: 0,
        xattrs: 0,
        wrapped_dek: [].into(),
        target: [].into(),
    }
}

fn add_link(record: &mut InodeRecord) -> Result<()> {
    if record.nlink >= LINKS_MAX {
        return Err(Error::Posix(libc::EMLINK));
    }
    record.nlink += 1;
    Ok(())
}

pub(crate) fn touch(dir: &mut InodeRecord, now: Timestamp) {
    dir.mtime = now;
    dir.ctime = now;
}
