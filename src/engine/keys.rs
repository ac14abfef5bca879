//! What the keys of a domain and of a file do: seal records, hide names, seal blocks.

use super::error::{Error, Result};
use super::format::codec::Writer;
use super::format::dirent::CHAIN_BITS;
use super::format::rowkey::{Family, Table};
use super::format::rowsum::{RowSum, Term};
use super::format::seal::Seal;
use super::format::superblock::Version;
use super::types::{Domain, Ino};
use kms_crypto::{
    Batch, CryptoError, KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Prf, Sealer, SecretKey, derive,
};

/// Prefix of all authenticated data: product, format version, and what is sealed.
const RECORD: &[u8; 8] = b"cmkfs\x01r\x01";
const BLOCK: &[u8; 8] = b"cmkfs\x01b\x01";
/// What an anchor's MAC is of, among what the root key is for.
const ANCHOR: &[u8; 6] = b"anchor";
const SEAL_FILE: &[u8; 8] = b"cmkfs\x01s\x01";

/// The keys of one domain, derived from its volume key, which is dropped once they are.
pub(crate) struct DomainKeys {
    volume: [u8; 16],
    domain: Domain,
    records: Sealer,
    names: Prf,
    /// None in volumes of a format without roots.
    roots: Option<Prf>,
    nonces: NonceSource,
}

/// A file's content key. The DEK it is derived from encrypts nothing and is not kept.
pub(crate) struct FileKey {
    volume: [u8; 16],
    ino: Ino,
    sealer: Sealer,
}

/// The same with its key schedule, for one thread and a few blocks; wiped on drop.
pub(crate) struct BlockKey<'k> {
    file: &'k FileKey,
    batch: Batch<'k>,
}

impl DomainKeys {
    pub(crate) fn new(vk: &SecretKey, volume: [u8; 16], version: Version, domain: Domain) -> Result<Self> {
        let roots = || {
            Prf::new(derive(
                vk,
                KeySalt(&volume),
                Label::VolumeRoots { domain: domain.0 },
            ))
        };
        let salt = KeySalt(&volume);
        Ok(Self {
            volume,
            domain,
            records: Sealer::new(derive(vk, salt, Label::VolumeRecords { domain: domain.0 })),
            names: Prf::new(derive(vk, salt, Label::VolumeNames { domain: domain.0 })),
            roots: version.has_roots().then(roots),
            nonces: NonceSource::new().map_err(|error| crypto_failure(&error))?,
        })
    }

    pub(crate) fn domain(&self) -> Domain {
        self.domain
    }

    /// Seals a row: nonce, tag, ciphertext. Family and key are authenticated, so a row opens in its place only.
    pub(crate) fn seal_row(&self, family: Family, key: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
        self.seal(&self.row_aad(family, key), plain)
    }

    pub(crate) fn open_row(&self, family: Family, key: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        self.open(&self.row_aad(family, key), sealed)
    }

    pub(crate) fn seal_file(&self, plain: &[u8]) -> Result<Vec<u8>> {
        self.seal(&self.prefix(SEAL_FILE, 0), plain)
    }

    pub(crate) fn open_seal_file(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        self.open(&self.prefix(SEAL_FILE, 0), sealed)
    }

    /// Takes a row of the family `meta` out of the sum that covers it, and puts in what takes its place.
    pub(crate) fn replace_in(&self, sum: &mut RowSum, key: &[u8], old: Option<&Seal>, new: Option<&Seal>) {
        if let Some(term) = old.and_then(|old| self.term(key, old)) {
            sum.remove(term);
        }
        if let Some(term) = new.and_then(|new| self.term(key, new)) {
            sum.add(term);
        }
    }

    /// What a row of the family `meta` adds to the sum that covers it; none where there are no sums.
    pub(crate) fn term(&self, key: &[u8], seal: &Seal) -> Option<Term> {
        let length = u16::try_from(key.len()).unwrap_or(u16::MAX).to_be_bytes();
        let family = [Family::Meta as u8];
        let parts: [&[u8]; 5] = [&family, &length, key, &seal.nonce.0, &seal.tag.0];
        self.roots.as_ref().map(|roots| Term(roots.of(&parts)))
    }

    /// What stands for a root in the KMS, which is to learn nothing of it. Rows begin with another byte.
    pub(crate) fn anchor_mac(&self, commit_seq: u64, sum: &RowSum) -> Option<[u8; 32]> {
        let mut plain = Writer::with_capacity(54);
        plain.bytes(ANCHOR).u64(commit_seq);
        sum.write(&mut plain);
        self.roots.as_ref().map(|roots| roots.of(&[&plain.finish()]))
    }

