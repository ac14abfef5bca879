//! What the drill writes and looks for: content and names that follow from a challenge nonce alone, so that a verifier who
//! chose the nonce knows that they were made for this drill, and can compute them anew.

use hkdf::Hkdf;
use sha2::{Digest, Sha256};

/// Bytes of one block of content.
pub const BLOCK: usize = 4096;
const BLOCK_BYTES: u64 = BLOCK as u64;
/// Extract salt of RFC 5869, section 2.2.
const SALT: &[u8] = b"cmkfs-drill/1";
/// Apparent length of the sparse file.
const SPARSE_BLOCKS: u64 = 16_384;
/// The sparse file has one island in so many blocks.
const SPARSE_STEP: u64 = 1024;
/// Blocks of an island.
const SPARSE_ISLAND: u64 = 2;
/// Length of the small file: no whole block.
const SMALL_BYTES: u64 = 777;
/// Blocks of the files that are mapped, or held open.
const MIDDLE_BLOCKS: u64 = 256;

/// The challenge: 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce([u8; 32]);

impl Nonce {
    /// Reads 64 hexadecimal digits.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| {
            format!("--nonce {text}: it takes 64 hexadecimal digits, drawn by whoever verifies")
        })?;
        Ok(Self(bytes))
    }

    /// Draws one.
    ///
    /// # Errors
    /// getrandom(2) gave nothing.
    pub fn draw() -> Result<Self, String> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|error| format!("no random bytes: {error}"))?;
        Ok(Self(bytes))
    }

    /// As hexadecimal digits.
    #[must_use]
    pub fn text(&self) -> String {
        hex::encode(self.0)
    }
}

/// A kind of file, each written and read in a way of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Part of a block.
    Small,
    /// As large as was asked for.
    Large,
    /// Islands in a sea of holes.
    Sparse,
    /// Written through a shared mapping.
    Mapped,
    /// Written through a handle that stays open.
    Open,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Small, Self::Large, Self::Sparse, Self::Mapped, Self::Open];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
            Self::Sparse => "sparse",
            Self::Mapped => "mapped",
            Self::Open => "open",
        }
    }
}

/// Everything that is written, computed from the nonce.
#[derive(Debug, Clone)]
pub struct Markers {
    nonce: Nonce,
    large_blocks: u64,
}

/// One file as it must be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// In bytes.
    pub length: u64,
    /// SHA-256 of its content, holes as zeros.
    pub sha256: String,
}

impl Markers {
    /// Those of a nonce, with a large file of so many bytes, rounded up to blocks.
    #[must_use]
    pub fn new(nonce: Nonce, large_bytes: u64) -> Self {
        Self {
            nonce,
            large_blocks: large_bytes.div_ceil(BLOCK_BYTES).max(1),
        }
    }

    /// The challenge.
    #[must_use]
    pub const fn nonce(&self) -> Nonce {
        self.nonce
    }

    /// Bytes of the large file.
    #[must_use]
    pub const fn large_bytes(&self) -> u64 {
        self.large_blocks * BLOCK_BYTES
    }

    /// HKDF-SHA-256 of the nonce: `info` is "cmkfs-drill/1/", the purpose, "/", and a 64-bit number.
    fn expand(&self, purpose: &str, number: u64, out: &mut [u8]) {
        let info = [
            b"cmkfs-drill/1/".as_slice(),
            purpose.as_bytes(),
            b"/",
            &number.to_be_bytes(),
        ]
        .concat();
        // At most 4096 bytes are asked for, which is within the bound of RFC 5869 (8160): it cannot refuse.
        let _infallible = Hkdf::<Sha256>::new(Some(SALT), &self.nonce.0).expand(&info, out);
    }

    fn text(&self, purpose: &str, number: u64) -> String {
        let mut bytes = [0; 16];
        self.expand(purpose, number, &mut bytes);
        hex::encode(bytes)
    }

    /// The name of a file.
    #[must_use]
    pub fn name(&self, kind: Kind) -> String {
        format!("{}-{}", kind.name(), self.text("name", kind as u64))
    }

