//! The socket, the runtime behind it, and the time limit of every call.

use hyper_util::rt::TokioIo;
use kms_api::KmsError;
use std::error::Error;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status, Streaming};

/// Why a call has no answer, or has an error as its answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No socket, connection refused or lost, or no answer in time. Whether the call took effect is not known.
    #[error("the KMS cannot be reached: {0}")]
    Unreachable(String),
    /// The KMS answered with an error.
    #[error(transparent)]
    Kms(#[from] KmsError),
    /// What answered does not speak this protocol, or the answer was tampered with.
    #[error("the KMS gave an answer that is not to be trusted: {0}")]
    Protocol(String),
}

/// A lost connection is distinguished from a missed deadline, because only the first is worth another try.
enum CallFailure {
    Lost(ClientError),
    Final(ClientError),
}

impl From<CallFailure> for ClientError {
    fn from(failure: CallFailure) -> Self {
        let (CallFailure::Lost(error) | CallFailure::Final(error)) = failure;
        error
    }
}

pub(crate) struct Connection {
    /// `None` only while it is being dropped.
    runtime: Option<Runtime>,
    channel: Channel,
    timeout: Duration,
    socket: PathBuf,
    /// While true, calls fail.
    refusing: watch::Sender<bool>,
    /// From when it is true on, nothing is waited for.
    stopped: watch::Sender<bool>,
}

impl Connection {
    pub(crate) fn open(socket: &Path, timeout: Duration) -> Result<Self, ClientError> {
        // A blocking connect to a Unix socket answers at once; only a full backlog makes it wait.
        std::os::unix::net::UnixStream::connect(socket)
            .map_err(|error| ClientError::Unreachable(format!("{}: {error}", socket.display())))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("kms-client")
            .enable_all()
            .build()
            .map_err(|error| ClientError::Unreachable(format!("no runtime: {error}")))?;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let _guard = runtime.enter();
        // The URI is never resolved: the connector knows the way.
        let channel = Endpoint::from_static("http://kmsd").connect_with_connector_lazy(connector);
        drop(_guard);
        Ok(Self {
            runtime: Some(runtime),
            channel,
            timeout,
            socket: socket.to_owned(),
            refusing: watch::Sender::new(false),
            stopped: watch::Sender::new(false),
        })
    }

    /// Where kmsd listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The longest that a call takes.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// While `refusing`, calls fail, those under way included.
    pub(crate) fn refuse(&self, refusing: bool) {
        self.refusing.send_replace(refusing);
    }

    /// Ends every wait for a stream, for good.
    pub(crate) fn stop(&self) {
        self.stopped.send_replace(true);
    }

    /// Waits, however long, for what a stream yields.
    pub(crate) fn next_of<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, ClientError> {
        let runtime = self.runtime.as_ref().ok_or_else(closing)?;
        let mut stopped = self.stopped.subscribe();
        runtime.block_on(async {
            tokio::select! {
                next = stream.message() => next.map_err(|status| classify(&status).into()),
                _ = stopped.wait_for(|&stopped| stopped) => Err(closing()),
            }
        })
    }

    /// One call, sent at most once.
    pub(crate) fn call<T, Fut>(&self, operation: impl FnOnce(Channel) -> Fut) -> Result<T, ClientError>
    where
        T: Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        Ok(self.call_until(Instant::now() + self.timeout, operation)?)
    }

    /// One call that does no harm when it is made twice: after a lost connection it is sent once more, within the
    /// same time limit, so that a restart of kmsd goes unnoticed.
    pub(crate) fn call_repeatably<T, Fut>(&self, operation: impl Fn(Channel) -> Fut) -> Result<T, ClientError>
    where
        T: Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        self.call_repeatably_within(self.timeout, operation)
    }

    /// The same with a shorter time limit.
    pub(crate) fn call_repeatably_within<T, Fut>(
        &self,
        limit: Duration,
        operation: impl Fn(Channel) -> Fut,
    ) -> Result<T, ClientError>
    where
        T: Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        let deadline = Instant::now() + self.timeout.min(limit);
        match self.call_until(deadline, &operation) {
            Err(CallFailure::Lost(_)) => Ok(self.call_until(deadline, &operation)?),
            other => Ok(other?),
        }
    }

    fn call_until<T, Fut>(
        &self,
        deadline: Instant,
        operation: impl FnOnce(Channel) -> Fut,
    ) -> Result<T, CallFailure>
    where
        T: Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        let gone = || CallFailure::Final(closing());
        let runtime = self.runtime.as_ref().ok_or_else(gone)?;
        let mut refusing = self.refusing.subscribe();
        let (sender, receiver) = mpsc::sync_channel(1);
        let call = operation(self.channel.clone());
        // Spawned and waited for through a plain channel, so that a caller inside another runtime is served too.
        runtime.spawn(async move {
            let answer = tokio::select! {
                answer = tokio::time::timeout_at(deadline.into(), call) => Some(answer),
                _ = refusing.wait_for(|&refusing| refusing) => None,
            };
            // The receiver waits until this arrives.
            let _ = sender.send(answer);
        });
        match receiver.recv().map_err(|_| gone())? {
            Some(Ok(Ok(answer))) => Ok(answer.into_inner()),
            Some(Ok(Err(status))) => Err(classify(&status)),
            None => Err(CallFailure::Final(refused())),
            Some(Err(_)) => Err(CallFailure::Final(ClientError::Unreachable(
                "no answer in time".to_owned(),
            ))),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, and panics inside another runtime; nothing is left to wait for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn closing() -> ClientError {
    ClientError::Unreachable("the client is closing".to_owned())
}

fn refused() -> ClientError {
    ClientError::Unreachable("the call was broken off".to_owned())
}

fn classify(status: &Status) -> CallFailure {
    if let Some(error) = KmsError::from_status(status) {
        return CallFailure::Final(ClientError::Kms(error));
    }
    // A status that came over the wire has no source; one that the transport made has.
    let Some(source) = status.source() else {
        return CallFailure::Final(ClientError::Protocol(status.to_string()));
    };
    let mut cause = source;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    CallFailure::Lost(ClientError::Unreachable(cause.to_string()))
}
