//! The seal file: how far the log is known to have reached, and the KMS to have come. RocksDB, after a crash, ends its log
//! at the first damaged record; the seal file tells a log that was cut by the crash from one that was damaged after it was
//! synced.

use super::commit::Seq;
use super::error::{Error, Result};
use super::format::root::SealRecord;
use super::keys::DomainKeys;
use super::keyservice::{Anchor, Position};
use super::slots::sync_dir;
use super::sync::{Mutex, rank};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

pub(crate) const NAME: &str = "seal";
pub(crate) const NEW_NAME: &str = "seal.new";
/// Longest seal file that is read.
const LENGTH_MAX: u64 = 4096;

/// Writes the seal file if the log has reached further than it says, or the KMS took something away since, or there is an `anchor`
/// to be told; `sealed` remembers what it says.
pub(crate) fn advance(
    dir: &Path,
    keys: &DomainKeys,
    durable: Seq,
    kms: Position,
    anchor: Option<Anchor>,
    sealed: &Mutex<SealRecord, rank::SealFile>,
) -> Result<()> {
    let mut sealed = sealed.lock();
    let next = SealRecord {
        durable_seq: durable.0.max(sealed.durable_seq),
        kms: Some(kms),
        anchors: sealed.anchors.proposing(anchor),
    };
    let restrictive = |kms: Position| (kms.epoch, kms.state_seq);
    if next.durable_seq > sealed.durable_seq
        || next.kms.map(restrictive) != sealed.kms.map(restrictive)
        || next.anchors != sealed.anchors
    {
        write(dir, keys, next)?;
        *sealed = next;
    }
    Ok(())
}

pub(crate) fn write(dir: &Path, keys: &DomainKeys, record: SealRecord) -> Result<()> {
    let sealed = keys.seal_file(&record.encode())?;
    let new = dir.join(NEW_NAME);
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(&sealed)?;
        file.sync_all()
    });
    written
        .and_then(|()| std::fs::rename(&new, dir.join(NAME)))
        .map_err(|error| Error::io("write the seal file", &error))?;
    sync_dir(dir)
}

/// What the seal file says.
pub(crate) fn read(dir: &Path, keys: &DomainKeys) -> Result<SealRecord> {
    let damaged = || Error::Corrupt {
        what: "the seal file".to_owned(),
    };
    let mut sealed = Vec::new();
    File::open(dir.join(NAME))
        .and_then(|file| file.take(LENGTH_MAX).read_to_end(&mut sealed))
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => damaged(),
            _ => Error::io("read the seal file", &error),
        })?;
    let plain = keys.open_seal_file(&sealed).ok_or_else(damaged)?;
    SealRecord::decode(&plain).map_err(|_| damaged())
}
