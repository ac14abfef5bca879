//! A slot that is a file and a passphrase. Each slot has a KEK and a salt of its own: the passphrase and the file of one
//! epoch open no other epoch. An old file and the passphrase open the old epoch for ever, so erasure is none.

use super::{Erasure, RootSlot, SLOT_HEADER_LEN, SlotError, SlotKind, keystore_of, read_small, slot_header};
use crate::home::{HomeError, write_new};
use argon2::{Algorithm, Argon2, Params, Version};
use kms_crypto::{
    CryptoError, KEY_LEN, KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Sealer, SecretKey, TAG_LEN, Tag,
    derive,
};
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;
use uuid::Uuid;
use zeroize::Zeroizing;

const SALT_LEN: usize = 32;
const COSTS_LEN: usize = 12;
/// RFC 9106, section 4: the second recommended option.
const COSTS: Costs = Costs {
    memory_kib: 64 << 10,
    passes: 3,
    lanes: 4,
};
/// From the least that OWASP recommends to what a start can be expected to wait for. A file that says otherwise was changed.
const MEMORY_KIB: RangeInclusive<u32> = 19_456..=1 << 20;
const PASSES: RangeInclusive<u32> = 2..=16;
const LANES: RangeInclusive<u32> = 1..=16;
const PASSPHRASE_BYTES: RangeInclusive<usize> = 12..=1024;

/// What a user knows, wiped on drop.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// The passphrase that these bytes are, without the end of the line.
    ///
    /// # Errors
    /// [`SlotError::Passphrase`] if it is not 12 to 1024 bytes long.
    pub fn new(mut bytes: Zeroizing<Vec<u8>>) -> Result<Self, SlotError> {
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        if !PASSPHRASE_BYTES.contains(&bytes.len()) {
            return Err(SlotError::Passphrase(
                "the passphrase must be 12 to 1024 bytes long".to_owned(),
            ));
        }
        Ok(Self(bytes))
    }

    /// The passphrase in a file, or in whatever can be read to its end.
    ///
    /// # Errors
    /// [`SlotError::Home`], [`SlotError::Passphrase`].
    pub fn read(path: &Path) -> Result<Self, SlotError> {
        // One byte more than there may be, and two for the end of the line; never outgrown, so never copied.
        let limit = PASSPHRASE_BYTES.end() + 3;
        let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 64));
        File::open(path)
            .and_then(|file| file.take(limit as u64).read_to_end(&mut bytes))
            .map_err(HomeError::io(path))?;
        Self::new(bytes)
    }

    fn stretch(&self, costs: Costs, salt: &[u8; SALT_LEN], keystore_id: Uuid) -> Result<Sealer, CryptoError> {
        let too_long = |_| CryptoError::TooLong;
        let params = Params::new(costs.memory_kib, costs.passes, costs.lanes, Some(KEY_LEN));
        let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.map_err(too_long)?);
        let stretched = SecretKey::fill_with(|out| argon.hash_password_into(&self.0, salt, out));
        let key = derive(
            &stretched.map_err(too_long)?,
            KeySalt(keystore_id.as_bytes()),
            Label::KeystorePassphrase,
        );
        Ok(Sealer::new(key))
    }
}

#[derive(Clone, Copy)]
struct Costs {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

impl Costs {
    fn bytes(self) -> [u8; COSTS_LEN] {
        let mut bytes = [0; COSTS_LEN];
        let fields = [self.memory_kib, self.passes, self.lanes].map(u32::to_be_bytes);
        super::fill(&mut bytes, &[fields.as_flattened()]);
        bytes
    }

    /// What a file says, if it is worth computing.
    fn parse(bytes: &[u8; COSTS_LEN]) -> Option<Self> {
        let (memory, rest) = bytes.split_first_chunk::<4>()?;
        let (passes, rest) = rest.split_first_chunk::<4>()?;
        let costs = Self {
            memory_kib: u32::from_be_bytes(*memory),
            passes: u32::from_be_bytes(*passes),
            lanes: u32::from_be_bytes(rest.try_into().ok()?),
        };
        let sound = MEMORY_KIB.contains(&costs.memory_kib)
            && PASSES.contains(&costs.passes)
            && LANES.contains(&costs.lanes);
        sound.then_some(costs)
    }
}

/// A KEK in a file, sealed under a passphrase.
pub struct PassphraseRootSlot {
    keystore_id: Uuid,
    epoch: u64,
    kek: SecretKey,
}

impl PassphraseRootSlot {
    /// Writes a slot with this KEK, durable when this returns.
    ///
    /// # Errors
    /// [`SlotError`]
    pub fn create(
        path: &Path,
        keystore_id: Uuid,
        epoch: u64,
        kek: &SecretKey,
        passphrase: &Passphrase,
    ) -> Result<(), SlotError> {
        let mut salt = [0; SALT_LEN];
        getrandom::fill(&mut salt).map_err(|_| CryptoError::Randomness)?;
        let mut bytes = slot_header(SlotKind::Passphrase, keystore_id, epoch).to_vec();
        bytes.extend_from_slice(&COSTS.bytes());
        bytes.extend_from_slice(&salt);
        let nonce = NonceSource::new()?.next()?;
        let mut sealed = Zeroizing::new(*kek.expose());
        let tag =
            passphrase
                .stretch(COSTS, &salt, keystore_id)?
                .seal(nonce, &bytes, sealed.as_mut_slice())?;
        bytes.extend_from_slice(&nonce.0);
        bytes.extend_from_slice(sealed.as_slice());
        bytes.extend_from_slice(&tag.0);
        Ok(write_new(path, &bytes)?)
    }

