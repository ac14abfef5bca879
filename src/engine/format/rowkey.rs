//! Row keys of the column families `meta` and `content`: big-endian, so that RocksDB's order is theirs.

use crate::engine::types::{Domain, Ino};

/// The column family a row lies in; its number is part of what authenticates the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Family {
    /// Sealed records.
    Meta = 1,
    /// Ciphertext of inline blocks, authenticated by their chunk record.
    Content = 2,
}

/// What a row of the family `meta` holds; its letter stands behind the domain in the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Root = b'R',
    Inode = b'I',
    Dirent = b'D',
    Xattr = b'X',
    Chunk = b'C',
    Bitmap = b'B',
    Orphan = b'O',
    /// Of domain 0, about another domain.
    Domain = b'K',
    /// Of domain 0, about another domain.
    Usage = b'U',
}

/// A chained table of one inode: its directory entries or its extended attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// Directory entries.
    Dirents = 0,
    /// Extended attributes.
    Xattrs = 1,
}

fn key(domain: Domain, kind: Kind, numbers: &[u64]) -> Vec<u8> {
    let mut key = Vec::with_capacity(3 + 8 * numbers.len());
    key.extend_from_slice(&domain.0.to_be_bytes());
    key.push(kind as u8);
    for number in numbers {
        key.extend_from_slice(&number.to_be_bytes());
    }
    key
}

pub(crate) fn root(domain: Domain) -> Vec<u8> {
    key(domain, Kind::Root, &[])
}

pub(crate) fn inode(ino: Ino) -> Vec<u8> {
    key(ino.domain(), Kind::Inode, &[ino.0])
}

pub(crate) fn entry(table: Table, ino: Ino, place: u64) -> Vec<u8> {
    let kind = match table {
        Table::Dirents => Kind::Dirent,
        Table::Xattrs => Kind::Xattr,
    };
    key(ino.domain(), kind, &[ino.0, place])
}

pub(crate) fn chunk(ino: Ino, chunk: u64) -> Vec<u8> {
    key(ino.domain(), Kind::Chunk, &[ino.0, chunk])
}

pub(crate) fn bitmap(ino: Ino, page: u64) -> Vec<u8> {
    key(ino.domain(), Kind::Bitmap, &[ino.0, page])
}

pub(crate) fn orphan(ino: Ino) -> Vec<u8> {
    key(ino.domain(), Kind::Orphan, &[ino.0])
}

/// What another domain is. The row belongs to domain 0, and the number is that of the domain it is about.
pub(crate) fn domain(about: Domain) -> Vec<u8> {
    key(Domain::FIRST, Kind::Domain, &[about.0.into()])
}

/// What another domain holds. As [`domain`].
pub(crate) fn usage(about: Domain) -> Vec<u8> {
    key(Domain::FIRST, Kind::Usage, &[about.0.into()])
}

/// What covers a row of the family `meta`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cover {
    /// The root of a domain.
    Domain(Domain),
    /// The record of an inode.
    Inode(Ino),
}

/// What covers a row: an inode's record what says more of that inode, a domain's root all else. `None` for what is no row, and
/// for root records.
pub(crate) fn cover(key: &[u8]) -> Option<Cover> {
    let (domain, kind) = (domain_of(key)?, *key.get(2)?);
    let is = |kinds: &[Kind]| kinds.iter().any(|known| *known as u8 == kind);
    if is(&[Kind::Inode, Kind::Orphan, Kind::Domain, Kind::Usage]) {
        Some(Cover::Domain(domain))
    } else if is(&[Kind::Dirent, Kind::Xattr, Kind::Chunk, Kind::Bitmap]) {
        Some(Cover::Inode(numbers(key).0))
    } else {
        None
    }
}

/// The domain that a row belongs to.
pub(crate) fn domain_of(key: &[u8]) -> Option<Domain> {
    key.first_chunk().map(|bytes| Domain(u16::from_be_bytes(*bytes)))
}

/// The range of every row of the family `meta` of a domain.
pub(crate) fn all_rows(domain: Domain) -> (Vec<u8>, Vec<u8>) {
    let from = domain.0.to_be_bytes().to_vec();
    (from.clone(), [from, vec![0xff; 18]].concat())
}

/// The range of every row of a kind.
pub(crate) fn all(domain: Domain, kind: Kind) -> (Vec<u8>, Vec<u8>) {
    let from = key(domain, kind, &[]);
    let mut to = from.clone();
    if let Some(last) = to.last_mut() {
        *last += 1;
    }
    (from, to)
}

/// Key of an inline block's row in the family `content`.
pub(crate) fn content(ino: Ino, block: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(18);
    key.extend_from_slice(&ino.domain().0.to_be_bytes());
    key.extend_from_slice(&ino.0.to_be_bytes());
    key.extend_from_slice(&block.to_be_bytes());
    key
}

/// The range of every row of the family `content`.
pub(crate) fn all_content(domain: Domain) -> (Vec<u8>, Vec<u8>) {
    let from = domain.0.to_be_bytes().to_vec();
    (from.clone(), [from, vec![0xff; 17]].concat())
}

/// The inode and the number behind it of a row key that has both.
pub(crate) fn numbers(key: &[u8]) -> (Ino, u64) {
    let (rest, last) = match key.split_last_chunk::<8>() {
        Some((rest, last)) => (rest, u64::from_be_bytes(*last)),
        None => (key, 0),
    };
    (Ino(last_number(rest).unwrap_or_default()), last)
}

/// The last number of a row key (place, chunk, inode), which is its last eight bytes.
pub(crate) fn last_number(key: &[u8]) -> Option<u64> {
    key.last_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
}
