//! What the engine needs of a KMS, as a trait: the adapter implements it over kmsd's session, tests in memory.

use super::types::{Domain, Ino};
use kms_crypto::SecretKey;
use std::sync::Arc;
use std::time::Duration;

/// What a wrapped key is bound to: the encryption context, part of the authenticated data of the wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyContext {
    /// The volume key of a domain.
    VolumeKey {
        /// Volume UUID.
        volume: [u8; 16],
        /// Key domain.
        domain: Domain,
        /// SHA-256 of the superblock's fixed part, so that no clear byte of it can be changed.
        superblock_hash: [u8; 32],
    },
    /// The DEK of a file.
    Dek {
        /// Volume UUID.
        volume: [u8; 16],
        /// The inode, whose high bits are the domain.
        ino: Ino,
    },
}

/// A fresh key with its wrapped form.
pub struct IssuedKey {
    /// The ciphertext blob, to be stored.
    pub wrapped: Vec<u8>,
    /// The key.
    pub key: SecretKey,
}

/// Why a KMS gave no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Disabled or pending deletion: reversible.
    #[error("the key is disabled or pending deletion")]
    Revoked,
    /// Unknown to the KMS, or its material deleted: it may come back.
    #[error("the key is destroyed, or unknown to the KMS")]
    Erased,
    /// Destroyed: the KMS has its record, and nothing brings it back.
    #[error("the key is destroyed")]
    Destroyed,
    /// Policy or identity refuses this caller.
    #[error("the KMS refuses this caller")]
    Denied,
    /// Not reached in time.
    #[error("the KMS cannot be reached: {0}")]
    Unreachable(String),
    /// It knows less than it once did: its keystore was put back as it once was.
    #[error("the KMS knows less than it once did: its keystore was put back as it once was")]
    RolledBack,
    /// The anchor that it has of the volume is another than the one that it is to be moved from.
    #[error("the KMS knows of another history of the volume")]
    AnchorConflict,
    /// The blob does not authenticate under that key and context.
    #[error("the wrapped key fails authentication")]
    BadBlob,
    /// Anything else the KMS said.
    #[error("the KMS refused: {0}")]
    Other(String),
}

/// A KMS as the engine sees it. Every call has a time limit of the implementation's.
pub trait KeyService: Send + Sync {
    /// Fresh keys under the volume's CMK, in the order of `contexts`.
    ///
    /// # Errors
    /// One error for the whole call.
    fn issue(&self, contexts: &[KeyContext]) -> Result<Vec<IssuedKey>, KeyError>;

    /// Unwraps keys, in the order of `items`.
    ///
    /// # Errors
    /// One error for the whole call, or one per item.
    fn open(&self, items: &[(KeyContext, Vec<u8>)]) -> Result<Vec<Result<SecretKey, KeyError>>, KeyError>;

    /// Renews the lease and asks for the state of the CMK, within `limit`.
    ///
    /// # Errors
    /// Why there is no answer; [`KeyError::Denied`] if this mount may not even ask.
    fn renew(&self, limit: Duration) -> Result<Renewal, KeyError>;

    /// Says that nothing is left here of what was revoked up to `epoch`, in the kernel's caches neither.
    ///
    /// # Errors
    /// Why it was not heard; it is said again.
    fn acknowledge(&self, epoch: u64) -> Result<(), KeyError>;

    /// How far the KMS had come when it answered last.
    fn position(&self) -> Position;

    /// Has the KMS refused from now on if it knows less than this.
    ///
    /// # Errors
    /// [`KeyError::RolledBack`] if it does already.
    fn expect(&self, seen: Position) -> Result<(), KeyError>;

    /// The service for another domain of the volume, under another CMK of the same KMS.
    ///
    /// # Errors
    /// If the KMS does not take it.
    fn for_domain(&self, domain: Domain, cmk_arn: &str) -> Result<Arc<dyn KeyService>, KeyError>;

    /// Tells the KMS what depends on the key.
    ///
    /// # Errors
    /// Why it was not heard; it is told again.
    fn report(&self, usage: Dependants) -> Result<(), KeyError>;

    /// How far the volume is known to have come; none if that was never told.
    ///
    /// # Errors
    /// [`KeyError::Denied`] unless the volume key was asked for before.
    fn anchor(&self) -> Result<Option<Anchor>, KeyError>;

    /// Tells how far it has come since it was `from`. Told again, it changes nothing.
    ///
    /// # Errors
    /// [`KeyError::AnchorConflict`] if the KMS knows another than `from`; those of [`Self::anchor`].
    fn advance_anchor(&self, from: Option<Anchor>, to: Anchor) -> Result<(), KeyError>;

