//! From slots to the material of customer master keys (docs/kms-format.md).

use crate::crypto::{Key, NONCE, TAG, derive, key, length_prefixed, open};
use crate::read::{Bytes, Copy, Database};
use crate::sweep;
use secret_search::Form;
use std::collections::{BTreeMap, BTreeSet};

const SLOT_OF_FILE: u8 = 1;

/// How often something was tried.
#[derive(Debug, Default, Clone, Copy)]
pub struct Attempts {
    /// Key-encryption keys on sealed root keys.
    pub roots: u64,
    /// Root keys on rows of the database.
    pub rows: u64,
    /// Root keys on positions in files.
    pub positions: u64,
    /// Material on wrapped keys.
    pub blobs: u64,
}

/// The material of one version of a key.
pub struct Material {
    pub(crate) id: [u8; 16],
    pub(crate) version: [u8; 16],
    pub(crate) bytes: Key,
    /// In a row of a database, or at a position of a file alone.
    pub found_in: &'static str,
}

impl Material {
    /// The key's id, as hexadecimal digits.
    #[must_use]
    pub fn key_id(&self) -> String {
        hex::encode(self.id)
    }

    /// The version's id, as hexadecimal digits.
    #[must_use]
    pub fn version_id(&self) -> String {
        hex::encode(self.version)
    }
}

impl std::fmt::Debug for Material {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Material of {}", self.key_id())
    }
}

/// What could be opened.
#[derive(Debug, Default)]
pub struct Opened {
    /// Epochs of the slots that were found: a file's, or any position's.
    pub slots: BTreeSet<u64>,
    /// Slots of a kind that this program does not open.
    pub other_slots: u64,
    /// Epochs of the sealed root keys that were found.
    pub roots: BTreeSet<u64>,
    /// Epochs of those that were opened.
    pub opened_roots: BTreeSet<u64>,
    /// Keys and versions that rows or volumes name, whether opened or not, with their epochs.
    pub named: u64,
    /// What was recovered.
    pub materials: Vec<Material>,
    /// Databases that could be read.
    pub databases: u64,
    /// What was tried.
    pub attempts: Attempts,
    pub(crate) forms: Vec<Form>,
}

struct Root {
    keystore: [u8; 16],
    epoch: u64,
    key: Key,
}

/// Numbers behind the first bytes.
fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Opens whatever opens. `named` are the keys and versions that volumes name in the clear.
pub(crate) fn open_keystores(copies: &[Copy], slots: &[Bytes], named: &[([u8; 16], [u8; 16])]) -> Opened {
    let mut opened = Opened::default();
    let files = || copies.iter().flat_map(|copy| &copy.files).chain(slots);
    let mut keks: Vec<Key> = Vec::new();
    for candidate in files().flat_map(|file| sweep::slots(&file.bytes)) {
        let (Some(kind), Some(epoch)) = (candidate.get(9), number(candidate, 26)) else {
            continue;
        };
        if *kind != SLOT_OF_FILE {
            opened.other_slots += 1;
            continue;
        }
        opened.slots.insert(epoch);
        let kek = candidate.get(34..66).and_then(key);
        keks.extend(kek.filter(|kek| !keks.contains(kek)));
    }
    let mut roots: Vec<Root> = Vec::new();
    for candidate in files().flat_map(|file| sweep::roots(&file.bytes)) {
        open_root(candidate, &keks, &mut roots, &mut opened);
    }
    for root in &roots {
        crate::add_forms(
            &mut opened.forms,
            &format!("root key of epoch {}", root.epoch),
            &root.key,
        );
    }
    for (number, kek) in keks.iter().enumerate() {
        crate::add_forms(&mut opened.forms, &format!("slot key {number}"), kek);
    }
    materials(copies, &roots, named, &mut opened);
    opened
}

fn open_root(bytes: &[u8], keks: &[Key], roots: &mut Vec<Root>, opened: &mut Opened) {
    let fields = (|| {
        let (header, rest) = bytes.split_at_checked(33)?;
        let (nonce, rest) = rest.split_at_checked(NONCE)?;
        let (sealed, tag) = rest.split_at_checked(32)?;
        Some((header, nonce, sealed, tag))
    })();
    let Some((header, nonce, sealed, tag)) = fields else {
        return;
    };
    let keystore: Option<[u8; 16]> = header.get(9..25).and_then(|id| id.try_into().ok());
    let (Some(keystore), Some(epoch)) = (keystore, number(header, 25)) else {
        return;
    };
    opened.roots.insert(epoch);
    for kek in keks {
        opened.attempts.roots += 1;
        let sealer = derive(kek, &keystore, "kmsd/1/root");
        let Some(root) = open(&sealer, nonce, header, sealed, tag).and_then(|root| key(&root)) else {
            continue;
        };
        opened.opened_roots.insert(epoch);
        if !roots.iter().any(|known| *known.key == *root) {
            roots.push(Root {
                keystore,
                epoch,
                key: root,
            });
        }
    }
}

