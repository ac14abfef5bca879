//! The encryption context: names and values that Decrypt must repeat exactly.

use crate::KmsError;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Bytes of a context in canonical form, at most.
pub const CONTEXT_BYTES_MAX: usize = 8 << 10;

/// What is authenticated together with a ciphertext blob: an ordered map, at most [`CONTEXT_BYTES_MAX`] long in
/// its canonical form. Not secret; it appears in the audit log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncryptionContext(BTreeMap<String, String>);

impl EncryptionContext {
    /// A context of `entries`.
    ///
    /// # Errors
    /// `InvalidParameter` past [`CONTEXT_BYTES_MAX`], or if a name is empty.
    pub fn new(entries: BTreeMap<String, String>) -> Result<Self, KmsError> {
        if entries.contains_key("") {
            return Err(KmsError::invalid("EncryptionContext", "has an empty name"));
        }
        let context = Self(entries);
        if context.canonical().len() > CONTEXT_BYTES_MAX {
            return Err(KmsError::invalid(
                "EncryptionContext",
                "is longer than 8192 bytes",
            ));
        }
        Ok(context)
    }

    /// The context of the volume key of one key domain, bound to the superblock that names it.
    #[must_use]
    pub fn volume_key(volume: [u8; 16], domain: u16, superblock_hash: [u8; 32]) -> Self {
        Self::of([
            ("purpose", "vk".to_owned()),
            ("volume", hex(&volume)),
            ("domain", domain.to_string()),
            ("superblock", hex(&superblock_hash)),
        ])
    }

    /// The context of the data key of one file.
    #[must_use]
    pub fn data_key(volume: [u8; 16], domain: u16, inode: u64) -> Self {
        Self::of([
            ("purpose", "dek".to_owned()),
            ("volume", hex(&volume)),
            ("domain", domain.to_string()),
            ("inode", inode.to_string()),
        ])
    }

    /// Whether this is a context of the filesystem, whose plaintext leaves kmsd inside a session only.
    #[must_use]
    pub fn is_filesystem(&self) -> bool {
        matches!(self.0.get("purpose").map(String::as_str), Some("vk" | "dek"))
    }

    /// The one byte string of this context: each name and value in the order of the names' bytes, each behind its
    /// length as a 32-bit big-endian number, so that no two contexts share a form.
    #[must_use]
    pub fn canonical(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            // A context past 4 GiB cannot arrive in a message of 4 MiB, and is refused by `new` before it is sealed.
            let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    /// The entries, as the wire has them.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<String, String> {
        &self.0
    }
    fn of<const N: usize>(entries: [(&str, String); N]) -> Self {
        Self(
            entries
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(entries: &[(&str, &str)]) -> EncryptionContext {
        let entries = entries
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        EncryptionContext::new(entries.collect()).unwrap()
    }

    #[test]
    fn no_two_contexts_share_a_canonical_form() {
        let forms = [
            context(&[]),
            context(&[("a", "bc")]),
            context(&[("ab", "c")]),
            context(&[("a", ""), ("b", "c")]),
            context(&[("a", "b"), ("c", "")]),
            context(&[("A", "bc")]),
        ]
        .map(|context| context.canonical());
        for (at, form) in forms.iter().enumerate() {
            assert_eq!(forms.iter().position(|other| other == form), Some(at));
        }
    }

    #[test]
    fn the_limit_counts_lengths_and_names() {
        let fits = "x".repeat(CONTEXT_BYTES_MAX - 9);
        context(&[("n", &fits)]);
        let entries = BTreeMap::from([("n".to_owned(), fits + "x")]);
        assert!(EncryptionContext::new(entries).is_err());
    }

    #[test]
    fn filesystem_contexts_are_known_by_their_purpose() {
        assert!(EncryptionContext::volume_key([1; 16], 0, [2; 32]).is_filesystem());
        assert!(EncryptionContext::data_key([1; 16], 0, 7).is_filesystem());
        assert!(!context(&[("purpose", "backup")]).is_filesystem());
        assert!(!context(&[("dek", "purpose")]).is_filesystem());
    }
}
