//! AES-256-GCM-SIV (RFC 8452) and HKDF-SHA-256 (RFC 5869), as the two formats use them.

use aes_gcm_siv::Aes256GcmSiv;
use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

pub(crate) const NONCE: usize = 12;
pub(crate) const TAG: usize = 16;

/// 256 bits, wiped on drop.
pub(crate) type Key = Zeroizing<[u8; 32]>;

/// A key out of bytes of that length.
pub(crate) fn key(bytes: &[u8]) -> Option<Key> {
    Some(Zeroizing::new(bytes.try_into().ok()?))
}

/// HKDF with `label` as info.
pub(crate) fn derive(from: &[u8; 32], salt: &[u8], label: &str) -> Key {
    let mut out = Zeroizing::new([0; 32]);
    // 32 bytes are within the bound of RFC 5869: it cannot refuse.
    let _infallible = Hkdf::<Sha256>::new(Some(salt), from).expand(label.as_bytes(), &mut *out);
    out
}

/// Plaintext, if the tag is right.
pub(crate) fn open(
    key: &[u8; 32],
    nonce: &[u8],
    aad: &[u8],
    text: &[u8],
    tag: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let nonce: [u8; NONCE] = nonce.try_into().ok()?;
    let tag: [u8; TAG] = tag.try_into().ok()?;
    let mut plain = Zeroizing::new(text.to_vec());
    let buffer: &mut [u8] = &mut plain;
    Aes256GcmSiv::new(key.into())
        .decrypt_inout_detached(&nonce.into(), aad, buffer.into(), &tag.into())
        .ok()?;
    Some(plain)
}

/// "LP(x)" of docs/kms-format.md, for each in turn.
pub(crate) fn length_prefixed(fields: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in fields {
        out.extend_from_slice(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(field);
    }
    out
}
