//! The offline check of a whole log. It needs no key and no daemon.

use crate::frame::{self, Digest, Frame, HEADER_LEN, Problem};
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;
use uuid::Uuid;

/// Why a log is not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// It could not be read.
    #[error("cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// Its header is none.
    #[error("is not an audit log")]
    NotALog,
    /// A record is bad; those before it are good.
    #[error("record {record} at offset {offset}: {problem}")]
    Bad {
        /// The first bad record, from 1.
        record: u64,
        /// Where it begins.
        offset: u64,
        /// What is wrong with it.
        problem: Problem,
    },
    /// The head that somebody saw is no head of this log.
    #[error("no record has the head {0}: the log was cut before it, or rewritten")]
    HeadMissing(String),
}

/// What a good log holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The keystore that it belongs to.
    pub keystore_id: Uuid,
    /// How many records.
    pub records: u64,
    /// The digest of the last one.
    pub head: Digest,
    /// Time of the first record, in milliseconds since the Unix epoch.
    pub first_ms: Option<i64>,
    /// Time of the last record.
    pub last_ms: Option<i64>,
    /// The record that the expected head belongs to. A cut tail could reach back to it, and no further; without one, a
    /// cut tail could reach back to the beginning.
    pub witnessed: u64,
}

/// Checks every record of the log at `path`, and that `expected`, a head that somebody kept, is among its heads.
///
/// # Errors
/// [`VerifyError`], which names the first bad record.
pub fn verify(path: &Path, expected: Option<Digest>) -> Result<Report, VerifyError> {
    let mut witnessed = None;
    let mut report = walk(path, |number, frame| {
        if expected == Some(frame.digest) {
            witnessed = Some(number);
        }
        ControlFlow::Continue(())
    })?;
    if expected == Some(frame::genesis(&frame::header(report.keystore_id))) {
        witnessed = witnessed.or(Some(0));
    }
    match expected {
        Some(expected) if witnessed.is_none() => Err(VerifyError::HeadMissing(hex::encode(expected))),
        _ => {
            report.witnessed = witnessed.unwrap_or(0);
            Ok(report)
        }
    }
}

/// Checks the records of the log at `path` in order, and gives each to `visit` with its number, from 1, until that breaks off.
///
/// # Errors
/// [`VerifyError`], which names the first bad record.
pub fn walk(
    path: &Path,
    mut visit: impl FnMut(u64, &Frame) -> ControlFlow<()>,
) -> Result<Report, VerifyError> {
    let mut file = BufReader::new(File::open(path)?);
    let mut header = [0; HEADER_LEN];
    file.read_exact(&mut header).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => VerifyError::NotALog,
        _ => VerifyError::Io(error),
    })?;
    let mut report = Report {
        keystore_id: frame::keystore_of(&header).ok_or(VerifyError::NotALog)?,
        records: 0,
        head: frame::genesis(&header),
        first_ms: None,
        last_ms: None,
        witnessed: 0,
    };
    let mut offset = HEADER_LEN as u64;
    loop {
        let frame = frame::read(&mut file, &report.head)?.map_err(|problem| VerifyError::Bad {
            record: report.records + 1,
            offset,
            problem,
        })?;
        let Some(frame) = frame else { break };
        offset += frame.bytes.len() as u64;
        report.records += 1;
        report.head = frame.digest;
        report.first_ms = report.first_ms.or(Some(frame.record.time_ms));
        report.last_ms = Some(frame.record.time_ms);
        if visit(report.records, &frame).is_break() {
            break;
        }
    }
    Ok(report)
}
