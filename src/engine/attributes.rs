//! Attributes and extended attributes of an inode.

use super::acl;
use super::batch::Batch;
use super::core::Access;
use super::error::{Error, Result};
use super::format::dirent::Xattr;
use super::format::inode::InodeRecord;
use super::format::rowkey::Table;
use super::layout::check_size;
use super::node::Node;
use super::staged::Staged;
use super::table::{NAME_BYTES_MAX, Search};
use super::types::{Attr, Ino, Kill, SGID, SUID, SetAttr, SetXattr, Timestamp};
use std::sync::Arc;

/// Longest value of an extended attribute, in bytes: XATTR_SIZE_MAX of xattr(7).
const VALUE_BYTES_MAX: usize = 65_536;
/// File capabilities, dropped whenever content or owner changes.
const CAPABILITY: &[u8] = b"security.capability";
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

impl Access<'_> {
    pub(crate) fn setattr(&self, ino: Ino, set: &SetAttr) -> Result<Attr> {
        let node = self.node(ino)?;
        let now = self.now();
        if set.kill != Kill::Nothing {
            self.drop_capabilities(&node)?;
        }
        if let Some(size) = set.size {
            self.regular(ino)?;
            check_size(size)?;
        }
        if set.size.is_none() || set.perm.is_some() {
            let mut staged = Staged::lock(&[&node]);
            let mut batch = Batch::default();
            if let Some(perm) = set.perm {
                self.follow_mode(&mut batch, &staged, ino, perm)?;
            }
            apply(staged.record(ino)?, set, now);
            staged.commit(self, batch)?;
        }
        if let Some(size) = set.size {
            self.resize(&node, size, |record| apply(record, set, now))?;
        }
        self.attr(ino)
    }

    /// Clears what must not survive a write by someone else: suid, sgid and capabilities. True if the mode changed.
    pub(crate) fn drop_privileges(&self, node: &Arc<Node>, kill: Kill) -> Result<bool> {
        if kill == Kill::Nothing {
            return Ok(false);
        }
        self.drop_capabilities(node)?;
        if node.state.read().record.perm & (SUID | SGID) == 0 {
            return Ok(false);
        }
        let mut staged = Staged::lock(&[node]);
        let now = self.now();
        let record = staged.record(node.ino)?;
        let before = record.perm;
        record.perm = kill.applied_to(record.kind, before);
        if record.perm == before {
            return Ok(false);
        }
        record.ctime = now;
        staged.commit(self, Batch::default())?;
        Ok(true)
    }

    fn drop_capabilities(&self, node: &Arc<Node>) -> Result<()> {
        match self.removexattr(node.ino, CAPABILITY) {
            Err(Error::Posix(libc::ENODATA)) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        check_namespace(name)?;
        let node = self.node(ino)?;
        let state = node.state.read();
        if state.record.xattrs == 0 || name.len() > NAME_BYTES_MAX {
            return Err(Error::Posix(libc::ENODATA));
        }
        let found = self.search::<Xattr>(Table::Xattrs, ino, name)?.found();
        found
            .map(|(_, xattr)| xattr.value)
            .ok_or(Error::Posix(libc::ENODATA))
    }

    /// `kill_sgid`: what is set is an access ACL, by someone who may not keep the sgid bit.
    pub(crate) fn setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: SetXattr,
        kill_sgid: bool,
    ) -> Result<()> {
        check_namespace(name)?;
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(Error::Posix(libc::ERANGE));
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(Error::Posix(libc::E2BIG));
        }
        let node = self.node(ino)?;
        let mut staged = Staged::lock(&[&node]);
        let now = self.now();
        let mut perm = staged.state(ino)?.record.perm;
        if acl::is_acl(name) {
            let change = acl::change(name, value, staged.state(ino)?.record.kind, perm)?;
            perm = change.perm & if kill_sgid { !SGID } else { u16::MAX };
            if !change.is_stored {
                return self.remove_xattr(staged, ino, name, perm, now);
            }
        }
        self.take_room_to_grow()?;
        let (place, is_new) = match (self.search::<Xattr>(Table::Xattrs, ino, name)?, how) {
            (Search::Found(..), SetXattr::Create) => return Err(Error::Posix(libc::EEXIST)),
            (Search::Absent(_), SetXattr::Replace) => return Err(Error::Posix(libc::ENODATA)),
            (Search::Found(place, _), _) => (place, false),
            (Search::Absent(place), _) => (place.ok_or(Error::Posix(libc::ENOSPC))?, true),
        };
        let mut batch = Batch::default();
        let xattr = Xattr {
            name: name.to_vec(),
            value: value.to_vec(),
        };
        self.put_entry(&mut batch, Table::Xattrs, ino, place, xattr)?;
        let record = staged.record(ino)?;
        record.xattrs = record.xattrs.saturating_add(u32::from(is_new));
        record.perm = perm;
        record.ctime = now;
        staged.commit(self, batch)
    }

    pub(crate) fn listxattr(&self, ino: Ino) -> Result<Vec<Vec<u8>>> {
        let node = self.node(ino)?;
        let state = node.state.read();
        let mut names = Vec::new();
        if state.record.xattrs > 0 {
            self.entries::<Xattr>(Table::Xattrs, ino, 0, |_, xattr| {
                names.push(xattr.name);
                Ok(true)
            })?;
        }
        Ok(names)
    }

    pub(crate) fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        check_namespace(name)?;
        let node = self.node(ino)?;
        // An ACL that is not there is what its removal leaves, as in the kernel's own filesystems.
        let absent = if acl::is_acl(name) {
            Ok(())
        } else {
            Err(Error::Posix(libc::ENODATA))
        };
        if node.state.read().record.xattrs == 0 || name.len() > NAME_BYTES_MAX {
            return absent;
        }
        let staged = Staged::lock(&[&node]);
        if self.search::<Xattr>(Table::Xattrs, ino, name)?.found().is_none() {
            return absent;
        }
        let (perm, now) = (staged.state(ino)?.record.perm, self.now());
        self.remove_xattr(staged, ino, name, perm, now)
    }

    /// Removes an attribute of a locked inode, if it has it, and sets the mode.
    fn remove_xattr(
        &self,
        mut staged: Staged<'_>,
        ino: Ino,
        name: &[u8],
        perm: u16,
        now: Timestamp,
    ) -> Result<()> {
        let mut batch = Batch::default();
        let found = match staged.state(ino)?.record.xattrs {
            0 => None,
            _ => self.search::<Xattr>(Table::Xattrs, ino, name)?.found(),
        };
        let record = staged.record(ino)?;
        if let Some((place, _)) = found {
            self.remove_entry::<Xattr>(&mut batch, Table::Xattrs, ino, place, false)?;
            record.xattrs = record.xattrs.saturating_sub(1);
        }
        record.perm = perm;
        record.ctime = now;
        staged.commit(self, batch)
    }
}

/// Refuses what is in no namespace of xattr(7), and of `system.` all but POSIX ACLs, which alone are kept: stored without
/// their meaning for the kernel the others would mislead.
fn check_namespace(name: &[u8]) -> Result<()> {
    let within = NAMESPACES
        .iter()
        .find_map(|namespace| name.strip_prefix(*namespace));
    match within {
        _ if acl::is_acl(name) => Ok(()),
        Some([]) => Err(Error::Posix(libc::EINVAL)),
        Some(_) => Ok(()),
        None => Err(Error::Posix(libc::EOPNOTSUPP)),
    }
}

fn apply(record: &mut InodeRecord, set: &SetAttr, now: Timestamp) {
    record.perm = set.kill.applied_to(record.kind, record.perm);
    record.perm = set.perm.map_or(record.perm, |perm| perm & 0o7777);
    record.uid = set.uid.unwrap_or(record.uid);
    record.gid = set.gid.unwrap_or(record.gid);
    record.atime = set.atime.unwrap_or(record.atime);
    record.mtime = set.mtime.or(set.size.map(|_| now)).unwrap_or(record.mtime);
    record.ctime = set.ctime.unwrap_or(now);
}
