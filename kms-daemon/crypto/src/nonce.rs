//! 96-bit nonces that neither a crash, a fork of the image nor a restored backup repeats.

use crate::CryptoError;
use std::sync::Mutex;

/// Length of a nonce, in bytes (RFC 8452, section 4).
pub const NONCE_LEN: usize = 12;

/// A 96-bit nonce: an 8-byte salt, then a 32-bit big-endian counter. It is stored whole beside the tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; NONCE_LEN]);

/// Gives nonces under one salt, drawn when the source is made and again when the counter wraps; a salt is never
/// read from disk, so restored state restores no nonce. GCM-SIV is the second line, not the first.
pub struct NonceSource(Mutex<State>);

struct State {
    salt: [u8; 8],
    next: u32,
}

impl NonceSource {
    /// A source with a fresh salt.
    ///
    /// # Errors
    /// [`CryptoError::Randomness`] if getrandom(2) gives no bytes.
    pub fn new() -> Result<Self, CryptoError> {
        Ok(Self(Mutex::new(State {
            salt: fresh_salt()?,
            next: 0,
        })))
    }

    /// The next nonce.
    ///
    /// # Errors
    /// [`CryptoError::Randomness`] if the counter wrapped and getrandom(2) gives no new salt; the same call may
    /// be made again, and still no nonce is repeated.
    pub fn next(&self) -> Result<Nonce, CryptoError> {
        // The state is consistent at every point where this lock is held, so a poisoned lock is sound to use.
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(after) = state.next.checked_add(1) else {
            // The last counter value is spent on drawing the salt, never on a nonce.
            state.salt = fresh_salt()?;
            state.next = 1;
            return Ok(join(state.salt, 0));
        };
        let nonce = join(state.salt, state.next);
        state.next = after;
        Ok(nonce)
    }
}

fn join(salt: [u8; 8], counter: u32) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    let (head, tail) = bytes.split_at_mut(salt.len());
    head.copy_from_slice(&salt);
    tail.copy_from_slice(&counter.to_be_bytes());
    Nonce(bytes)
}

fn fresh_salt() -> Result<[u8; 8], CryptoError> {
    let mut salt = [0; 8];
    getrandom::fill(&mut salt).map_err(|_| CryptoError::Randomness)?;
    Ok(salt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_nonce_repeats_when_the_counter_wraps() {
        let source = NonceSource::new().unwrap();
        let mut seen = HashSet::new();
        for _ in 0..100 {
            assert!(seen.insert(source.next().unwrap().0));
        }
        source.0.lock().unwrap().next = u32::MAX - 10;
        for _ in 0..100 {
            assert!(seen.insert(source.next().unwrap().0));
        }
    }

    #[test]
    fn two_sources_share_no_salt() {
        let (a, b) = (NonceSource::new().unwrap(), NonceSource::new().unwrap());
        assert_ne!(a.next().unwrap().0[..8], b.next().unwrap().0[..8]);
    }
}
