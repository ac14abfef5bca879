//! Ed25519 (RFC 8032): the key that signs a report, and the one that a verifier pinned.

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

const PRIVATE_LABEL: &str = "PRIVATE KEY";
const PUBLIC_LABEL: &str = "PUBLIC KEY";
/// SubjectPublicKeyInfo of an Ed25519 key, up to the key (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// Signs.
pub struct SigningKey(Ed25519KeyPair);

/// Verifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub [u8; 32]);

impl SigningKey {
    /// A key for one run.
    ///
    /// # Errors
    /// No random bytes.
    pub fn generate() -> Result<Self, String> {
        Ed25519KeyPair::generate()
            .map(Self)
            .map_err(|_| "no key can be made".to_owned())
    }

    /// Reads a PKCS#8 file, PEM or DER, as `cmkfs drill keygen` and `openssl genpkey -algorithm ed25519` make it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(path: &Path) -> Result<Self, String> {
        let bytes =
            std::fs::read(path).map_err(|error| format!("signing key {}: {error}", path.display()))?;
        let bytes = Zeroizing::new(bytes);
        let der = pem(&bytes, PRIVATE_LABEL).unwrap_or(bytes);
        Ed25519KeyPair::from_pkcs8(&der).map(Self).map_err(|_| {
            format!(
                "signing key {}: no Ed25519 key in PKCS#8; 'cmkfs drill keygen FILE' makes one",
                path.display()
            )
        })
    }

    /// What verifies.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        for (out, byte) in bytes.iter_mut().zip(self.0.public_key().as_ref()) {
            *out = *byte;
        }
        PublicKey(bytes)
    }

    /// Signs.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }
}

/// Writes a new key to `path`, for its owner alone, and its public key beside it.
///
/// # Errors
/// A file that is there already, or cannot be written.
pub fn make_files(path: &Path) -> Result<PathBuf, String> {
    let key = Ed25519KeyPair::generate().map_err(|_| "no key can be made".to_owned())?;
    let pkcs8 = key
        .to_pkcs8()
        .map_err(|_| "the key cannot be written".to_owned())?;
    let mut public_path = path.as_os_str().to_owned();
    public_path.push(".pub");
    let public_path = PathBuf::from(public_path);
    let spki = [SPKI_PREFIX.as_slice(), key.public_key().as_ref()].concat();
    write_new(path, 0o600, &armour(pkcs8.as_ref(), PRIVATE_LABEL))?;
    write_new(&public_path, 0o644, &armour(&spki, PUBLIC_LABEL))?;
    Ok(public_path)
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), String> {
    let file = File::options().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| format!("{}: {error}", path.display()))
}

impl PublicKey {
    /// Reads a key: 64 hexadecimal digits, or a file that holds them, or one in PEM.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(what: &str) -> Result<Self, String> {
        if let Some(key) = Self::of_hex(what) {
            return Ok(key);
        }
        let bytes = std::fs::read(what).map_err(|error| format!("public key {what}: {error}"))?;
        let text = String::from_utf8_lossy(&bytes);
        let of_pem = || {
            let der = pem(&bytes, PUBLIC_LABEL)?;
            let key = der.strip_prefix(SPKI_PREFIX.as_slice())?;
            Some(Self(key.try_into().ok()?))
        };
        Self::of_hex(text.trim()).or_else(of_pem).ok_or_else(|| {
            format!("public key {what}: neither 64 hexadecimal digits nor an Ed25519 public key in PEM")
        })
    }

    fn of_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).ok()?;
        Some(Self(bytes))
    }

    /// As hexadecimal digits.
    #[must_use]
    pub fn text(&self) -> String {
        hex::encode(self.0)
    }

    /// Whether this key's owner signed the message.
    #[must_use]
    pub fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0)
            .verify(message, signature)
            .is_ok()
    }
}

fn armour(der: &[u8], label: &str) -> String {
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        BASE64_STANDARD.encode(der)
    )
}

fn pem(bytes: &[u8], label: &str) -> Option<Zeroizing<Vec<u8>>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (_, rest) = text.split_once(&format!("-----BEGIN {label}-----"))?;
    let (body, _) = rest.split_once(&format!("-----END {label}-----"))?;
    let body: Zeroizing<String> = Zeroizing::new(body.split_whitespace().collect());
    BASE64_STANDARD.decode(body.as_bytes()).ok().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_in_files_signs_and_its_public_half_verifies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let public = make_files(&path).unwrap();
        assert!(make_files(&path).is_err(), "no key is overwritten");
        let key = SigningKey::read(&path).unwrap();
        let pinned = PublicKey::read(public.to_str().unwrap()).unwrap();
        assert_eq!(pinned, key.public());
        assert_eq!(PublicKey::read(&pinned.text()).unwrap(), pinned);
        let signature = key.sign(b"message");
        assert!(pinned.has_signed(b"message", &signature));
        assert!(!pinned.has_signed(b"massage", &signature));
        assert!(
            !SigningKey::generate()
                .unwrap()
                .public()
                .has_signed(b"message", &signature)
        );
        assert!(SigningKey::read(&public).is_err());
        assert!(PublicKey::read(path.to_str().unwrap()).is_err());
    }
}
