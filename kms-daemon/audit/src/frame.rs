//! Frames and the chain between them. docs/kms-format.md gives the bytes.

use crate::record::Record;
use prost::Message;
use sha2::Sha256;
use std::io::{self, Read};
use uuid::Uuid;

/// SHA-256 of a frame.
pub type Digest = [u8; 32];

/// Bytes of a log's header.
pub const HEADER_LEN: usize = 8 + 1 + 16;
const MAGIC: &[u8; 8] = b"kmsdaudt";
const FORMAT: u8 = 1;
const LENGTH_LEN: usize = 4;
const DIGEST_LEN: usize = 32;
/// Bytes of one record, at most: twice what the largest message on the wire could make of it.
const RECORD_BYTES_MAX: usize = 8 << 20;

/// What is wrong with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The file ends inside it.
    #[error("incomplete: a crash tore it, or the file was cut")]
    Incomplete,
    /// Its length is none that was ever written.
    #[error("the length is impossible")]
    Length,
    /// It does not continue the frame before it.
    #[error("does not continue the record before it: records were changed, removed or inserted here")]
    Chain,
    /// Its bytes are not those that were written.
    #[error("was changed")]
    Changed,
    /// Its bytes are whole, and yet no record.
    #[error("is not a record")]
    NotARecord,
}

/// The header of a keystore's log.
#[must_use]
pub fn header(keystore_id: Uuid) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    let fields = [MAGIC.as_slice(), &[FORMAT], keystore_id.as_bytes()];
    for (out, byte) in header.iter_mut().zip(fields.into_iter().flatten()) {
        *out = *byte;
    }
    header
}

/// The keystore that a header names; `None` if it is no header.
#[must_use]
pub fn keystore_of(bytes: &[u8; HEADER_LEN]) -> Option<Uuid> {
    let id = Uuid::from_slice(bytes.get(9..)?).ok()?;
    (header(id) == *bytes).then_some(id)
}

/// What the first frame continues.
#[must_use]
pub fn genesis(header: &[u8; HEADER_LEN]) -> Digest {
    <Sha256 as sha2::Digest>::digest(header).into()
}

/// Appends to `out` the frame of `body` that continues `previous`, and gives its digest.
///
/// # Errors
/// [`Problem::Length`]
pub fn push(out: &mut Vec<u8>, previous: &Digest, body: &[u8]) -> Result<Digest, Problem> {
    let length = u32::try_from(body.len()).map_err(|_| Problem::Length)?;
    if body.len() > RECORD_BYTES_MAX {
        return Err(Problem::Length);
    }
    let digest = digest(length, previous, body);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(previous);
    out.extend_from_slice(body);
    out.extend_from_slice(&digest);
    Ok(digest)
}

/// A frame that was read and is what was written.
#[derive(Debug, Clone)]
pub struct Frame {
    /// What it says.
    pub record: Record,
    /// Of the frame before it.
    pub previous: Digest,
    /// Its own.
    pub digest: Digest,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// Reads the next frame, which must continue `previous`; `Ok(Ok(None))` at the end of the file.
///
/// # Errors
/// The file cannot be read; within, what is wrong with the frame.
pub fn read(from: &mut impl Read, previous: &Digest) -> io::Result<Result<Option<Frame>, Problem>> {
    Ok(read_any(from)?.and_then(|frame| match frame {
        Some(frame) if frame.previous != *previous => Err(Problem::Chain),
        frame => Ok(frame),
    }))
}

/// The frame that these bytes are, and nothing behind it; what it continues is for the caller to say.
///
/// # Errors
/// What is wrong with it.
pub fn parse(mut bytes: &[u8]) -> Result<Frame, Problem> {
    let frame = read_any(&mut bytes).map_err(|_| Problem::Incomplete)??;
    frame.filter(|_| bytes.is_empty()).ok_or(Problem::Length)
}

fn read_any(from: &mut impl Read) -> io::Result<Result<Option<Frame>, Problem>> {
    let mut length = [0; 4];
    match fill(from, &mut length)? {
        0 => return Ok(Ok(None)),
        4 => {}
        _ => return Ok(Err(Problem::Incomplete)),
    }
    let length = u32::from_be_bytes(length);
    let body_len = usize::try_from(length).unwrap_or(usize::MAX);
    if body_len > RECORD_BYTES_MAX {
        return Ok(Err(Problem::Length));
    }
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.resize(LENGTH_LEN + DIGEST_LEN + body_len + DIGEST_LEN, 0);
    let Some(rest) = bytes.get_mut(LENGTH_LEN..) else {
        return Ok(Err(Problem::Length));
    };
    if fill(from, rest)? < rest.len() {
        return Ok(Err(Problem::Incomplete));
    }
    Ok(check(length, bytes).map(Some))
}

fn check(length: u32, bytes: Vec<u8>) -> Result<Frame, Problem> {
    let rest = bytes.get(LENGTH_LEN..).ok_or(Problem::Length)?;
    let (previous, rest) = rest.split_first_chunk::<DIGEST_LEN>().ok_or(Problem::Length)?;
    let (body, written) = rest.split_last_chunk::<DIGEST_LEN>().ok_or(Problem::Length)?;
    if digest(length, previous, body) != *written {
        return Err(Problem::Changed);
    }
    Ok(Frame {
        record: Record::decode(body).map_err(|_| Problem::NotARecord)?,
        previous: *previous,
        digest: *written,
        bytes,
    })
}

fn digest(length: u32, previous: &Digest, body: &[u8]) -> Digest {
    use sha2::Digest as _;
    let mut hash = Sha256::new();
    hash.update(length.to_be_bytes());
    hash.update(previous);
    hash.update(body);
    hash.finalize().into()
}

/// Fills `buffer` as far as the file reaches.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
