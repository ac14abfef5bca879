//! Root slots: what opens the root key, and what destroying it is worth.

mod file;
mod passphrase;

pub use file::FileRootSlot;
pub use passphrase::{Passphrase, PassphraseRootSlot};

use crate::home::{HomeError, write_new};
use kms_crypto::{
    CryptoError, KEY_LEN, KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Sealer, Secret, SecretKey, TAG_LEN,
    Tag, derive,
};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use zeroize::Zeroizing;

const SLOT_MAGIC: &[u8; 8] = b"kmsdslot";
const ROOT_MAGIC: &[u8; 8] = b"kmsdroot";
const FORMAT: u8 = 1;
const SLOT_HEADER_LEN: usize = 8 + 1 + 1 + 16 + 8;
const ROOT_HEADER_LEN: usize = 8 + 1 + 16 + 8;

/// Why the root key cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// A file could not be read or written.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// It is no slot or root file, or one of another version, kind or epoch.
    #[error("{0} is not a file of this version of kmsd")]
    Format(PathBuf),
    /// The slot's key does not open the root: one of the two is of another keystore, or was changed.
    #[error("the slot does not open {0}: they do not belong together")]
    Mismatch(PathBuf),
    /// The root key of the slot's epoch is gone.
    #[error(
        "the root slot is of epoch {epoch}, and {path} is not there: the slot was put back as it once was, or the \
         root was taken away. Put the true one back"
    )]
    NoRoot {
        /// The slot's.
        epoch: u64,
        /// Where the sealed root key was looked for.
        path: PathBuf,
    },
    /// A passphrase slot, and no passphrase.
    #[error("the root slot {0} needs its passphrase: name a file that holds it with --passphrase-file")]
    NeedsPassphrase(PathBuf),
    /// A passphrase, and a slot that takes none.
    #[error("the root slot {0} takes no passphrase")]
    TakesNoPassphrase(PathBuf),
    /// The tag of a passphrase slot fails.
    #[error("the passphrase is not that of {0}, or the file was changed")]
    WrongPassphrase(PathBuf),
    /// A passphrase that cannot be used.
    #[error("{0}")]
    Passphrase(String),
    /// A primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

/// What the destruction of a slot's content is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erasure {
    /// Old bytes may live on, in flash, journals, snapshots or on paper.
    None,
    /// A device guarantees that the old content cannot be had again.
    Device,
}

/// What opens the root key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SlotKind {
    /// Whoever has a file.
    File = 1,
    /// Whoever has a file and knows a passphrase.
    Passphrase = 2,
}

impl SlotKind {
    /// The kind's name, for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Passphrase => "passphrase",
        }
    }

    /// What destroying one is worth.
    #[must_use]
    pub const fn erasure(self) -> Erasure {
        match self {
            Self::File | Self::Passphrase => Erasure::None,
        }
    }

    /// What the slot at `path` says that it is.
    ///
    /// # Errors
    /// [`SlotError::Format`] if it is none.
    pub fn of(path: &Path) -> Result<Self, SlotError> {
        let bytes = read_small(path)?;
        match bytes.split_first_chunk::<10>() {
            Some(([magic @ .., FORMAT, 1], _)) if magic == SLOT_MAGIC => Ok(Self::File),
            Some(([magic @ .., FORMAT, 2], _)) if magic == SLOT_MAGIC => Ok(Self::Passphrase),
            _ => Err(SlotError::Format(path.to_owned())),
        }
    }
}

/// Makes and opens the slots of a keystore, which are all of one kind.
pub enum Keeper {
    /// Files.
    File,
    /// Files under this passphrase.
    Passphrase(Passphrase),
}

impl Keeper {
    /// The kind of its slots.
    #[must_use]
    pub const fn kind(&self) -> SlotKind {
        match self {
            Self::File => SlotKind::File,
            Self::Passphrase(_) => SlotKind::Passphrase,
        }
    }

    /// Writes a slot with a fresh KEK, durable when this returns, and gives the KEK.
    ///
    /// # Errors
    /// [`SlotError`]
    pub fn create(&self, path: &Path, keystore_id: Uuid, epoch: u64) -> Result<SecretKey, SlotError> {
        let kek = SecretKey::generate()?;
        match self {
            Self::File => drop(FileRootSlot::create(path, keystore_id, epoch, &kek)?),
            Self::Passphrase(passphrase) => {
                PassphraseRootSlot::create(path, keystore_id, epoch, &kek, passphrase)?;
            }
        }
        Ok(kek)
    }

    /// Finds a slot.
    ///
    /// # Errors
    /// [`SlotError::Format`] if it is not the slot of `epoch`; [`SlotError::WrongPassphrase`] and its kin.
    pub fn open(&self, path: &Path, epoch: u64) -> Result<Box<dyn RootSlot>, SlotError> {
        match (self, SlotKind::of(path)?) {
            (Self::File, SlotKind::File) => Ok(Box::new(FileRootSlot::open(path, epoch)?)),
            (Self::Passphrase(passphrase), SlotKind::Passphrase) => {
                Ok(Box::new(PassphraseRootSlot::open(path, epoch, passphrase)?))
            }
            (Self::File, SlotKind::Passphrase) => Err(SlotError::NeedsPassphrase(path.to_owned())),
            (Self::Passphrase(_), SlotKind::File) => Err(SlotError::TakesNoPassphrase(path.to_owned())),
        }
    }
}

impl Erasure {
    /// The name, for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Device => "device",
        }
    }
}

/// Opens the root key of one epoch.
pub trait RootSlot: Send + Sync {
    /// What destroying it is worth; certificates repeat this and never claim more.
    fn erasure(&self) -> Erasure;

