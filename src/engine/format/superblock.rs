//! The superblock: the one file of a volume with clear bytes in it. Its fixed part is bound into the wrap of the
//! volume key (the KMS authenticates its hash), so no byte of it can be changed without the mount failing.

use super::codec::{Malformed, Reader, Writer};
use sha2::{Digest, Sha256};

pub(crate) const MAGIC: [u8; 8] = *b"cmkfsvol";
/// A format version that this build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// Without roots.
    One = 1,
    /// With the sum of each inode's rows in its record, and of a domain's records in its root record.
    Two = 2,
}

impl Version {
    /// What new volumes are made of.
    pub(crate) const LATEST: Self = Self::Two;

    fn from_u32(number: u32) -> Result<Self, SuperblockError> {
        match number {
            0 => Err(SuperblockError::Malformed),
            1 => Ok(Self::One),
            2 => Ok(Self::Two),
            other => Err(SuperblockError::Future(other)),
        }
    }

    /// Whether rows are summed up.
    pub(crate) fn has_roots(self) -> bool {
        self >= Self::Two
    }
}
/// Longest superblock that is read.
pub(crate) const LENGTH_MAX: u64 = 16 << 10;

/// What names a volume and opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    version: Version,
    volume: [u8; 16],
    cmk_arn: String,
    wrapped_vk: Vec<u8>,
}

/// Why bytes are no superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SuperblockError {
    NotAVolume,
    Future(u32),
    Malformed,
}

impl From<Malformed> for SuperblockError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl Superblock {
    pub(crate) fn new(volume: [u8; 16], cmk_arn: &str, wrapped_vk: Vec<u8>) -> Self {
        Self {
            version: Version::LATEST,
            volume,
            cmk_arn: cmk_arn.to_owned(),
            wrapped_vk,
        }
    }

    /// The volume's UUID.
    #[must_use]
    pub fn volume(&self) -> [u8; 16] {
        self.volume
    }

    /// The ARN of the CMK that wraps its keys.
    #[must_use]
    pub fn cmk_arn(&self) -> &str {
        &self.cmk_arn
    }

    /// The format version.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version as u32
    }

    pub(crate) fn format(&self) -> Version {
        self.version
    }

    pub(crate) fn wrapped_vk(&self) -> &[u8] {
        &self.wrapped_vk
    }

    fn fixed_part(&self) -> Writer {
        let mut out = Writer::with_capacity(256);
        out.bytes(&MAGIC)
            .u32(self.version as u32)
            .bytes(&self.volume)
            .field(self.cmk_arn.as_bytes());
        out
    }

    /// SHA-256 of everything before the wrapped volume key.
    pub(crate) fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.fixed_part().finish()).into()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = self.fixed_part();
        out.field(&self.wrapped_vk);
        out.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let mut input = Reader::new(bytes);
        if input.array().ok() != Some(MAGIC) {
            return Err(SuperblockError::NotAVolume);
        }
        let version = Version::from_u32(input.u32()?)?;
        let volume = input.array()?;
        let cmk_arn = String::from_utf8(input.field()?.to_vec()).map_err(|_| Malformed)?;
        let wrapped_vk = input.field()?.to_vec();
        input.end()?;
        Ok(Self {
            version,
            volume,
            cmk_arn,
            wrapped_vk,
        })
    }
}
