//! AES-256-GCM-SIV (RFC 8452) with a detached tag, in place.

use crate::arena::wipe_stack;
use crate::{CryptoError, Nonce, SecretKey};
use aes_gcm_siv::AesGcmSiv;
use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use aes_gcm_siv::aes::Aes256Enc;

/// Length of an authentication tag, in bytes.
pub const TAG_LEN: usize = 16;

/// An authentication tag, kept out of line beside the nonce, so that a 4096-byte block stays 4096 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag(pub [u8; TAG_LEN]);

/// What one call may leave on the stack: the library wipes its key schedules, but not the copies that moving them makes.
const STACK_BYTES: usize = 6144;

/// The encrypting half of AES: GCM-SIV decrypts nothing with it, and the inverse schedule would be expanded for nothing.
type Cipher = AesGcmSiv<Aes256Enc>;

/// Seals and opens under one key. The key alone is kept, in the arena: its schedule takes the processor as long as
/// fetching it from memory would, is four to thirty times as large, and is made for each use, and wiped.
pub struct Sealer(SecretKey);

impl Sealer {
    /// A sealer under `key`.
    #[must_use]
    pub fn new(key: SecretKey) -> Self {
        Self(key)
    }

    /// For several calls one after the other, on one thread: the key schedule is made once.
    #[must_use]
    #[inline(never)]
    pub fn batch(&self) -> Batch<'_> {
        Batch {
            cipher: Cipher::new(self.0.expose().into()),
            _sealer: self,
        }
    }

    /// Encrypts `buffer` in place and authenticates it together with `aad`.
    ///
    /// # Errors
    /// [`CryptoError::TooLong`] past the limits of RFC 8452; the buffer is then to be thrown away.
    pub fn seal(&self, nonce: Nonce, aad: &[u8], buffer: &mut [u8]) -> Result<Tag, CryptoError> {
        self.batch().seal(nonce, aad, buffer)
    }

    /// Decrypts `buffer` in place if it, `aad`, `nonce` and `tag` are what was sealed.
    ///
    /// # Errors
    /// [`CryptoError::Authentication`] for every difference alike; the buffer is then zeroed.
    pub fn open(&self, nonce: Nonce, aad: &[u8], buffer: &mut [u8], tag: Tag) -> Result<(), CryptoError> {
        self.batch().open(nonce, aad, buffer, tag)
    }
}

/// A [`Sealer`] with its key schedule, for a few calls; both it and what the calls left on the stack are wiped on drop.
pub struct Batch<'s> {
    cipher: Cipher,
    _sealer: &'s Sealer,
}

// The calls of the library have frames of their own, below whoever holds a batch: there they are wiped.
impl Batch<'_> {
    /// As [`Sealer::seal`].
    ///
    /// # Errors
    /// [`CryptoError::TooLong`]
    #[inline(never)]
    pub fn seal(&self, nonce: Nonce, aad: &[u8], buffer: &mut [u8]) -> Result<Tag, CryptoError> {
        let tag = self
            .cipher
            .encrypt_inout_detached(&nonce.0.into(), aad, buffer.into())
            .map_err(|_| CryptoError::TooLong)?;
        Ok(Tag(tag.into()))
    }

    /// As [`Sealer::open`].
    ///
    /// # Errors
    /// [`CryptoError::Authentication`]
    #[inline(never)]
    pub fn open(&self, nonce: Nonce, aad: &[u8], buffer: &mut [u8], tag: Tag) -> Result<(), CryptoError> {
        let opened =
            self.cipher
                .decrypt_inout_detached(&nonce.0.into(), aad, (&mut *buffer).into(), &tag.0.into());
        // GCM-SIV decrypts before it can check: unauthenticated plaintext must not stay in the caller's buffer.
        opened.map_err(|_| {
            buffer.fill(0);
            CryptoError::Authentication
        })
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        // The schedule itself is wiped by the library.
        wipe_stack::<STACK_BYTES>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(first: u8) -> SecretKey {
        SecretKey::fill_with(|k| {
            k[0] = first;
            Ok::<(), CryptoError>(())
        })
        .unwrap()
    }

    fn nonce() -> Nonce {
        let mut bytes = [0; 12];
        bytes[0] = 3;
        Nonce(bytes)
    }

    proptest! {
        #[test]
        fn opens_what_was_sealed_and_nothing_else(
            plain in proptest::collection::vec(any::<u8>(), 1..5000),
            aad in proptest::collection::vec(any::<u8>(), 1..64),
            at in any::<proptest::sample::Index>(),
            bit in 0..8u8,
        ) {
            let sealer = Sealer::new(key(1));
            let mut sealed = plain.clone();
            let tag = sealer.seal(nonce(), &aad, &mut sealed).unwrap();

            let mut whole = sealed.clone();
            sealer.open(nonce(), &aad, &mut whole, tag).unwrap();
            prop_assert_eq!(&whole, &plain);

            let mut bad_text = sealed.clone();
            bad_text[at.index(sealed.len())] ^= 1 << bit;
            let mut bad_aad = aad.clone();
            bad_aad[at.index(aad.len())] ^= 1 << bit;
            let mut bad_tag = tag;
            bad_tag.0[at.index(TAG_LEN)] ^= 1 << bit;
            let mut bad_nonce = nonce();
            bad_nonce.0[at.index(12)] ^= 1 << bit;
            let other = Sealer::new(key(2));
            for (sealer, nonce, aad, mut text, tag) in [
                (&sealer, nonce(), &aad, bad_text, tag),
                (&sealer, nonce(), &bad_aad, sealed.clone(), tag),
                (&sealer, nonce(), &aad, sealed.clone(), bad_tag),
                (&sealer, bad_nonce, &aad, sealed.clone(), tag),
                (&other, nonce(), &aad, sealed.clone(), tag),
            ] {
                prop_assert_eq!(sealer.open(nonce, aad, &mut text, tag), Err(CryptoError::Authentication));
                prop_assert!(text.iter().all(|&byte| byte == 0), "unauthenticated plaintext left behind");
            }
        }
    }
}
