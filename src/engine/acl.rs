//! POSIX access control lists (acl(5); IEEE 1003.1e draft 17), stored as extended attributes in the kernel's form. The
//! kernel checks permissions by them (FUSE_POSIX_ACL); kept here is what makes them agree with the mode: an ACL that is
//! set changes the mode, a mode that is set changes the ACL, and a directory's default ACL is inherited.

use super::batch::Batch;
use super::core::Access;
use super::error::{Error, Result};
use super::format::dirent::Xattr;
use super::format::rowkey::Table;
use super::staged::Staged;
use super::table::{Search, Spot};
use super::types::{FileKind, Ino, NewNode};

/// The attribute of an inode's access ACL.
pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
/// The attribute of a directory's default ACL.
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

/// POSIX_ACL_XATTR_VERSION of linux/posix_acl_xattr.h; all its numbers are little-endian.
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
/// The permission bits of a mode that an ACL decides.
const RWX: u16 = 0o777;
/// What an entry without an id has in its place (ACL_UNDEFINED_ID).
const NO_ID: u32 = u32::MAX;

/// What an entry speaks of, by the kernel's numbers: entries are stored in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    Owner = 0x01,
    User = 0x02,
    OwningGroup = 0x04,
    Group = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

impl Tag {
    fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            0x01 => Self::Owner,
            0x02 => Self::User,
            0x04 => Self::OwningGroup,
            0x08 => Self::Group,
            0x10 => Self::Mask,
            0x20 => Self::Other,
            _ => return None,
        })
    }

    fn names_an_id(self) -> bool {
        matches!(self, Self::User | Self::Group)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    /// rwx, as in one digit of a mode.
    perm: u16,
    id: u32,
}

/// A valid ACL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acl(Vec<Entry>);

impl Acl {
    /// Reads the kernel's form. `None` for a list of no entries, which stands for no ACL.
    ///
    /// # Errors
    /// EOPNOTSUPP for another version, EINVAL for what is no valid ACL.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let (version, rest) = bytes
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(Error::Posix(libc::EINVAL))?;
        if u32::from_le_bytes(*version) != VERSION {
            return Err(Error::Posix(libc::EOPNOTSUPP));
        }
        let (entries, []) = rest.as_chunks::<ENTRY_BYTES>() else {
            return Err(Error::Posix(libc::EINVAL));
        };
        let entries: Option<Vec<_>> = entries.iter().map(Entry::decode).collect();
        let acl = Self(entries.ok_or(Error::Posix(libc::EINVAL))?);
        match acl.0.is_empty() {
            true => Ok(None),
            false if acl.is_valid() => Ok(Some(acl)),
            false => Err(Error::Posix(libc::EINVAL)),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let entries = self.0.iter().flat_map(|entry| entry.encode());
        VERSION.to_le_bytes().into_iter().chain(entries).collect()
    }

    /// In order, each of the three that every file has once, and a mask if an id is named (acl(5), valid ACLs).
    fn is_valid(&self) -> bool {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let is_named = self.0.iter().any(|entry| entry.tag.names_an_id());
        self.0.is_sorted_by_key(|entry| entry.tag)
            && [Tag::Owner, Tag::OwningGroup, Tag::Other]
                .into_iter()
                .all(|tag| count(tag) == 1)
            && count(Tag::Mask) <= 1
            && (!is_named || count(Tag::Mask) == 1)
    }

    /// Whether a mode says all of it.
    fn is_minimal(&self) -> bool {
        self.0
            .iter()
            .all(|entry| matches!(entry.tag, Tag::Owner | Tag::OwningGroup | Tag::Other))
    }

    /// Each entry that a digit of the mode stands for, with how far left that digit is: the mask, where there is one, is
    /// the group's.
    fn mode_entries(&mut self) -> impl Iterator<Item = (u32, &mut Entry)> {
        let has_mask = self.0.iter().any(|entry| entry.tag == Tag::Mask);
        self.0.iter_mut().filter_map(move |entry| match entry.tag {
            Tag::Owner => Some((6, entry)),
            Tag::Mask => Some((3, entry)),
            Tag::OwningGroup if !has_mask => Some((3, entry)),
            Tag::Other => Some((0, entry)),
            _ => None,
        })
    }

    /// The mode with its nine permission bits as this ACL has them.
    fn applied_to(&self, perm: u16) -> u16 {
        let bits = self
            .clone()
            .mode_entries()
            .fold(0, |bits, (shift, entry)| bits | entry.perm << shift);
        perm & !RWX | bits
    }

