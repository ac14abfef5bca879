//! HKDF-SHA-256 (RFC 5869) with a closed registry of labels: one key never serves two purposes.

use crate::SecretKey;
use crate::arena::wipe_stack;
use hkdf::{Hkdf, InvalidLength};
use sha2::Sha256;

/// The extract salt of RFC 5869, section 2.2: public, and different for each volume, blob or keystore.
#[derive(Debug, Clone, Copy)]
pub struct KeySalt<'a>(pub &'a [u8]);

/// What a derived key is for. The registry is closed: a new purpose is a new variant and a line in docs/format.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Label {
    /// Seals the metadata records of one key domain of a volume; derived from the volume key.
    VolumeRecords {
        /// The key domain.
        domain: u16,
    },
    /// Keys the PRF of directory entry names of one key domain; derived from the volume key.
    VolumeNames {
        /// The key domain.
        domain: u16,
    },
    /// Keys the PRF that makes a number of each record for the roots of one key domain; derived from the volume key.
    VolumeRoots {
        /// The key domain.
        domain: u16,
    },
    /// Seals the content blocks of one file; derived from its data key (DEK), which itself encrypts nothing.
    FileContent {
        /// The key domain.
        domain: u16,
    },
    /// Seals one ciphertext blob of the KMS; derived from a CMK version with the blob's 128-bit random as salt.
    Blob,
    /// Seals the material rows of one keystore epoch; derived from the root key.
    KeystoreMaterial,
    /// Seals the metadata rows of the keystore; derived from the root key.
    KeystoreMetadata,
    /// Keys the PRF of alias names in row keys; derived from the root key.
    KeystoreNames,
    /// Keys the digest of the keystore's set of rows; derived from the root key.
    KeystoreRowSet,
    /// Seals the root key of one epoch; derived from the key that the root slot holds.
    KeystoreRoot,
    /// Seals the key of a passphrase slot; derived from what Argon2id makes of the passphrase.
    KeystorePassphrase,
    /// Seals the answers of one filesystem session; derived from its X25519 shared secret.
    Session,
}

impl Label {
    /// The `info` input of RFC 5869, section 2.3: ASCII, prefix-free because the domain has a fixed width.
    fn info(self) -> Vec<u8> {
        match self {
            Self::VolumeRecords { domain } => format!("cmkfs/1/records/{domain:04x}"),
            Self::VolumeNames { domain } => format!("cmkfs/1/names/{domain:04x}"),
            Self::VolumeRoots { domain } => format!("cmkfs/1/roots/{domain:04x}"),
            Self::FileContent { domain } => format!("cmkfs/1/content/{domain:04x}"),
            Self::Blob => "kmsd/1/blob".to_owned(),
            Self::KeystoreMaterial => "kmsd/1/material".to_owned(),
            Self::KeystoreMetadata => "kmsd/1/metadata".to_owned(),
            Self::KeystoreNames => "kmsd/1/alias-names".to_owned(),
            Self::KeystoreRowSet => "kmsd/1/row-set".to_owned(),
            Self::KeystoreRoot => "kmsd/1/root".to_owned(),
            Self::KeystorePassphrase => "kmsd/1/passphrase-slot".to_owned(),
            Self::Session => "kmsd/1/session".to_owned(),
        }
        .into_bytes()
    }
}

/// What one derivation may leave on the stack: the library wipes its hash states, but neither the copies that moving
/// them makes nor the extracted key.
const STACK_BYTES: usize = 2048;

/// Derives the key for one purpose from `parent`.
#[must_use]
pub fn derive(parent: &SecretKey, salt: KeySalt<'_>, label: Label) -> SecretKey {
    // One block of output: RFC 5869 bounds it at 255 blocks, so expand cannot refuse. Should a future version
    // of the library do so, the infallible signature is kept by aborting before any weak key is used.
    let derived = SecretKey::fill_with(|out| extract_and_expand(parent, salt, &label.info(), out));
    wipe_stack::<STACK_BYTES>();
    match derived {
        Ok(key) => key,
        Err(_) => std::process::abort(),
    }
}

#[inline(never)]
fn extract_and_expand(
    parent: &SecretKey,
    salt: KeySalt<'_>,
    info: &[u8],
    out: &mut [u8],
) -> Result<(), InvalidLength> {
    Hkdf::<Sha256>::new(Some(salt.0), parent.expose()).expand(info, out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const LABELS: [Label; 16] = [
        Label::VolumeRecords { domain: 0 },
        Label::VolumeRecords { domain: 1 },
        Label::VolumeNames { domain: 0 },
        Label::VolumeNames { domain: 1 },
        Label::VolumeRoots { domain: 0 },
        Label::VolumeRoots { domain: 1 },
        Label::FileContent { domain: 0 },
        Label::FileContent { domain: 1 },
        Label::Blob,
        Label::KeystoreMaterial,
        Label::KeystoreMetadata,
        Label::KeystoreNames,
        Label::KeystoreRowSet,
        Label::KeystoreRoot,
        Label::KeystorePassphrase,
        Label::Session,
    ];

    #[test]
    fn labels_give_distinct_keys() {
        let parent = SecretKey::generate().unwrap();
        let keys: HashSet<[u8; 32]> = LABELS
            .iter()
            .map(|&label| *derive(&parent, KeySalt(b"salt"), label).expose())
            .collect();
        assert_eq!(keys.len(), LABELS.len());
    }

    #[test]
    fn salts_give_distinct_keys() {
        let parent = SecretKey::generate().unwrap();
        let one = derive(&parent, KeySalt(b"one"), Label::Blob);
        let two = derive(&parent, KeySalt(b"two"), Label::Blob);
        assert_ne!(one.expose(), two.expose());
    }

    #[test]
    fn no_label_is_a_prefix_of_another() {
        for a in LABELS {
            for b in LABELS {
                assert!(
                    a == b || !b.info().starts_with(&a.info()),
                    "{a:?} is a prefix of {b:?}"
                );
            }
        }
    }
}
