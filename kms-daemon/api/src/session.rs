//! The sealed answers of a filesystem session: no socket or message buffer ever holds a data key in the clear.
//!
//! Both sides make an X25519 key for one session. The session key is
//! HKDF-SHA-256(shared secret, salt = session id || client public key || server public key). Every answer that
//! carries keys is one AES-256-GCM-SIV ciphertext of N x 32 bytes under it, bound to the request it answers.

use kms_crypto::{
    CryptoError, KEY_LEN, KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Sealer, Secret, SecretKey, TAG_LEN,
    Tag, derive, wipe_stack,
};
use sha2::{Digest, Sha256};
use x25519_dalek::{PublicKey, StaticSecret};

/// Length of a session id, in bytes.
pub const SESSION_ID_LEN: usize = 16;
/// Length of a request's random, in bytes.
pub const REQUEST_RANDOM_LEN: usize = 16;
/// Length of an X25519 public key, in bytes.
pub const PUBLIC_KEY_LEN: usize = 32;

/// Longest answer without its tag: it is sealed and opened in locked memory.
const ANSWER_BYTES_MAX: usize = crate::BATCH_ITEMS_MAX * KEY_LEN;

/// What the AAD of an answer begins with: these bytes and no other protocol's.
const ANSWER_LABEL: &[u8] = b"kmsd/1/session-answer";

/// Why a session's message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The peer's public key has a small order: the shared secret would be known to everybody (RFC 7748, section 6.1).
    #[error("the peer's public key gives no secret")]
    WeakPublicKey,
    /// A field's length is not what it must be.
    #[error("a field has a wrong length")]
    Malformed,
    /// The answer is not the one to this request, or was changed on its way.
    #[error("the answer does not belong to this request")]
    Forged,
    /// The kernel gave no random bytes.
    #[error("the kernel gave no random bytes")]
    Randomness,
}

impl From<CryptoError> for SessionError {
    fn from(error: CryptoError) -> Self {
        match error {
            CryptoError::Randomness => Self::Randomness,
            CryptoError::TooLong => Self::Malformed,
            _ => Self::Forged,
        }
    }
}

/// Which end of the socket this is; it decides the order of the public keys in the salt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The mount.
    Client,
    /// kmsd.
    Server,
}

/// Which call an answer answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// IssueDataKeys
    Issue = 1,
    /// OpenDataKeys
    Open = 2,
}

/// An X25519 key pair for one session, used for one agreement.
pub struct KeyPair {
    secret: SecretKey,
    public: [u8; PUBLIC_KEY_LEN],
}

/// What one operation on the curve may leave on the stack.
const STACK_BYTES: usize = 16 << 10;

impl KeyPair {
    /// A fresh pair.
    ///
    /// # Errors
    /// [`SessionError::Randomness`] if getrandom(2) gives no bytes.
    pub fn generate() -> Result<Self, SessionError> {
        let secret = SecretKey::generate()?;
        let public = public_key(&secret);
        wipe_stack::<STACK_BYTES>();
        Ok(Self { secret, public })
    }

    /// What the peer is sent.
    #[must_use]
    pub fn public(&self) -> [u8; PUBLIC_KEY_LEN] {
        self.public
    }

    /// The key of session `id` with the peer.
    ///
    /// # Errors
    /// [`SessionError::WeakPublicKey`] if the shared secret would be all zeros.
    pub fn agree(
        self,
        role: Role,
        id: [u8; SESSION_ID_LEN],
        peer_public: [u8; PUBLIC_KEY_LEN],
    ) -> Result<SessionKey, SessionError> {
        let shared = SecretKey::fill_with(|out| shared_secret(&self.secret, peer_public, out));
        wipe_stack::<STACK_BYTES>();
        let (client, server) = match role {
            Role::Client => (self.public(), peer_public),
            Role::Server => (peer_public, self.public()),
        };
        let salt = [id.as_slice(), &client, &server].concat();
        let sealer = Sealer::new(derive(&shared?, KeySalt(&salt), Label::Session));
        Ok(SessionKey { id, sealer })
    }
}

// Each has a frame of its own, below which nothing else lies when the stack is wiped.

#[inline(never)]
fn public_key(secret: &SecretKey) -> [u8; PUBLIC_KEY_LEN] {
    PublicKey::from(&StaticSecret::from(*secret.expose())).to_bytes()
}