    /// chmod(2): the entries that the mode stands for become it.
    fn set_mode(&mut self, perm: u16) {
        for (shift, entry) in self.mode_entries() {
            entry.perm = perm >> shift & 0o7;
        }
    }

    /// As the access ACL of a new inode that asked for `perm`: neither grants what the other does not.
    fn inherited(mut self, perm: u16) -> (Self, u16) {
        for (shift, entry) in self.mode_entries() {
            entry.perm &= perm >> shift & 0o7;
        }
        let perm = self.applied_to(perm);
        (self, perm)
    }
}

impl Entry {
    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Option<Self> {
        let [t0, t1, p0, p1, id @ ..] = *bytes;
        let tag = Tag::from_number(u16::from_le_bytes([t0, t1]))?;
        let perm = u16::from_le_bytes([p0, p1]);
        let id = if tag.names_an_id() {
            u32::from_le_bytes(id)
        } else {
            NO_ID
        };
        (perm <= 0o7).then_some(Self { tag, perm, id })
    }

    fn encode(self) -> [u8; ENTRY_BYTES] {
        let ([t0, t1], [p0, p1]) = ((self.tag as u16).to_le_bytes(), self.perm.to_le_bytes());
        let [i0, i1, i2, i3] = self.id.to_le_bytes();
        [t0, t1, p0, p1, i0, i1, i2, i3]
    }
}

/// What a new inode inherits.
pub(crate) struct Inherited {
    pub(crate) perm: u16,
    /// Attributes to be written with it.
    pub(crate) xattrs: Vec<Xattr>,
}

impl Access<'_> {
    /// The ACL stored under `name` for an inode whose lock is held.
    fn stored_acl(&self, staged: &Staged<'_>, ino: Ino, name: &[u8]) -> Result<Option<(Spot, Acl)>> {
        if staged.state(ino)?.record.xattrs == 0 {
            return Ok(None);
        }
        let Search::Found(place, xattr) = self.search::<Xattr>(Table::Xattrs, ino, name)? else {
            return Ok(None);
        };
        let acl = Acl::decode(&xattr.value).map_err(|_| Error::corrupt_inode(ino))?;
        Ok(acl.map(|acl| (place, acl)))
    }

    /// What an inode made in a locked directory begins with: the default ACL's, or else what the umask leaves.
    pub(crate) fn inherit(&self, staged: &Staged<'_>, dir: Ino, node: &NewNode) -> Result<Inherited> {
        let mut inherited = Inherited {
            perm: node.perm,
            xattrs: Vec::new(),
        };
        if node.kind == FileKind::Symlink {
            return Ok(inherited);
        }
        let Some((_, default)) = self.stored_acl(staged, dir, DEFAULT)? else {
            inherited.perm &= !(node.umask & RWX);
            return Ok(inherited);
        };
        let mut add = |name: &[u8], acl: &Acl| {
            inherited.xattrs.push(Xattr {
                name: name.to_vec(),
                value: acl.encode(),
            });
        };
        if node.kind == FileKind::Directory {
            add(DEFAULT, &default);
        }
        let (access, perm) = default.inherited(node.perm);
        if !access.is_minimal() {
            add(ACCESS, &access);
        }
        inherited.perm = perm;
        Ok(inherited)
    }

    /// Makes the access ACL of a locked inode, if it has one, say what the mode will.
    pub(crate) fn follow_mode(
        &self,
        batch: &mut Batch,
        staged: &Staged<'_>,
        ino: Ino,
        perm: u16,
    ) -> Result<()> {
        let Some((place, mut acl)) = self.stored_acl(staged, ino, ACCESS)? else {
            return Ok(());
        };
        acl.set_mode(perm);
        let xattr = Xattr {
            name: ACCESS.to_vec(),
            value: acl.encode(),
        };
        self.put_entry(batch, Table::Xattrs, ino, place, xattr)
    }
}

/// What setting an ACL comes to.
pub(crate) struct AclChange {
    /// The mode from then on.
    pub(crate) perm: u16,
    /// Whether the mode does not say it all; if it does, the attribute goes.
    pub(crate) is_stored: bool,
}

pub(crate) fn is_acl(name: &[u8]) -> bool {
    name == ACCESS || name == DEFAULT
}