    /// The keystore that it belongs to.
    fn keystore_id(&self) -> Uuid;

    /// The epoch whose root key it opens.
    fn epoch(&self) -> u64;

    /// The key-encryption key (KEK).
    ///
    /// # Errors
    /// [`SlotError`] if the slot cannot give it.
    fn kek(&self) -> Result<SecretKey, SlotError>;
}

/// Writes the file that holds `root`, sealed under the slot's KEK; durable when this returns.
pub(crate) fn seal_root(
    path: &Path,
    slot: (Uuid, u64),
    kek: &SecretKey,
    root: &SecretKey,
) -> Result<(), SlotError> {
    let (keystore_id, epoch) = slot;
    let mut bytes = Zeroizing::new(root_header(keystore_id, epoch).to_vec());
    let nonce = NonceSource::new()?.next()?;
    let mut sealed = Secret::<KEY_LEN>::zeroed();
    sealed.expose_mut().copy_from_slice(root.expose());
    let tag = root_sealer(kek, keystore_id).seal(nonce, &bytes, sealed.expose_mut())?;
    bytes.extend_from_slice(&nonce.0);
    bytes.extend_from_slice(sealed.expose());
    bytes.extend_from_slice(&tag.0);
    Ok(write_new(path, &bytes)?)
}

/// The root key that the file at `path` holds.
pub(crate) fn open_root(path: &Path, slot: &dyn RootSlot) -> Result<SecretKey, SlotError> {
    let bytes = read_small(path).map_err(|error| match error {
        SlotError::Home(HomeError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            SlotError::NoRoot {
                epoch: slot.epoch(),
                path: path.to_owned(),
            }
        }
        error => error,
    })?;
    let format = || SlotError::Format(path.to_owned());
    let (header, rest) = bytes.split_first_chunk::<ROOT_HEADER_LEN>().ok_or_else(format)?;
    let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(format)?;
    let (sealed, rest) = rest.split_first_chunk::<KEY_LEN>().ok_or_else(format)?;
    let tag: [u8; TAG_LEN] = rest.try_into().map_err(|_| format())?;
    if *header != root_header(slot.keystore_id(), slot.epoch()) {
        return Err(format());
    }
    let sealer = root_sealer(&slot.kek()?, slot.keystore_id());
    SecretKey::fill_with(|out| {
        out.copy_from_slice(sealed);
        sealer.open(Nonce(*nonce), header, out, Tag(tag))
    })
    .map_err(|_: CryptoError| SlotError::Mismatch(path.to_owned()))
}

fn root_sealer(kek: &SecretKey, keystore_id: Uuid) -> Sealer {
    Sealer::new(derive(kek, KeySalt(keystore_id.as_bytes()), Label::KeystoreRoot))
}

fn slot_header(kind: SlotKind, keystore_id: Uuid, epoch: u64) -> [u8; SLOT_HEADER_LEN] {
    let mut header = [0; SLOT_HEADER_LEN];
    let fields = [
        SLOT_MAGIC.as_slice(),
        &[FORMAT, kind as u8],
        keystore_id.as_bytes(),
        &epoch.to_be_bytes(),
    ];
    fill(&mut header, &fields);
    header
}

/// The keystore of a slot whose header is that of `kind` and `epoch`.
fn keystore_of(header: &[u8; SLOT_HEADER_LEN], kind: SlotKind, epoch: u64) -> Option<Uuid> {
    let keystore_id = Uuid::from_slice(header.get(10..26)?).ok()?;
    (*header == slot_header(kind, keystore_id, epoch)).then_some(keystore_id)
}

fn root_header(keystore_id: Uuid, epoch: u64) -> [u8; ROOT_HEADER_LEN] {
    let mut header = [0; ROOT_HEADER_LEN];
    let fields = [
        ROOT_MAGIC.as_slice(),
        &[FORMAT],
        keystore_id.as_bytes(),
        &epoch.to_be_bytes(),
    ];
    fill(&mut header, &fields);
    header
}

fn fill(header: &mut [u8], fields: &[&[u8]]) {
    for (out, byte) in header.iter_mut().zip(fields.iter().copied().flatten()) {
        *out = *byte;
    }
}

/// Reads a file that is known to be short, into a buffer that is wiped.
fn read_small(path: &Path) -> Result<Zeroizing<Vec<u8>>, SlotError> {
    // The capacity is never outgrown, so no copy is left behind by a reallocation.
    let mut bytes = Zeroizing::new(Vec::with_capacity(512));
    File::open(path)
        .and_then(|file| file.take(256).read_to_end(&mut bytes))
        .map_err(HomeError::io(path))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_opens_with_its_own_slot_only() {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        let id = Uuid::from_bytes([7; 16]);
        let (kek, other, root) = (
            SecretKey::generate().unwrap(),
            SecretKey::generate().unwrap(),
            SecretKey::generate().unwrap(),
        );
        let slot = FileRootSlot::create(&path("slot"), id, 1, &kek).unwrap();
        let stranger = FileRootSlot::create(&path("stranger"), id, 1, &other).unwrap();
        seal_root(&path("root"), (id, 1), &kek, &root).unwrap();
        assert_eq!(open_root(&path("root"), &slot).unwrap().expose(), root.expose());
        assert!(matches!(
            open_root(&path("root"), &stranger),
            Err(SlotError::Mismatch(_))
        ));
        assert!(matches!(
            FileRootSlot::open(&path("slot"), 2),
            Err(SlotError::Format(_))
        ));

        let bytes = std::fs::read(path("root")).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            std::fs::write(path("flipped"), flipped).unwrap();
            assert!(open_root(&path("flipped"), &slot).is_err(), "byte {at}");
        }
    }
}