    /// Whether rows are summed up.
    pub(crate) fn has_roots(&self) -> bool {
        self.roots.is_some()
    }

    fn seal(&self, aad: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
        let nonce = self.nonce()?;
        let mut out = vec![0; Seal::LENGTH + plain.len()];
        let (head, body) = out.split_at_mut(Seal::LENGTH);
        body.copy_from_slice(plain);
        let tag = self
            .records
            .seal(nonce, aad, body)
            .map_err(|error| crypto_failure(&error))?;
        let (nonce_place, tag_place) = head.split_at_mut(NONCE_LEN);
        nonce_place.copy_from_slice(&nonce.0);
        tag_place.copy_from_slice(&tag.0);
        Ok(out)
    }

    fn open(&self, aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (Seal { nonce, tag }, body) = Seal::split_row(sealed)?;
        let mut plain = body.to_vec();
        self.records.open(nonce, aad, &mut plain, tag).ok()?;
        Some(plain)
    }

    fn prefix(&self, purpose: &[u8; 8], spare: usize) -> Vec<u8> {
        let mut aad = Vec::with_capacity(26 + spare);
        aad.extend_from_slice(purpose);
        aad.extend_from_slice(&self.volume);
        aad.extend_from_slice(&self.domain.0.to_be_bytes());
        aad
    }

    fn row_aad(&self, family: Family, key: &[u8]) -> Vec<u8> {
        let mut aad = self.prefix(RECORD, 1 + key.len());
        aad.push(family as u8);
        aad.extend_from_slice(key);
        aad
    }

    /// A nonce for a record or a block of this domain.
    pub(crate) fn nonce(&self) -> Result<Nonce> {
        self.nonces.next().map_err(|error| crypto_failure(&error))
    }

    /// The first place of a name's chain: 56 bits of HMAC-SHA-256, never 0, above the index bits.
    pub(crate) fn first_place(&self, table: Table, ino: Ino, name: &[u8]) -> Result<u64> {
        let digest = self.names.of(&[&[table as u8], &ino.0.to_be_bytes(), name]);
        let prf = digest
            .first_chunk::<8>()
            .map_or(1, |bytes| u64::from_be_bytes(*bytes) >> 8);
        Ok(prf.max(1) << CHAIN_BITS)
    }
}

impl FileKey {
    pub(crate) fn new(dek: &SecretKey, volume: [u8; 16], ino: Ino) -> Self {
        let label = Label::FileContent {
            domain: ino.domain().0,
        };
        Self {
            volume,
            ino,
            sealer: Sealer::new(derive(dek, KeySalt(&volume), label)),
        }
    }

    /// For the blocks of one request.
    pub(crate) fn blocks(&self) -> BlockKey<'_> {
        BlockKey {
            file: self,
            batch: self.sealer.batch(),
        }
    }

    fn aad(&self, block: u64, length: usize) -> [u8; 44] {
        let mut aad = [0; 44];
        let fields: [&[u8]; 6] = [
            BLOCK,
            &self.volume,
            &self.ino.domain().0.to_be_bytes(),
            &self.ino.0.to_be_bytes(),
            &block.to_be_bytes(),
            &u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes(),
        ];
        let mut rest = aad.as_mut_slice();
        for field in fields {
            let Some((place, tail)) = rest.split_at_mut_checked(field.len()) else {
                break;
            };
            place.copy_from_slice(field);
            rest = tail;
        }
        aad
    }
}

impl BlockKey<'_> {
    /// Seals a block in place. A full block has the same form in a slot and inline, so that draining needs no key.
    pub(crate) fn seal(&self, nonce: Nonce, block: u64, data: &mut [u8]) -> Result<Seal> {
        let aad = self.file.aad(block, data.len());
        let tag = self
            .batch
            .seal(nonce, &aad, data)
            .map_err(|error| crypto_failure(&error))?;
        Ok(Seal { nonce, tag })
    }

    /// Opens a block in place; on failure its bytes are zeroed.
    pub(crate) fn open(&self, seal: Seal, block: u64, data: &mut [u8]) -> Result<()> {
        let aad = self.file.aad(block, data.len());
        self.batch
            .open(seal.nonce, &aad, data, seal.tag)
            .map_err(|_| Error::Corrupt {
                what: format!("block {block} of inode {}", self.file.ino.0),
            })
    }
}

fn crypto_failure(error: &CryptoError) -> Error {
    Error::Storage {
        errno: libc::EIO,
        message: error.to_string(),
    }
}