/// Checks an ACL that is to be set on an inode of `kind` and mode `perm`.
///
/// # Errors
/// EINVAL, EOPNOTSUPP for a symlink, EACCES for a default ACL of what is no directory.
pub(crate) fn change(name: &[u8], value: &[u8], kind: FileKind, perm: u16) -> Result<AclChange> {
    if kind == FileKind::Symlink {
        return Err(Error::Posix(libc::EOPNOTSUPP));
    }
    let acl = Acl::decode(value)?;
    if name == DEFAULT {
        if acl.is_some() && kind != FileKind::Directory {
            return Err(Error::Posix(libc::EACCES));
        }
        let is_stored = acl.is_some();
        return Ok(AclChange { perm, is_stored });
    }
    Ok(AclChange {
        perm: acl.as_ref().map_or(perm, |acl| acl.applied_to(perm)),
        is_stored: acl.is_some_and(|acl| !acl.is_minimal()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(Tag, u16, u32)]) -> Acl {
        let entry = |&(tag, perm, id)| Entry { tag, perm, id };
        Acl(entries.iter().map(entry).collect())
    }

    fn full() -> Acl {
        acl(&[
            (Tag::Owner, 7, NO_ID),
            (Tag::User, 6, 1000),
            (Tag::OwningGroup, 5, NO_ID),
            (Tag::Group, 4, 2000),
            (Tag::Mask, 6, NO_ID),
            (Tag::Other, 1, NO_ID),
        ])
    }

    #[test]
    fn the_kernels_bytes_are_read_and_written() {
        let bytes = [
            &[2, 0, 0, 0][..],
            &[0x01, 0, 7, 0, 0xff, 0xff, 0xff, 0xff],
            &[0x02, 0, 6, 0, 0xe8, 0x03, 0, 0],
            &[0x04, 0, 5, 0, 0xff, 0xff, 0xff, 0xff],
            &[0x08, 0, 4, 0, 0xd0, 0x07, 0, 0],
            &[0x10, 0, 6, 0, 0xff, 0xff, 0xff, 0xff],
            &[0x20, 0, 1, 0, 0xff, 0xff, 0xff, 0xff],
        ]
        .concat();
        assert_eq!(Acl::decode(&bytes), Ok(Some(full())));
        assert_eq!(full().encode(), bytes);
        assert_eq!(Acl::decode(&[2, 0, 0, 0]), Ok(None));
    }

    #[test]
    fn what_is_no_valid_acl_is_refused() {
        let refused = |entries: &[(Tag, u16, u32)]| {
            Acl::decode(&acl(entries).encode()) == Err(Error::Posix(libc::EINVAL))
        };
        let (owner, group, other) = (
            (Tag::Owner, 7, NO_ID),
            (Tag::OwningGroup, 5, NO_ID),
            (Tag::Other, 1, NO_ID),
        );
        assert!(!refused(&[owner, group, other]));
        assert!(refused(&[owner, other, group]), "out of order");
        assert!(refused(&[owner, group]), "others are missing");
        assert!(refused(&[owner, owner, group, other]), "two owners");
        assert!(
            refused(&[owner, (Tag::User, 7, 1), group, other]),
            "a name, no mask"
        );
        assert!(
            refused(&[(Tag::Owner, 8, NO_ID), group, other]),
            "no such permission"
        );
        assert!(
            refused(&[owner, group, (Tag::Mask, 1, NO_ID), (Tag::Mask, 1, NO_ID), other]),
            "two masks"
        );
        assert_eq!(Acl::decode(&[1, 0, 0, 0]), Err(Error::Posix(libc::EOPNOTSUPP)));
        assert_eq!(Acl::decode(&[2, 0, 0]), Err(Error::Posix(libc::EINVAL)));
        assert_eq!(Acl::decode(&[2, 0, 0, 0, 1]), Err(Error::Posix(libc::EINVAL)));
        assert_eq!(
            Acl::decode(&[2, 0, 0, 0, 3, 0, 7, 0, 0, 0, 0, 0]),
            Err(Error::Posix(libc::EINVAL))
        );
    }

    #[test]
    fn the_mask_is_the_groups_digit_of_the_mode() {
        assert_eq!(full().applied_to(0o4000), 0o4761);
        let mut changed = full();
        changed.set_mode(0o640);
        let perms: Vec<_> = changed.0.iter().map(|entry| entry.perm).collect();
        assert_eq!(perms, [6, 6, 5, 4, 4, 0]);
    }

    #[test]
    fn a_new_inode_is_granted_what_both_the_default_and_its_maker_grant() {
        let (access, perm) = full().inherited(0o2644);
        assert_eq!(perm, 0o2640);
        let perms: Vec<_> = access.0.iter().map(|entry| entry.perm).collect();
        assert_eq!(perms, [6, 6, 5, 4, 4, 0]);
    }
}
