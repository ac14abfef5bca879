//! What a secret looks like in memory, as digests of a few bytes of it: whoever looks for it need not have it.

use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a secret that are looked for; so many at random are nowhere by chance.
pub const WINDOW: usize = 16;
/// Odd, so that multiplying by it loses nothing.
pub(crate) const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// One window of a secret: a rolling hash that finds candidates, and the digest that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Sum over the bytes b of (b + 1) times FACTOR to the power of how many follow.
    pub rolling: u64,
    /// SHA-256.
    pub sha256: [u8; 32],
}

/// A window with the name of what it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    /// For people.
    pub name: String,
    /// Where it is looked for by.
    pub window: Window,
}

/// The rolling hash, one byte further.
pub(crate) const fn push(hash: u64, byte: u8) -> u64 {
    hash.wrapping_mul(FACTOR).wrapping_add(byte as u64 + 1)
}

impl Window {
    /// That of the first bytes of `secret`; `None` if it is shorter than a window.
    #[must_use]
    pub fn of(secret: &[u8]) -> Option<Self> {
        let window = secret.get(..WINDOW)?;
        Some(Self {
            rolling: window.iter().fold(0, |hash, byte| push(hash, *byte)),
            sha256: Sha256::digest(window).into(),
        })
    }
}

/// A 256-bit key in every form in which it could lie about: either half, a round key from the middle of its AES schedule,
/// and the blocks that HMAC makes of it, as bytes and as the words that SHA-256 loads.
#[must_use]
pub fn key_forms(name: &str, key: &[u8; 32]) -> Vec<Form> {
    let mut forms = Vec::new();
    let mut add = |form: &str, bytes: Option<&[u8]>| {
        forms.extend(bytes.and_then(Window::of).map(|window| Form {
            name: format!("{name}: {form}"),
            window,
        }));
    };
    add("first half", Some(key));
    add("second half", key.get(WINDOW..));
    let schedule = Zeroizing::new(aes256_schedule(key));
    add("AES round key 2", schedule.get(2 * 16..));
    add("AES round key 9", schedule.get(9 * 16..));
    for (form, pad) in [("HMAC inner", 0x36), ("HMAC outer", 0x5c), ("words", 0)] {
        let mut padded = key.map(|byte| byte ^ pad);
        if pad != 0 {
            add(form, Some(&padded));
        }
        for word in padded.chunks_exact_mut(4) {
            word.reverse();
        }
        add(&format!("{form}, words"), Some(&padded));
        padded.zeroize();
    }
    forms
}

/// The key schedule of AES-256 (FIPS 197, section 5.2), as bytes.
fn aes256_schedule(key: &[u8; 32]) -> [u8; 240] {
    let mut bytes = [0; 240];
    let byte_of = |bytes: &[u8; 240], at: usize| bytes.get(at).copied().unwrap_or_default();
    for (out, byte) in bytes.iter_mut().zip(key) {
        *out = *byte;
    }
    let mut constant = 1_u8;
    for word in 8..60 {
        let mut last = [3, 2, 1, 0].map(|back| byte_of(&bytes, 4 * word - 1 - back));
        if word % 8 == 0 {
            last.rotate_left(1);
            last = last.map(sub_byte);
            if let Some(first) = last.first_mut() {
                *first ^= constant;
            }
            constant <<= 1;
        } else if word % 8 == 4 {
            last = last.map(sub_byte);
        }
        for (index, byte) in last.into_iter().enumerate() {
            let before = byte_of(&bytes, 4 * (word - 8) + index);
            if let Some(out) = bytes.get_mut(4 * word + index) {
                *out = byte ^ before;
            }
        }
    }
    bytes
}

/// The substitution of FIPS 197, section 5.1.1: the inverse in GF(2^8), 254th power, then an affine map.
fn sub_byte(byte: u8) -> u8 {
    let inverse = (0..254).fold(1, |power, _| multiply(power, byte));
    (0..5).fold(0x63, |sum, turn| sum ^ inverse.rotate_left(turn))
}

fn multiply(a: u8, b: u8) -> u8 {
    (0..8).fold(0, |sum, bit| {
        let doubled = (0..bit).fold(a, |a, _| (a << 1) ^ if a & 0x80 == 0 { 0 } else { 0x1b });
        if b >> bit & 1 == 1 { sum ^ doubled } else { sum }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 197, appendix A.3.
    #[test]
    fn the_schedule_is_that_of_the_standard() {
        let key: [u8; 32] = [
            0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77, 0x81,
            0x1f, 0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14, 0xdf, 0xf4,
        ];
        let schedule = aes256_schedule(&key);
        assert_eq!(schedule[32..36], [0x9b, 0xa3, 0x54, 0x11]);
        assert_eq!(schedule[236..], [0x70, 0x6c, 0x63, 0x1e]);
    }

    #[test]
    fn a_key_has_nine_forms() {
        assert_eq!(key_forms("key", &[7; 32]).len(), 9);
    }
}
