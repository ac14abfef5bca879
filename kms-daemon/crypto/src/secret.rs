//! 256-bit keys as a type.

use crate::CryptoError;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of every symmetric key, in bytes.
pub const KEY_LEN: usize = 32;

/// A 256-bit symmetric key: boxed, so that moving the value copies no key bytes, and wiped on drop.
///
/// It has neither `Debug`, `Display` nor `Clone`: a key is not printed, and a second copy is made on purpose only.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct SecretKey(Box<[u8; KEY_LEN]>);

impl SecretKey {
    /// A fresh key from getrandom(2).
    ///
    /// # Errors
    /// [`CryptoError::Randomness`] if the kernel gives no bytes.
    pub fn generate() -> Result<Self, CryptoError> {
        let mut key = Self::zeroed();
        getrandom::fill(key.0.as_mut_slice()).map_err(|_| CryptoError::Randomness)?;
        Ok(key)
    }

    /// A key whose bytes `fill` writes in place, so that no copy of them is left on a stack.
    ///
    /// # Errors
    /// Whatever `fill` returns; the partly written key is wiped.
    pub fn fill_with<E>(fill: impl FnOnce(&mut [u8; KEY_LEN]) -> Result<(), E>) -> Result<Self, E> {
        let mut key = Self::zeroed();
        fill(&mut key.0)?;
        Ok(key)
    }

    /// The key bytes, for the primitive that consumes them.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    fn zeroed() -> Self {
        Self(Box::new([0; KEY_LEN]))
    }
}