    /// Has a volume taken in that was put back on purpose: it has come as far as `to`, whatever the KMS knew.
    ///
    /// # Errors
    /// Those of [`Self::anchor`].
    fn accept_restore(&self, to: Anchor) -> Result<(), KeyError>;

    /// Gives it up, with whatever it was given: nothing more is asked of it.
    fn end(&self);

    /// While `refusing`, every call fails at once, those that wait for an answer included: they may be held by operations
    /// that a revocation waits for.
    fn refuse(&self, refusing: bool);
}

/// How far a volume has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor {
    /// The number of a durable commit.
    pub commit_seq: u64,
    /// What the volume's root was then: a MAC that only the holder of its keys can make.
    pub mac: [u8; 32],
    /// Inode numbers below this were given out.
    pub ino_limit: u64,
}

impl Anchor {
    /// Whether both say the same of a volume.
    pub(crate) fn agrees(&self, other: &Self) -> bool {
        (self.commit_seq, self.mac) == (other.commit_seq, other.mac)
    }
}

/// What becomes noise with a CMK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dependants {
    /// Inodes.
    pub inodes: u64,
    /// Content, in bytes; holes count for nothing.
    pub bytes: u64,
    /// The domain was removed: nothing depends on the key any more.
    pub is_removed: bool,
}

impl Dependants {
    /// Of a domain that was removed.
    pub(crate) const NONE: Self = Self {
        inodes: 0,
        bytes: 0,
        is_removed: true,
    };
}

/// The answer to a renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    /// How long the keys may be used without another; counted from when it was asked for.
    pub lease: Duration,
    /// Moves with every revocation.
    pub epoch: u64,
    /// Whether the CMK may be used, at that epoch or later.
    pub state: Result<(), KeyError>,
}

/// How far a KMS has come. None of its numbers ever falls; one that answers less than it once did was put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Its keystore, a UUID.
    pub keystore: [u8; 16],
    /// Moves when keys are destroyed.
    pub epoch: u64,
    /// Moves with every restrictive change.
    pub state_seq: u64,
    /// Records in its audit log.
    pub audit_records: u64,
    /// SHA-256 of the last frame of it.
    pub audit_head: [u8; 32],
}

impl Position {
    /// Before anything was seen of any KMS.
    pub const NONE: Self = Self {
        keystore: [0; 16],
        epoch: 0,
        state_seq: 0,
        audit_records: 0,
        audit_head: [0; 32],
    };

    /// Whether a KMS that is here now can have been there before.
    #[must_use]
    pub fn follows(&self, seen: &Self) -> bool {
        *seen == Self::NONE
            || self.keystore == seen.keystore
                && self.epoch >= seen.epoch
                && self.state_seq >= seen.state_seq
                && self.audit_records >= seen.audit_records
                && (self.audit_records > seen.audit_records || self.audit_head == seen.audit_head)
    }
}

/// What the engine tells its front end when a domain goes dark: the kernel's caches must go, too.
pub trait CacheObserver: Send + Sync {
    /// Drop every page, attribute and name that the kernel caches of these inodes. Called from a thread that serves
    /// no request and holds no lock; WRITEs that it provokes are still accepted.
    fn purge(&self, inodes: &[Ino]);

    /// Have `name` in `parent` looked up again: it leads elsewhere. Called as [`Self::purge`] is.
    fn forget_name(&self, _parent: Ino, _name: &[u8]) {}

    /// Wipe what past requests of a domain that is dark left in memory; those of others may be under way. Called as
    /// [`Self::purge`] is.
    fn wipe(&self) {}
}

/// A list of the inodes of which the kernel may cache something, which the KMS can read when this process cannot be asked.
pub trait InodeLedger: Send + Sync {
    /// Adds an inode, before the kernel learns of it; the answer is for [`Self::remove`].
    fn add(&self, ino: Ino) -> u64;

    /// Takes an inode away that the kernel has forgotten.
    fn remove(&self, ino: Ino, place: u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_that_falls_short_in_anything_does_not_follow() {
        let seen = Position {
            keystore: [1; 16],
            epoch: 5,
            state_seq: 6,
            audit_records: 7,
            audit_head: [8; 32],
        };
        assert!(seen.follows(&seen));
        let further = Position {
            epoch: 6,
            state_seq: 9,
            audit_records: 8,
            audit_head: [9; 32],
            ..seen
        };
        assert!(further.follows(&seen) && !seen.follows(&further));
        for behind in [
            Position {
                keystore: [2; 16],
                ..further
            },
            Position { epoch: 4, ..further },
            Position {
                state_seq: 5,
                ..further
            },
            Position {
                audit_records: 6,
                ..further
            },
            // As many records, but not the same.
            Position {
                audit_head: [9; 32],
                ..seen
            },
        ] {
            assert!(!behind.follows(&seen), "{behind:?}");
        }
    }
}
