//! The side channel: a second socket beside the one of gRPC, through which a mount hands kmsd the descriptors with which
//! kmsd can revoke what the kernel caches without the mount's help.
//!
//! It is a Unix socket of type SOCK_SEQPACKET. A mount connects, sends one [`Attach`] with its descriptors (SCM_RIGHTS), and
//! gets one answer of one byte.

use crate::session::SESSION_ID_LEN;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Appended to the path of kmsd's socket.
const SUFFIX: &str = ".side";
const MAGIC: &[u8; 8] = b"kmsside\x01";

/// Bytes of an [`Attach`].
pub const ATTACH_BYTES: usize = 8 + SESSION_ID_LEN + 4;
/// Descriptors that go with it, at most.
pub const ATTACH_DESCRIPTORS_MAX: usize = 3;
/// The answer to an [`Attach`] that was accepted; any other byte, or none, is a refusal.
pub const ATTACHED: u8 = 1;

/// The side channel of the kmsd at `socket`.
#[must_use]
pub fn side_channel_path(socket: &Path) -> PathBuf {
    let mut path = OsString::from(socket);
    path.push(SUFFIX);
    path.into()
}

/// What a mount says when it hands over its descriptors: a clone of its FUSE device, the memfd of its [`crate::ledger`], and,
/// where it has one, the `abort` file of its connection (fusectl), in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attach {
    /// The caller's session.
    pub session: [u8; SESSION_ID_LEN],
    /// The minor number of the mount's anonymous device.
    pub device_minor: u32,
}

impl Attach {
    /// The message: `kmsside` and the version, the session's id, the minor number in big-endian.
    #[must_use]
    pub fn encode(&self) -> [u8; ATTACH_BYTES] {
        let fields = [MAGIC.as_slice(), &self.session, &self.device_minor.to_be_bytes()];
        let mut message = [0; ATTACH_BYTES];
        for (out, byte) in message.iter_mut().zip(fields.into_iter().flatten()) {
            *out = *byte;
        }
        message
    }

    /// `None` for anything else.
    #[must_use]
    pub fn decode(message: &[u8]) -> Option<Self> {
        let rest = message.strip_prefix(MAGIC)?;
        let (session, rest) = rest.split_first_chunk()?;
        Some(Self {
            session: *session,
            device_minor: u32::from_be_bytes(rest.try_into().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_another_length_or_version_is_none() {
        let attach = Attach {
            session: [7; SESSION_ID_LEN],
            device_minor: 0x0102_0304,
        };
        let message = attach.encode();
        assert_eq!(Attach::decode(&message), Some(attach));
        assert_eq!(Attach::decode(&message[..ATTACH_BYTES - 1]), None);
        assert_eq!(Attach::decode(&[message.as_slice(), &[0]].concat()), None);
        let mut other = message;
        other[7] += 1;
        assert_eq!(Attach::decode(&other), None);
    }
}
