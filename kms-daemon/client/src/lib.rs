//! A blocking client of the KMS, every call with a time limit, and its filesystem session.
//!
//! A [`Client`] owns a small runtime with one worker thread; it is `Send + Sync`, and its calls may come from any
//! thread, inside a runtime or out. It reconnects by itself after kmsd was restarted. Sessions do not outlive kmsd:
//! a call then answers [`Code::SessionNotFound`], and the caller opens another.

mod anchor;
mod connection;
mod ledger;
mod session;
mod side;

pub use anchor::Anchor;
pub use connection::ClientError;
pub use kms_api::{Code, EncryptionContext, KmsError, proto, socket_path};
pub use ledger::Ledger;
pub use session::{Descriptors, IssuedKey, KeyState, KeyStatus, Position, Renewal, Session, Usage, Watch};

use connection::Connection;
use kms_api::proto::kms_client::KmsClient;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Response, Status};

/// As many as kmsd answers at once.
const DEPENDANTS_PAGE_SIZE: u32 = 100;

/// A connection to one kmsd.
pub struct Client {
    connection: Arc<Connection>,
}

impl Client {
    /// Connects to the kmsd at `socket`. Every call, this one included, ends within `timeout`.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`], at once, if nothing listens there.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Self, ClientError> {
        Ok(Self {
            connection: Arc::new(Connection::open(socket, timeout)?),
        })
    }

    /// Describes a key by its id, its ARN or `alias/NAME`, in any state.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound` and the other answers of DescribeKey, as [`ClientError::Kms`].
    pub fn describe_key(&self, key: &str) -> Result<proto::KeyMetadata, ClientError> {
        let answer = self.connection.call_repeatably(|channel| {
            let request = proto::DescribeKeyRequest {
                key_id: key.to_owned(),
            };
            async move { KmsClient::new(channel).describe_key(request).await }
        })?;
        answer
            .key_metadata
            .ok_or_else(|| ClientError::Protocol("DescribeKey answered no metadata".to_owned()))
    }

    /// All that is known to depend on a key, named as [`Client::describe_key`] has it, in any state.
    ///
    /// # Errors
    /// As [`Client::describe_key`].
    pub fn list_dependants(&self, key: &str) -> Result<Vec<proto::Dependant>, ClientError> {
        let mut all = Vec::new();
        for page_number in 1.. {
            let page = self.connection.call_repeatably(|channel| {
                let request = proto::ListDependantsRequest {
                    key_id: key.to_owned(),
                    page_number,
                    page_size: DEPENDANTS_PAGE_SIZE,
                };
                async move { KmsClient::new(channel).list_dependants(request).await }
            })?;
            let is_last = page.dependants.len() < usize::try_from(DEPENDANTS_PAGE_SIZE).unwrap_or(usize::MAX);
            all.extend(page.dependants);
            if is_last {
                break;
            }
        }
        Ok(all)
    }

    /// Opens a session for a key domain of `volume`, whose first is 0. `drain_max` is how long its mount may take to go dark
    /// when a key is revoked, before kmsd ends it; at most 30 s. What kmsd was to be told of a session that it does not know
    /// any more, it takes only from one of the same domain.
    ///
    /// # Errors
    /// `Rejected.LimitExceeded` past the bound of sessions for one user, as [`ClientError::Kms`].
    pub fn open_session(
        &self,
        volume: [u8; 16],
        domain: u16,
        drain_max: Duration,
    ) -> Result<Session, ClientError> {
        Session::open(Arc::clone(&self.connection), volume, domain, drain_max)
    }

    /// While `refusing`, every call fails at once, as [`ClientError::Unreachable`], those that wait for an answer included.
    pub fn refuse(&self, refusing: bool) {
        self.connection.refuse(refusing);
    }

    /// Has every [`Watch`] end, now and later.
    pub fn stop_watching(&self) {
        self.connection.stop();
    }

    /// Any operation of the `Kms` service, once: a call that changes something is never repeated by itself.
    ///
    /// # Errors
    /// The operation's own, as [`ClientError::Kms`].
    pub fn call<T, Fut>(&self, operation: impl FnOnce(KmsClient<Channel>) -> Fut) -> Result<T, ClientError>
    where
        T: Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        self.connection.call(|channel| operation(KmsClient::new(channel)))
    }
}
