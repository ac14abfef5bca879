//! Reading a mount's ledger, which is not trusted: it may be of any size and change at any moment.

use kms_api::ledger::{MAGIC, OVERFLOW_OFFSET, PLACES_MAX, PLACES_OFFSET, USED_OFFSET};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The root, which the kernel knows without being told of it.
const ROOT_INODE: u64 = 1;
const PLACES_PER_READ: usize = 8192;

/// # Errors
/// In words: what it is not.
pub(super) fn check(ledger: &File) -> Result<(), String> {
    if word(ledger, 0)? == u64::from_ne_bytes(MAGIC) {
        Ok(())
    } else {
        Err("the second descriptor is no ledger of this version".to_owned())
    }
}

/// Tells `each` the root and every inode listed.
///
/// # Errors
/// Its first error; that the list is incomplete.
pub(super) fn read(ledger: &File, mut each: impl FnMut(u64) -> Result<(), String>) -> Result<(), String> {
    let used = usize::try_from(word(ledger, USED_OFFSET)?).unwrap_or(usize::MAX);
    if used > PLACES_MAX || word(ledger, OVERFLOW_OFFSET)? != 0 {
        return Err("the mount's ledger does not list every inode".to_owned());
    }
    each(ROOT_INODE)?;
    let mut buffer = vec![0; PLACES_PER_READ * 8];
    let mut place = 0;
    while place < used {
        let count = PLACES_PER_READ.min(used - place);
        let bytes = buffer.get_mut(..count * 8).unwrap_or_default();
        let offset = PLACES_OFFSET + place * 8;
        ledger
            .read_exact_at(bytes, offset as u64)
            .map_err(|error| format!("the mount's ledger cannot be read: {error}"))?;
        for inode in bytes.as_chunks().0.iter().copied().map(u64::from_ne_bytes) {
            if inode != 0 {
                each(inode)?;
            }
        }
        place += count;
    }
    Ok(())
}

fn word(ledger: &File, offset: usize) -> Result<u64, String> {
    let mut bytes = [0; 8];
    ledger
        .read_exact_at(&mut bytes, offset as u64)
        .map_err(|error| format!("the mount's ledger cannot be read: {error}"))?;
    Ok(u64::from_ne_bytes(bytes))
}