/// A row key of the family `material`: epoch, key, version.
type RowKey = Vec<u8>;

fn materials(copies: &[Copy], roots: &[Root], named: &[([u8; 16], [u8; 16])], opened: &mut Opened) {
    let mut found: BTreeMap<([u8; 16], [u8; 16]), Material> = BTreeMap::new();
    let sealers: Vec<_> = roots
        .iter()
        .map(|root| (root, derive(&root.key, &root.keystore, "kmsd/1/material")))
        .collect();
    let mut row_keys: BTreeSet<RowKey> = BTreeSet::new();
    // What volumes name may be of any epoch that there is a root of.
    for (id, version) in named {
        for epoch in &opened.roots {
            row_keys.insert([&epoch.to_be_bytes()[..], id, version].concat());
        }
    }
    let mut rows = Vec::new();
    for copy in copies {
        if let Some(database) = Database::open(&copy.dir.join("db")) {
            opened.databases += 1;
            rows.extend(database.rows("material"));
        }
    }
    for (row_key, value) in &rows {
        row_keys.insert(row_key.to_vec());
        for (root, sealer) in &sealers {
            opened.attempts.rows += 1;
            note(&mut found, open_row(root, sealer, row_key, value), row_key, "row");
        }
    }
    opened.named = row_keys.len() as u64;
    for bytes in copies.iter().flat_map(|copy| &copy.files).map(|file| &file.bytes) {
        for value in sweep::materials(bytes) {
            for (root, sealer) in &sealers {
                // A root opens rows of its own epoch alone: that number is authenticated.
                let own = row_keys
                    .iter()
                    .filter(|row_key| row_key.starts_with(&root.epoch.to_be_bytes()));
                for row_key in own {
                    opened.attempts.positions += 1;
                    note(
                        &mut found,
                        open_row(root, sealer, row_key, value),
                        row_key,
                        "position",
                    );
                }
            }
        }
    }
    for material in found.values() {
        let name = format!("material of {}", material.key_id());
        crate::add_forms(&mut opened.forms, &name, &material.bytes);
    }
    opened.materials.extend(found.into_values());
}

fn open_row(root: &Root, sealer: &Key, row_key: &[u8], value: &[u8]) -> Option<Key> {
    let (format, rest) = value.split_first()?;
    let (nonce, rest) = rest.split_at_checked(NONCE)?;
    let (sealed, tag) = rest.split_at_checked(rest.len().checked_sub(TAG)?)?;
    if *format != 1 {
        return None;
    }
    let aad = length_prefixed(&[&root.keystore, b"material", row_key]);
    key(&open(sealer, nonce, &aad, sealed, tag)?)
}

fn note(
    found: &mut BTreeMap<([u8; 16], [u8; 16]), Material>,
    bytes: Option<Key>,
    row_key: &[u8],
    found_in: &'static str,
) {
    let ids = (|| {
        let id = row_key.get(8..24)?.try_into().ok()?;
        Some((id, row_key.get(24..40)?.try_into().ok()?))
    })();
    if let (Some(bytes), Some((id, version))) = (bytes, ids) {
        found.entry((id, version)).or_insert(Material {
            id,
            version,
            bytes,
            found_in,
        });
    }
}

impl Opened {
    /// Opens a wrapped key with whatever material there is.
    pub(crate) fn unwrap_key(&mut self, blob: &[u8], context: &[(&str, String)]) -> Option<Key> {
        let (head, random, sealed) = blob_parts(blob)?;
        let mut canonical = Vec::new();
        let mut entries = context.to_vec();
        entries.sort_by(|one, other| one.0.cmp(other.0));
        for (name, value) in &entries {
            canonical.extend(length_prefixed(&[name.as_bytes(), value.as_bytes()]));
        }
        let aad = length_prefixed(&[head, &canonical]);
        let (text, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG)?)?;
        for material in &self.materials {
            self.attempts.blobs += 1;
            let sealer = derive(&material.bytes, random, "kmsd/1/blob");
            if let Some(plain) = open_blob(&sealer, &aad, text, tag) {
                return Some(plain);
            }
        }
        None
    }
}

fn open_blob(sealer: &Key, aad: &[u8], text: &[u8], tag: &[u8]) -> Option<Key> {
    key(&open(sealer, &[0; NONCE], aad, text, tag)?)
}

/// Everything before the ciphertext, the random, the ciphertext.
fn blob_parts(blob: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let region = usize::from(*blob.get(1)?);
    let (head, sealed) = blob.split_at_checked(2 + region + 48)?;
    if *head.first()? != 1 {
        return None;
    }
    Some((head, head.get(2 + region + 32..)?, sealed))
}

/// The key and the version that a blob names in the clear.
pub(crate) fn wrapping_key(blob: &[u8]) -> Option<([u8; 16], [u8; 16])> {
    let (head, ..) = blob_parts(blob)?;
    let ids = head.get(2 + usize::from(*head.get(1)?)..)?;
    Some((ids.get(..16)?.try_into().ok()?, ids.get(16..32)?.try_into().ok()?))
}
