//! A slot that is a file beside the database: convenient, and worth nothing as an erasure.

use super::{Erasure, RootSlot, SLOT_HEADER_LEN, SlotError, SlotKind, keystore_of, read_small, slot_header};
use crate::home::write_new;
use kms_crypto::{KEY_LEN, SecretKey};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use zeroize::Zeroizing;

/// A KEK in a file.
pub struct FileRootSlot {
    path: PathBuf,
    keystore_id: Uuid,
    epoch: u64,
}

impl FileRootSlot {
    /// Writes a slot with this KEK, durable when this returns.
    ///
    /// # Errors
    /// [`SlotError`]
    pub fn create(path: &Path, keystore_id: Uuid, epoch: u64, kek: &SecretKey) -> Result<Self, SlotError> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(SLOT_HEADER_LEN + KEY_LEN));
        bytes.extend_from_slice(&slot_header(SlotKind::File, keystore_id, epoch));
        bytes.extend_from_slice(kek.expose());
        write_new(path, &bytes)?;
        Ok(Self {
            path: path.to_owned(),
            keystore_id,
            epoch,
        })
    }

    /// Finds a slot; its KEK is read by [`RootSlot::kek`] alone.
    ///
    /// # Errors
    /// [`SlotError::Format`] if it is not the slot of `epoch`.
    pub fn open(path: &Path, epoch: u64) -> Result<Self, SlotError> {
        let bytes = read_small(path)?;
        let format = || SlotError::Format(path.to_owned());
        let (header, kek) = bytes.split_first_chunk::<SLOT_HEADER_LEN>().ok_or_else(format)?;
        let keystore_id = keystore_of(header, SlotKind::File, epoch).ok_or_else(format)?;
        if kek.len() != KEY_LEN {
            return Err(format());
        }
        Ok(Self {
            path: path.to_owned(),
            keystore_id,
            epoch,
        })
    }
}

impl RootSlot for FileRootSlot {
    fn erasure(&self) -> Erasure {
        SlotKind::File.erasure()
    }

    fn keystore_id(&self) -> Uuid {
        self.keystore_id
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn kek(&self) -> Result<SecretKey, SlotError> {
        let bytes = read_small(&self.path)?;
        let format = || SlotError::Format(self.path.clone());
        let kek = bytes.get(SLOT_HEADER_LEN..).ok_or_else(format)?;
        SecretKey::fill_with(|out| {
            *out = kek.try_into().map_err(|_| format())?;
            Ok(())
        })
    }
}
