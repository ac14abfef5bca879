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

const ROOT: u8 = b'R';
const INODE: u8 = b'I';
const DIRENT: u8 = b'D';
const XATTR: u8 = b'X';
const CHUNK: u8 = b'C';
const BITMAP: u8 = b'B';
const ORPHAN: u8 = b'O';

/// A chained table of one inode: its directory entries or its extended attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// Directory entries.
    Dirents = 0,
    /// Extended attributes.
    Xattrs = 1,
}

fn key(domain: Domain, kind: u8, numbers: &[u64]) -> Vec<u8> {
    let mut key = Vec::with_capacity(3 + 8 * numbers.len());
    key.extend_from_slice(&domain.0.to_be_bytes());
    key.push(kind);
    for number in numbers {
        key.extend_from_slice(&number.to_be_bytes());
    }
    key
}

pub(crate) fn root(domain: Domain) -> Vec<u8> {
    key(domain, ROOT, &[])
}

pub(crate) fn inode(ino: Ino) -> Vec<u8> {
    key(ino.domain(), INODE, &[ino.0])
}

pub(crate) fn entry(table: Table, ino: Ino, place: u64) -> Vec<u8> {
    let kind = match table {
        Table::Dirents => DIRENT,
        Table::Xattrs => XATTR,
    };
    key(ino.domain(), kind, &[ino.0, place])
}

pub(crate) fn chunk(ino: Ino, chunk: u64) -> Vec<u8> {
    key(ino.domain(), CHUNK, &[ino.0, chunk])
}

pub(crate) fn bitmap(ino: Ino, page: u64) -> Vec<u8> {
    key(ino.domain(), BITMAP, &[ino.0, page])
}

pub(crate) fn orphan(ino: Ino) -> Vec<u8> {
    key(ino.domain(), ORPHAN, &[ino.0])
}

pub(crate) fn orphans(domain: Domain) -> (Vec<u8>, Vec<u8>) {
    (key(domain, ORPHAN, &[]), key(domain, ORPHAN + 1, &[]))
}

/// Key of an inline block's row in the family `content`.
pub(crate) fn content(ino: Ino, block: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(18);
    key.extend_from_slice(&ino.domain().0.to_be_bytes());
    key.extend_from_slice(&ino.0.to_be_bytes());
    key.extend_from_slice(&block.to_be_bytes());
    key
}

/// The last number of a row key (place, chunk, inode), which is its last eight bytes.
pub(crate) fn last_number(key: &[u8]) -> Option<u64> {
    key.last_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
}