    /// Opens a slot with its passphrase.
    ///
    /// # Errors
    /// [`SlotError::Format`] if it is not the slot of `epoch`, [`SlotError::WrongPassphrase`].
    pub fn open(path: &Path, epoch: u64, passphrase: &Passphrase) -> Result<Self, SlotError> {
        let bytes = read_small(path)?;
        let format = || SlotError::Format(path.to_owned());
        let (header, rest) = bytes.split_first_chunk::<SLOT_HEADER_LEN>().ok_or_else(format)?;
        let (costs, rest) = rest.split_first_chunk::<COSTS_LEN>().ok_or_else(format)?;
        let (salt, rest) = rest.split_first_chunk::<SALT_LEN>().ok_or_else(format)?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(format)?;
        let (sealed, tag) = rest.split_first_chunk::<KEY_LEN>().ok_or_else(format)?;
        let tag: [u8; TAG_LEN] = tag.try_into().map_err(|_| format())?;
        let keystore_id = keystore_of(header, SlotKind::Passphrase, epoch).ok_or_else(format)?;
        let costs = Costs::parse(costs).ok_or_else(format)?;
        let authenticated = bytes
            .get(..SLOT_HEADER_LEN + COSTS_LEN + SALT_LEN)
            .ok_or_else(format)?;
        let sealer = passphrase.stretch(costs, salt, keystore_id)?;
        let kek = SecretKey::fill_with(|out| {
            out.copy_from_slice(sealed);
            sealer.open(Nonce(*nonce), authenticated, out, Tag(tag))
        });
        Ok(Self {
            keystore_id,
            epoch,
            kek: kek.map_err(|_: CryptoError| SlotError::WrongPassphrase(path.to_owned()))?,
        })
    }
}

impl RootSlot for PassphraseRootSlot {
    fn erasure(&self) -> Erasure {
        SlotKind::Passphrase.erasure()
    }

    fn keystore_id(&self) -> Uuid {
        self.keystore_id
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn kek(&self) -> Result<SecretKey, SlotError> {
        SecretKey::fill_with(|out| {
            out.copy_from_slice(self.kek.expose());
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::new(Zeroizing::new(text.as_bytes().to_vec())).unwrap()
    }

    #[test]
    fn a_slot_opens_with_its_own_passphrase_and_epoch_only() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("slot");
        let id = Uuid::from_bytes([7; 16]);
        let (right, wrong) = (passphrase("correct horse\n"), passphrase("correct horsf"));
        let kek = SecretKey::generate().unwrap();
        PassphraseRootSlot::create(&path, id, 3, &kek, &right).unwrap();
        let opened = PassphraseRootSlot::open(&path, 3, &passphrase("correct horse")).unwrap();
        assert_eq!(opened.kek().unwrap().expose(), kek.expose());
        assert_eq!((opened.keystore_id(), opened.erasure()), (id, Erasure::None));
        assert!(matches!(
            PassphraseRootSlot::open(&path, 3, &wrong),
            Err(SlotError::WrongPassphrase(_))
        ));
        assert!(matches!(
            PassphraseRootSlot::open(&path, 4, &right),
            Err(SlotError::Format(_))
        ));
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(32).any(|window| window == kek.expose()));
    }

    #[test]
    fn costs_salt_key_or_tag_changed_is_refused_and_absurd_costs_before_they_are_spent() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("slot");
        let right = passphrase("correct horse");
        let kek = SecretKey::generate().unwrap();
        PassphraseRootSlot::create(&path, Uuid::from_bytes([7; 16]), 1, &kek, &right).unwrap();
        let good = std::fs::read(&path).unwrap();
        let with = |at: usize, value: u8| {
            let mut bad = good.clone();
            bad[at] = value;
            std::fs::write(&path, bad).unwrap();
            PassphraseRootSlot::open(&path, 1, &right).err().unwrap()
        };
        // Memory of 4 GiB and of nothing, 255 passes, no lane.
        for (at, value) in [(34, 0xff), (35, 0), (41, 0xff), (45, 0)] {
            assert!(matches!(with(at, value), SlotError::Format(_)), "byte {at}");
        }
        // Passes, lanes, salt, nonce, key, tag.
        for at in [41, 45, 46, 78, 90, 122, 137] {
            let value = good[at] ^ 1;
            assert!(
                matches!(with(at, value), SlotError::WrongPassphrase(_)),
                "byte {at}"
            );
        }
        for length in [0, 33, 45, good.len() - 1, good.len() + 1] {
            let mut bad = good.clone();
            bad.resize(length, 0);
            std::fs::write(&path, bad).unwrap();
            let error = PassphraseRootSlot::open(&path, 1, &right).err().unwrap();
            assert!(matches!(error, SlotError::Format(_)), "{length} bytes");
        }
    }

    #[test]
    fn a_passphrase_has_bounds_and_loses_its_line_end() {
        for bad in ["", "\n", "elevenbytes", &"x".repeat(1025)] {
            let bytes = Zeroizing::new(bad.as_bytes().to_vec());
            assert!(Passphrase::new(bytes).is_err(), "{} bytes", bad.len());
        }
        assert_eq!(passphrase("twelve bytes\r\n").0.as_slice(), b"twelve bytes");
        assert_eq!(passphrase("twelve bytes\n\n").0.as_slice(), b"twelve bytes\n");
    }
}