#[inline(never)]
fn shared_secret(
    secret: &SecretKey,
    peer_public: [u8; PUBLIC_KEY_LEN],
    out: &mut [u8; KEY_LEN],
) -> Result<(), SessionError> {
    let shared = StaticSecret::from(*secret.expose()).diffie_hellman(&PublicKey::from(peer_public));
    if !shared.was_contributory() {
        return Err(SessionError::WeakPublicKey);
    }
    out.copy_from_slice(shared.as_bytes());
    Ok(())
}

/// The key of one session; it seals answers on the server and opens them on the client.
pub struct SessionKey {
    id: [u8; SESSION_ID_LEN],
    sealer: Sealer,
}

/// What an answer is bound to, beside its session.
#[derive(Debug, Clone, Copy)]
pub struct Binding<'a> {
    /// The call.
    pub operation: Operation,
    /// Chosen by the client for this request alone.
    pub request_random: [u8; REQUEST_RANDOM_LEN],
    /// The wrapped keys, in order: those of the answer (Issue) or of the request (Open).
    pub blobs: &'a [&'a [u8]],
}

impl SessionKey {
    /// The session's id.
    #[must_use]
    pub fn id(&self) -> [u8; SESSION_ID_LEN] {
        self.id
    }

    /// Seals one key for each blob of `binding`; `None` is an item that failed. Gives the nonce and the ciphertext
    /// with its tag behind it.
    ///
    /// # Errors
    /// [`SessionError::Malformed`] if there are not as many keys as blobs, or more than a call may ask for; [`SessionError::Randomness`].
    pub fn seal(
        &self,
        nonces: &NonceSource,
        binding: &Binding<'_>,
        keys: &[Option<SecretKey>],
    ) -> Result<([u8; NONCE_LEN], Vec<u8>), SessionError> {
        let aad = self.aad(binding, keys.iter().map(Option::is_some))?;
        let mut answer = Secret::<ANSWER_BYTES_MAX>::zeroed();
        let text = answer
            .expose_mut()
            .get_mut(..keys.len() * KEY_LEN)
            .ok_or(SessionError::Malformed)?;
        for (place, key) in text.chunks_exact_mut(KEY_LEN).zip(keys) {
            if let Some(key) = key {
                place.copy_from_slice(key.expose());
            }
        }
        let nonce = nonces.next()?;
        let tag = self.sealer.seal(nonce, &aad, text)?;
        Ok((nonce.0, [&*text, &tag.0].concat()))
    }

    /// Opens an answer; `opened` says which items the server says it opened.
    ///
    /// # Errors
    /// [`SessionError::Malformed`] or [`SessionError::Forged`]; whatever was decrypted is wiped.
    pub fn open(
        &self,
        nonce: &[u8],
        binding: &Binding<'_>,
        opened: &[bool],
        sealed: &[u8],
    ) -> Result<Vec<Option<SecretKey>>, SessionError> {
        let aad = self.aad(binding, opened.iter().copied())?;
        let nonce = Nonce(nonce.try_into().map_err(|_| SessionError::Malformed)?);
        if sealed.len() != opened.len() * KEY_LEN + TAG_LEN {
            return Err(SessionError::Malformed);
        }
        let (sealed, tag) = sealed
            .split_last_chunk::<TAG_LEN>()
            .ok_or(SessionError::Malformed)?;
        let mut answer = Secret::<ANSWER_BYTES_MAX>::zeroed();
        let text = answer
            .expose_mut()
            .get_mut(..sealed.len())
            .ok_or(SessionError::Malformed)?;
        text.copy_from_slice(sealed);
        self.sealer.open(nonce, &aad, text, Tag(*tag))?;
        text.chunks_exact(KEY_LEN)
            .zip(opened)
            .map(|(bytes, &opened)| {
                let copy = |out: &mut [u8; KEY_LEN]| {
                    out.copy_from_slice(bytes);
                    Ok::<(), SessionError>(())
                };
                opened.then(|| SecretKey::fill_with(copy)).transpose()
            })
            .collect()
    }

