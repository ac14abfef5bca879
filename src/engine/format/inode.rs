//! The inode record: every attribute, the wrapped DEK, and a symlink's target, sealed together, so that none of
//! them can be changed or moved to another inode.

use super::codec::{Malformed, Reader, Writer};
use super::rowsum::RowSum;
use crate::engine::types::{Attr, FileKind, Ino, Timestamp};
use std::sync::Arc;

const VERSION: u8 = 1;
/// Of a record that says what the other rows of the inode add up to.
const VERSION_WITH_ROWS: u8 = 2;

/// What is stored of an inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InodeRecord {
    pub(crate) kind: FileKind,
    pub(crate) perm: u16,
    pub(crate) nlink: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) rdev: u32,
    pub(crate) content: ContentState,
    pub(crate) atime: Timestamp,
    pub(crate) mtime: Timestamp,
    pub(crate) ctime: Timestamp,
    pub(crate) crtime: Timestamp,
    /// The parent of a directory; 0 for every other kind, which may have several.
    pub(crate) parent: Ino,
    /// Entries of a directory, without `.` and `..`: rmdir scans nothing.
    pub(crate) children: u64,
    /// Extended attributes: with 0, none is looked for.
    pub(crate) xattrs: u32,
    /// The DEK as the KMS wrapped it; empty for all but regular files.
    pub(crate) wrapped_dek: Arc<[u8]>,
    /// A symlink's target; empty for every other kind.
    pub(crate) target: Arc<[u8]>,
}

/// The part of an inode record that only a publish may change (rule R2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ContentState {
    /// Size in bytes.
    pub(crate) size: u64,
    /// Blocks of 4 KiB that are not holes.
    pub(crate) blocks: u64,
    /// Runs of 128 KiB that the file holds in its slot file.
    pub(crate) runs: u64,
}

impl InodeRecord {
    /// The record, with the sum of the inode's other rows, which formats before the second have not.
    pub(crate) fn encode(&self, rows: Option<&RowSum>) -> Vec<u8> {
        let mut out = Writer::with_capacity(200 + self.wrapped_dek.len() + self.target.len());
        let version = rows.map_or(VERSION, |_| VERSION_WITH_ROWS);
        out.u8(version).u8(self.kind as u8).u16(self.perm).u32(self.nlink);
        out.u32(self.uid).u32(self.gid).u32(self.rdev);
        out.u64(self.content.size)
            .u64(self.content.blocks)
            .u64(self.content.runs);
        for time in [self.atime, self.mtime, self.ctime, self.crtime] {
            out.i64(time.secs).u32(time.nanos);
        }
        out.u64(self.parent.0).u64(self.children).u32(self.xattrs);
        out.field(&self.wrapped_dek).field(&self.target);
        if let Some(rows) = rows {
            rows.write(&mut out);
        }
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, Option<RowSum>), Malformed> {
        let mut input = Reader::new(bytes);
        let version = input.u8()?;
        if version != VERSION && version != VERSION_WITH_ROWS {
            return Err(Malformed);
        }
        let record = Self {
            kind: FileKind::from_u8(input.u8()?).ok_or(Malformed)?,
            perm: input.u16()?,
            nlink: input.u32()?,
            uid: input.u32()?,
            gid: input.u32()?,
            rdev: input.u32()?,
            content: ContentState {
                size: input.u64()?,
                blocks: input.u64()?,
                runs: input.u64()?,
            },
            atime: timestamp(&mut input)?,
            mtime: timestamp(&mut input)?,
            ctime: timestamp(&mut input)?,
            crtime: timestamp(&mut input)?,
            parent: Ino(input.u64()?),
            children: input.u64()?,
            xattrs: input.u32()?,
            wrapped_dek: input.field()?.into(),
            target: input.field()?.into(),
        };
        let rows = match version {
            VERSION_WITH_ROWS => Some(RowSum::read(&mut input)?),
            _ => None,
        };
        input.end()?;
        Ok((record, rows))
    }

    pub(crate) fn attr(&self, ino: Ino) -> Attr {
        let size = match self.kind {
            FileKind::Symlink => self.target.len() as u64,
            FileKind::Directory => 4096,
            _ => self.content.size,
        };
        Attr {
            ino,
            kind: self.kind,
            perm: self.perm,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            size,
            blocks: self.content.blocks.saturating_mul(8),
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            crtime: self.crtime,
        }
    }
}

fn timestamp(input: &mut Reader<'_>) -> Result<Timestamp, Malformed> {
    Ok(Timestamp {
        secs: input.i64()?,
        nanos: input.u32()?,
    })
}
