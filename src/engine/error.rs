//! The engine's one error type, and the one place where it becomes an errno.

use super::types::Ino;

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A plain POSIX refusal (ENOENT, EEXIST, ENOTEMPTY, ...), by its errno.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Posix(i32),
    /// The CMK is disabled or pending deletion; reversible.
    #[error("the key is disabled or pending deletion")]
    KeyRevoked,
    /// The CMK or its material is destroyed.
    #[error("the key is destroyed")]
    KeyErased,
    /// The KMS refuses this caller.
    #[error("the KMS refuses this caller the key")]
    KeyDenied,
    /// The KMS has not been reached for longer than its lease allows.
    #[error("the KMS is unreachable")]
    KeyUnavailable,
    /// What storage holds is not what was written: flipped, swapped, replayed or cut.
    #[error("{what} fails authentication")]
    Corrupt {
        /// The object, by kind and number: never a name or plaintext.
        what: String,
    },
    /// Storage refused a read or write.
    #[error("storage: {message}")]
    Storage {
        /// The errno it maps to: EIO or ENOSPC.
        errno: i32,
        /// What failed.
        message: String,
    },
    /// An earlier failed sync lost data of this inode or volume; no later sync may claim success.
    #[error("an earlier sync failed; data may be lost")]
    Poisoned,
}

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The errno a program sees.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Posix(errno) | Self::Storage { errno, .. } => *errno,
            Self::KeyRevoked => libc::EKEYREVOKED,
            Self::KeyErased => libc::ENOKEY,
            Self::KeyDenied => libc::EKEYREJECTED,
            Self::KeyUnavailable => libc::EKEYEXPIRED,
            Self::Corrupt { .. } => libc::EBADMSG,
            Self::Poisoned => libc::EIO,
        }
    }

    /// Whether an operator should hear of it: corruption and storage failures, not plain refusals.
    #[must_use]
    pub fn is_alarm(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::Storage { .. } | Self::Poisoned)
    }

    /// Whether it is the key that is lacking.
    pub(crate) fn is_of_key(&self) -> bool {
        matches!(
            self,
            Self::KeyRevoked | Self::KeyErased | Self::KeyDenied | Self::KeyUnavailable
        )
    }

    /// Whether the host had no room.
    pub(crate) fn is_no_room(&self) -> bool {
        matches!(self.errno(), libc::ENOSPC | libc::EDQUOT)
    }

    pub(crate) fn corrupt_inode(ino: Ino) -> Self {
        Self::Corrupt {
            what: format!("inode {}", ino.0),
        }
    }

    pub(crate) fn io(what: &str, error: &std::io::Error) -> Self {
        let errno = match error.raw_os_error() {
            Some(errno @ (libc::ENOSPC | libc::EDQUOT)) => errno,
            _ => libc::EIO,
        };
        Self::Storage {
            errno,
            message: format!("{what}: {error}"),
        }
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::io("system call", &std::io::Error::from(errno))
    }
}