    /// Label, operation, session, request, count, a byte for each item's success, and the hash of the blobs.
    fn aad(
        &self,
        binding: &Binding<'_>,
        opened: impl ExactSizeIterator<Item = bool>,
    ) -> Result<Vec<u8>, SessionError> {
        let count = u32::try_from(opened.len()).map_err(|_| SessionError::Malformed)?;
        if opened.len() != binding.blobs.len() {
            return Err(SessionError::Malformed);
        }
        let mut digest = Sha256::new();
        for blob in binding.blobs {
            let length = u32::try_from(blob.len()).map_err(|_| SessionError::Malformed)?;
            digest.update(length.to_be_bytes());
            digest.update(blob);
        }
        let mut aad = Vec::with_capacity(ANSWER_LABEL.len() + 1 + 16 + 16 + 4 + opened.len() + 32);
        aad.extend_from_slice(ANSWER_LABEL);
        aad.push(binding.operation as u8);
        aad.extend_from_slice(&self.id);
        aad.extend_from_slice(&binding.request_random);
        aad.extend_from_slice(&count.to_be_bytes());
        aad.extend(opened.map(u8::from));
        aad.extend_from_slice(&digest.finalize());
        Ok(aad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 16] = [9; 16];

    fn pair() -> (SessionKey, SessionKey) {
        let (client, server) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let (client_public, server_public) = (client.public(), server.public());
        (
            client.agree(Role::Client, ID, server_public).unwrap(),
            server.agree(Role::Server, ID, client_public).unwrap(),
        )
    }

    fn binding<'a>(blobs: &'a [&'a [u8]]) -> Binding<'a> {
        Binding {
            operation: Operation::Open,
            request_random: [5; 16],
            blobs,
        }
    }

    #[test]
    fn the_client_opens_what_the_server_sealed() {
        let (client, server) = pair();
        let keys = [
            Some(SecretKey::generate().unwrap()),
            None,
            Some(SecretKey::generate().unwrap()),
        ];
        let binding = binding(&[b"a", b"b", b"c"]);
        let (nonce, sealed) = server
            .seal(&NonceSource::new().unwrap(), &binding, &keys)
            .unwrap();
        let opened = client
            .open(&nonce, &binding, &[true, false, true], &sealed)
            .unwrap();
        for (key, opened) in keys.iter().zip(&opened) {
            assert_eq!(
                key.as_ref().map(SecretKey::expose),
                opened.as_ref().map(SecretKey::expose)
            );
        }
    }

    /// Each line is one thing that a man in the middle of the socket could do.
    #[test]
    fn a_changed_or_replayed_answer_is_refused() {
        let (client, server) = pair();
        let keys = [Some(SecretKey::generate().unwrap()), None];
        let blobs: [&[u8]; 2] = [b"a", b"bc"];
        let good = binding(&blobs);
        let (nonce, sealed) = server.seal(&NonceSource::new().unwrap(), &good, &keys).unwrap();
        let flags = [true, false];
        let refused = |nonce: &[u8], binding: &Binding<'_>, flags: &[bool], sealed: &[u8]| {
            assert!(client.open(nonce, binding, flags, sealed).is_err());
        };

        for at in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[at] ^= 1;
            refused(&nonce, &good, &flags, &flipped);
        }
        refused(&[0; 12], &good, &flags, &sealed);
        refused(&nonce[..11], &good, &flags, &sealed);
        refused(&nonce, &good, &[true, true], &sealed);
        refused(&nonce, &good, &[true], &sealed[..48]);
        refused(&nonce, &good, &flags, &sealed[..sealed.len() - 1]);
        let replayed = Binding {
            request_random: [6; 16],
            ..good
        };
        refused(&nonce, &replayed, &flags, &sealed);
        let other_call = Binding {
            operation: Operation::Issue,
            ..good
        };
        refused(&nonce, &other_call, &flags, &sealed);
        refused(&nonce, &binding(&[b"ab", b"c"]), &flags, &sealed);
        refused(&nonce, &binding(&[b"bc", b"a"]), &flags, &sealed);
        let (stranger, _) = pair();
        assert!(stranger.open(&nonce, &good, &flags, &sealed).is_err());
        client.open(&nonce, &good, &flags, &sealed).unwrap();
    }

    #[test]
    fn a_public_key_of_small_order_is_refused() {
        let key = KeyPair::generate().unwrap();
        assert_eq!(
            key.agree(Role::Server, ID, [0; 32]).err(),
            Some(SessionError::WeakPublicKey)
        );
    }
}
