//! 256-bit keys as a type.

use crate::CryptoError;
use crate::arena::Secret;

/// Length of every symmetric key, in bytes.
pub const KEY_LEN: usize = 32;

/// A 256-bit symmetric key in the arena: moving the value copies no key bytes, and they are wiped on drop.
///
/// It has neither `Debug`, `Display` nor `Clone`: a key is not printed, and a second copy is made on purpose only.
pub struct SecretKey(Secret<KEY_LEN>);

impl SecretKey {
    /// A fresh key from getrandom(2).
    ///
    /// # Errors
    /// [`CryptoError::Randomness`] if the kernel gives no bytes.
    pub fn generate() -> Result<Self, CryptoError> {
        Self::fill_with(|key| getrandom::fill(key).map_err(|_| CryptoError::Randomness))
    }

    /// A key whose bytes `fill` writes in place, so that no copy of them is left on a stack.
    ///
    /// # Errors
    /// Whatever `fill` returns; the partly written key is wiped.
    pub fn fill_with<E>(fill: impl FnOnce(&mut [u8; KEY_LEN]) -> Result<(), E>) -> Result<Self, E> {
        let mut key = Secret::zeroed();
        fill(key.expose_mut())?;
        Ok(Self(key))
    }

    /// The key bytes, for the primitive that consumes them.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        self.0.expose()
    }
}
