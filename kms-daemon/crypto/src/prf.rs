//! HMAC-SHA-256 (RFC 2104) as a pseudorandom function.

use crate::SecretKey;
use crate::arena::wipe_stack;
use hmac::digest::array::Array;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Length of what a [`Prf`] gives, in bytes.
pub const PRF_LEN: usize = 32;

/// What one evaluation may leave on the stack.
const STACK_BYTES: usize = 2048;

/// A pseudorandom function under one key. The key alone is kept: its state in HMAC, which is worth as much, is made for
/// each use, and wiped.
pub struct Prf(SecretKey);

impl Prf {
    /// A function under `key`.
    #[must_use]
    pub fn new(key: SecretKey) -> Self {
        Self(key)
    }

    /// The function of the parts, one behind the other. Where their lengths vary, the caller says so within them.
    #[must_use]
    pub fn of(&self, parts: &[&[u8]]) -> [u8; PRF_LEN] {
        let mut out = [0; PRF_LEN];
        evaluate(&self.0, parts, &mut out);
        wipe_stack::<STACK_BYTES>();
        out
    }
}

#[inline(never)]
fn evaluate(key: &SecretKey, parts: &[&[u8]], out: &mut [u8; PRF_LEN]) {
    // HMAC fills a short key up with zeros (RFC 2104, section 2), which leaves no length to refuse.
    let mut padded = Array::default();
    for (place, byte) in padded.iter_mut().zip(key.expose()) {
        *place = *byte;
    }
    let mut mac = Hmac::<Sha256>::new(&padded);
    for part in parts {
        mac.update(part);
    }
    out.copy_from_slice(&mac.finalize().into_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test case 1, whose key is filled up with zeros here as HMAC does.
    #[test]
    fn rfc4231_vector() {
        let key = SecretKey::fill_with(|key| {
            key[..20].fill(0x0b);
            Ok::<(), ()>(())
        });
        let out = Prf::new(key.unwrap()).of(&[b"Hi ", b"There"]);
        assert_eq!(out[..8], 0xb034_4c61_d8db_3853_u64.to_be_bytes());
        assert_eq!(out[24..], 0x26e9_376c_2e32_cff7_u64.to_be_bytes());
    }
}
