//! Answers to the kernel, as far as several requests have them in common.

use super::convert::file_attr;
use crate::engine::Attr;
use fuser::{Errno, Generation, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyXattr};
use std::time::Duration;

/// How long the kernel may keep names and attributes: nobody else changes them, and a revocation takes them back.
pub(super) const TTL: Duration = Duration::from_secs(24 * 3600);
/// Inode numbers are never reused, so that one generation serves.
pub(super) const GENERATION: Generation = Generation(0);

pub(super) fn reply_entry(reply: ReplyEntry, made: Result<Attr, Errno>) {
    match made {
        Ok(attr) => reply.entry(&TTL, &file_attr(&attr), GENERATION),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_attr(reply: ReplyAttr, attr: Result<Attr, Errno>) {
    match attr {
        Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, done: Result<(), Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size as usize => reply.error(Errno::from_i32(libc::ERANGE)),
        Ok(value) => reply.data(&value),
        Err(errno) => reply.error(errno),
    }
}
