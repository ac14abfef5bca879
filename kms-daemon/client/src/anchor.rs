//! How far a volume has come.

use crate::connection::ClientError;
use kms_api::ANCHOR_MAC_LEN;
use kms_api::proto;

/// How far a key domain of a volume has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor {
    /// The number of a durable commit.
    pub commit_seq: u64,
    /// Of the domain's root as of that commit.
    pub mac: [u8; ANCHOR_MAC_LEN],
    /// Inode numbers below this were given out.
    pub ino_limit: u64,
}

impl Anchor {
    pub(crate) fn of_message(message: proto::Anchor) -> Result<Self, ClientError> {
        let mac = <[u8; ANCHOR_MAC_LEN]>::try_from(message.mac.as_slice());
        Ok(Self {
            commit_seq: message.commit_seq,
            mac: mac.map_err(|_| ClientError::Protocol("the MAC of an anchor is none".to_owned()))?,
            ino_limit: message.ino_limit,
        })
    }

    pub(crate) fn to_message(self) -> proto::Anchor {
        proto::Anchor {
            commit_seq: self.commit_seq,
            mac: self.mac.to_vec(),
            ino_limit: self.ino_limit,
        }
    }
}
