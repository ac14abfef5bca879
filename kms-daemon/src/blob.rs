//! Ciphertext blobs: self-describing, each sealed under a key of its own. docs/kms-format.md gives the bytes.

use crate::store::length_prefixed;
use kms_api::EncryptionContext;
use kms_crypto::{CryptoError, KeySalt, Label, NONCE_LEN, Nonce, Sealer, SecretKey, TAG_LEN, Tag, derive};
use uuid::Uuid;
use zeroize::Zeroizing;

const FORMAT: u8 = 1;
const RANDOM_LEN: usize = 16;
/// The key seals this one plaintext and nothing else ever, so its nonce need not vary.
const NONCE: Nonce = Nonce([0; NONCE_LEN]);

/// What a blob says of itself; not authenticated before the blob is opened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header<'a> {
    pub(crate) region: &'a str,
    pub(crate) key_id: Uuid,
    pub(crate) version_id: Uuid,
}

/// A blob, taken apart.
pub(crate) struct Blob<'a> {
    pub(crate) header: Header<'a>,
    /// Everything before the ciphertext, as it stood.
    head: &'a [u8],
    random: &'a [u8],
    sealed: &'a [u8],
}

/// Seals `plain` under a CMK version.
pub(crate) fn seal(
    material: &SecretKey,
    header: &Header<'_>,
    context: &EncryptionContext,
    plain: &[u8],
) -> Result<Vec<u8>, CryptoError> {
    let mut random = [0; RANDOM_LEN];
    getrandom::fill(&mut random).map_err(|_| CryptoError::Randomness)?;
    let region_len = u8::try_from(header.region.len()).map_err(|_| CryptoError::TooLong)?;
    let mut blob = Vec::with_capacity(2 + header.region.len() + 48 + plain.len() + TAG_LEN);
    blob.extend_from_slice(&[FORMAT, region_len]);
    blob.extend_from_slice(header.region.as_bytes());
    blob.extend_from_slice(header.key_id.as_bytes());
    blob.extend_from_slice(header.version_id.as_bytes());
    blob.extend_from_slice(&random);
    let mut text = Zeroizing::new(plain.to_vec());
    let tag = sealer(material, &random).seal(NONCE, &aad(&blob, context), &mut text)?;
    blob.extend_from_slice(&text);
    blob.extend_from_slice(&tag.0);
    Ok(blob)
}

impl<'a> Blob<'a> {
    /// Takes a blob apart; `None` if it is none.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (&[FORMAT, region_len], rest) = bytes.split_first_chunk::<2>()? else {
            return None;
        };
        let (region, rest) = rest.split_at_checked(usize::from(region_len))?;
        let (key_id, rest) = rest.split_first_chunk::<16>()?;
        let (version_id, rest) = rest.split_first_chunk::<16>()?;
        let (random, sealed) = rest.split_at_checked(RANDOM_LEN)?;
        let head = bytes.get(..bytes.len() - sealed.len())?;
        Some(Self {
            header: Header {
                region: std::str::from_utf8(region).ok()?,
                key_id: Uuid::from_bytes(*key_id),
                version_id: Uuid::from_bytes(*version_id),
            },
            head,
            random,
            sealed,
        })
    }

    /// The plaintext.
    pub(crate) fn open(
        &self,
        material: &SecretKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, CryptoError> {
        let (text, tag) = self
            .sealed
            .split_last_chunk::<TAG_LEN>()
            .ok_or(CryptoError::Authentication)?;
        let mut plain = Zeroizing::new(text.to_vec());
        sealer(material, self.random).open(NONCE, &aad(self.head, context), &mut plain, Tag(*tag))?;
        Ok(plain)
    }
}

fn sealer(material: &SecretKey, random: &[u8]) -> Sealer {
    Sealer::new(derive(material, KeySalt(random), Label::Blob))
}

fn aad(head: &[u8], context: &EncryptionContext) -> Vec<u8> {
    length_prefixed(&[head, &context.canonical()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(blob) = Blob::parse(&bytes) {
                let key = SecretKey::generate().unwrap();
                prop_assert!(blob.open(&key, &EncryptionContext::default()).is_err());
            }
        }

        #[test]
        fn every_flipped_bit_is_refused(plain in proptest::collection::vec(any::<u8>(), 0..64), bit in 0..8u8) {
            let key = SecretKey::generate().unwrap();
            let context = EncryptionContext::data_key([3; 16], 1, 4);
            let header = Header { region: "r-1", key_id: Uuid::from_bytes([1; 16]), version_id: Uuid::from_bytes([2; 16]) };
            let sealed = seal(&key, &header, &context, &plain).unwrap();
            let blob = Blob::parse(&sealed).unwrap();
            prop_assert_eq!(&blob.header, &header);
            let opened = blob.open(&key, &context).unwrap();
            prop_assert_eq!(opened.as_slice(), plain.as_slice());
            for at in 0..sealed.len() {
                let mut flipped = sealed.clone();
                flipped[at] ^= 1 << bit;
                let opened = Blob::parse(&flipped).map(|blob| blob.open(&key, &context).is_ok());
                prop_assert!(opened != Some(true), "byte {}", at);
            }
        }
    }
}
