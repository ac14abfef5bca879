//! What seals, names and counts the rows of one epoch: everything that is derived from its root key.

use crate::store::{RowSet, StoreError, Table, length_prefixed};
use kms_crypto::{
    CryptoError, KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Prf, Sealer, SecretKey, TAG_LEN, Tag, derive,
};
use uuid::Uuid;
use zeroize::Zeroizing;

const FORMAT: u8 = 1;
const EPOCH_LEN: usize = 8;

/// The keys of one epoch's rows, wiped on drop.
pub struct EpochKeys {
    keystore_id: Uuid,
    epoch: u64,
    metadata: Sealer,
    material: Sealer,
    names: Prf,
    row_set: Prf,
    nonces: NonceSource,
}

impl EpochKeys {
    /// Derives them from the epoch's root key, which the caller may drop at once.
    ///
    /// # Errors
    /// [`CryptoError::Randomness`]
    pub fn derive(root: &SecretKey, keystore_id: Uuid, epoch: u64) -> Result<Self, CryptoError> {
        let key = |label| derive(root, KeySalt(keystore_id.as_bytes()), label);
        Ok(Self {
            keystore_id,
            epoch,
            metadata: Sealer::new(key(Label::KeystoreMetadata)),
            material: Sealer::new(key(Label::KeystoreMaterial)),
            names: Prf::new(key(Label::KeystoreNames)),
            row_set: Prf::new(key(Label::KeystoreRowSet)),
            nonces: NonceSource::new()?,
        })
    }

    /// The keystore that the rows belong to.
    #[must_use]
    pub fn keystore_id(&self) -> Uuid {
        self.keystore_id
    }

    /// The epoch that the rows belong to.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A row key that says nothing about `name` to whoever lacks the root key.
    #[must_use]
    pub fn hidden_name(&self, name: &str) -> Vec<u8> {
        self.names.of(&[name.as_bytes()]).to_vec()
    }

    /// What the keys of this epoch's rows begin with.
    #[must_use]
    pub fn prefix(&self) -> [u8; EPOCH_LEN] {
        self.epoch.to_be_bytes()
    }

    /// A row's key as the database has it.
    #[must_use]
    pub fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix(), key].concat()
    }

    /// A row's key as its table knows it.
    #[must_use]
    pub fn short_key(full_key: &[u8]) -> &[u8] {
        full_key.get(EPOCH_LEN..).unwrap_or_default()
    }

    /// A row's value as the database has it.
    ///
    /// # Errors
    /// [`StoreError::Crypto`]
    pub fn seal(&self, table: Table, full_key: &[u8], plain: &[u8]) -> Result<Vec<u8>, StoreError> {
        let nonce = self.nonces.next()?;
        let mut value = Vec::with_capacity(1 + NONCE_LEN + plain.len() + TAG_LEN);
        value.push(FORMAT);
        value.extend_from_slice(&nonce.0);
        let mut text = Zeroizing::new(plain.to_vec());
        let tag = self
            .sealer(table)
            .seal(nonce, &self.aad(table, full_key), &mut text)?;
        value.extend_from_slice(&text);
        value.extend_from_slice(&tag.0);
        Ok(value)
    }

    /// The value of a row of this epoch, opened.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if it is not what was sealed there.
    pub fn unseal(
        &self,
        table: Table,
        full_key: &[u8],
        value: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        let damaged = || StoreError::Damaged(table.name());
        let (&[FORMAT], rest) = value.split_first_chunk::<1>().ok_or_else(damaged)? else {
            return Err(damaged());
        };
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(damaged)?;
        let (text, tag) = rest.split_last_chunk::<TAG_LEN>().ok_or_else(damaged)?;
        let mut plain = Zeroizing::new(text.to_vec());
        self.sealer(table)
            .open(Nonce(*nonce), &self.aad(table, full_key), &mut plain, Tag(*tag))
            .map_err(|_| damaged())?;
        Ok(plain)
    }

    /// What a row adds to the row set.
    #[must_use]
    pub fn element(&self, table: Table, full_key: &[u8], value: &[u8]) -> RowSet {
        let row = length_prefixed(&[table.name().as_bytes(), full_key, value]);
        RowSet(self.row_set.of(&[&row]))
    }

    fn sealer(&self, table: Table) -> &Sealer {
        match table {
            Table::Material => &self.material,
            Table::Manifest
            | Table::Keys
            | Table::Aliases
            | Table::PendingAudit
            | Table::Holders
            | Table::Dependants
            | Table::Anchors => &self.metadata,
        }
    }

    fn aad(&self, table: Table, full_key: &[u8]) -> Vec<u8> {
        length_prefixed(&[self.keystore_id.as_bytes(), table.name().as_bytes(), full_key])
    }
}
