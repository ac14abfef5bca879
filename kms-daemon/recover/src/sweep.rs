//! Every position of every file, without regard to any structure: what a database no longer names may lie in its files.

/// What begins a slot and a sealed root key (docs/kms-format.md).
const SLOT_MAGIC: &[u8] = b"kmsdslot";
const ROOT_MAGIC: &[u8] = b"kmsdroot";
/// Up to the end of the key-encryption key of a file slot.
pub(crate) const SLOT_BYTES: usize = 66;
/// Up to the end of the root key's tag.
pub(crate) const ROOT_BYTES: usize = 93;
/// Format, nonce, 32 bytes, tag.
pub(crate) const MATERIAL_BYTES: usize = 1 + 12 + 32 + 16;
const FORMAT: u8 = 1;

fn at_magic<'f>(bytes: &'f [u8], magic: &'f [u8], length: usize) -> impl Iterator<Item = &'f [u8]> {
    bytes
        .windows(length)
        .filter(move |window| window.starts_with(magic))
}

/// Wherever a root slot may begin.
pub(crate) fn slots(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    at_magic(bytes, SLOT_MAGIC, SLOT_BYTES)
}

/// Wherever a sealed root key may begin.
pub(crate) fn roots(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    at_magic(bytes, ROOT_MAGIC, ROOT_BYTES)
}

/// Wherever a byte says that a sealed value of this format may begin.
pub(crate) fn materials(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes
        .windows(MATERIAL_BYTES)
        .filter(|window| window.first() == Some(&FORMAT))
}