    /// The name of the symbolic link.
    #[must_use]
    pub fn link(&self) -> String {
        format!("link-{}", self.text("link", 0))
    }

    /// What the symbolic link says.
    #[must_use]
    pub fn target(&self) -> String {
        format!("nowhere/{}", self.text("target", 0))
    }

    /// The value of the attribute `user.drill` of the small file.
    #[must_use]
    pub fn attribute(&self) -> String {
        self.text("attribute", 0)
    }

    /// Every name and text, for whoever looks for them.
    #[must_use]
    pub fn texts(&self) -> Vec<(String, String)> {
        let mut texts: Vec<_> = Kind::ALL
            .iter()
            .map(|kind| (format!("name of the {} file", kind.name()), self.name(*kind)))
            .collect();
        texts.push(("name of the link".to_owned(), self.link()));
        texts.push(("target of the link".to_owned(), self.target()));
        texts.push(("value of the attribute".to_owned(), self.attribute()));
        texts
    }

    /// The length of a file, in bytes.
    #[must_use]
    pub const fn length(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Small => SMALL_BYTES,
            Kind::Large => self.large_blocks * BLOCK_BYTES,
            Kind::Sparse => SPARSE_BLOCKS * BLOCK_BYTES,
            Kind::Mapped | Kind::Open => MIDDLE_BLOCKS * BLOCK_BYTES,
        }
    }

    /// Whether a block of a file is no hole.
    #[must_use]
    pub const fn is_data(kind: Kind, block: u64) -> bool {
        !matches!(kind, Kind::Sparse) || block % SPARSE_STEP < SPARSE_ISLAND
    }

    /// The blocks of a file that are no holes.
    pub fn blocks(&self, kind: Kind) -> impl Iterator<Item = u64> + use<> {
        let count = self.length(kind).div_ceil(BLOCK_BYTES);
        (0..count).filter(move |block| Self::is_data(kind, *block))
    }

    /// What a block of a file holds; the last one may be shorter.
    #[must_use]
    pub fn block(&self, kind: Kind, block: u64) -> Vec<u8> {
        let left = self.length(kind).saturating_sub(block * BLOCK_BYTES);
        let mut bytes = vec![0; usize::try_from(left).unwrap_or(BLOCK).min(BLOCK)];
        if Self::is_data(kind, block) {
            self.expand(kind.name(), block, &mut bytes);
        }
        bytes
    }

    /// A file as it must be read.
    #[must_use]
    pub fn expected(&self, kind: Kind) -> Expected {
        let mut hash = Sha256::new();
        for block in 0..self.length(kind).div_ceil(BLOCK_BYTES) {
            hash.update(self.block(kind, block));
        }
        Expected {
            kind,
            name: self.name(kind),
            length: self.length(kind),
            sha256: hex::encode(hash.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_follow_from_the_nonce_alone_and_differ_everywhere() {
        let nonce = Nonce::parse(&"5a".repeat(32)).unwrap();
        let (one, again) = (Markers::new(nonce, 1 << 16), Markers::new(nonce, 1 << 16));
        let other = Markers::new(Nonce::parse(&"5b".repeat(32)).unwrap(), 1 << 16);
        for kind in Kind::ALL {
            assert_eq!(one.expected(kind), again.expected(kind));
            assert_ne!(one.expected(kind).sha256, other.expected(kind).sha256);
            assert_ne!(one.name(kind), other.name(kind));
        }
        assert_ne!(one.block(Kind::Large, 0), one.block(Kind::Large, 1));
        assert_ne!(one.block(Kind::Large, 0), one.block(Kind::Open, 0));
        assert_eq!(one.block(Kind::Sparse, 5), vec![0; BLOCK]);
        assert_eq!(one.block(Kind::Small, 0).len(), 777);
    }

    #[test]
    fn a_nonce_that_is_none_is_refused() {
        for bad in ["", "5a", &"5g".repeat(32), &"5a".repeat(33)] {
            assert!(Nonce::parse(bad).is_err(), "{bad}");
        }
    }
}
