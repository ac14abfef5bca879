//! The socket: where it is bound, and how many connections one user may have.

use super::ServeError;
use crate::rpc::Peer;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

/// Open connections of one user, at most; one more is closed at once.
const CONNECTIONS_PER_UID_MAX: usize = 128;
/// How long to wait when the host has no descriptor for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds `path`, in place of what a dead daemon left there.
pub(super) fn bind(path: &Path, mode: u32) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Socket {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(failed(io::Error::other("is there already, and is no socket")));
        }
        Ok(_) => {
            match std::os::unix::net::UnixStream::connect(path) {
                Ok(_) => return Err(failed(io::Error::other("another daemon listens there"))),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(failed(error)),
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // The process's umask leaves it to the owner alone until its mode is set.
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Accepts connections, and no more of one user than [`CONNECTIONS_PER_UID_MAX`].
pub(super) fn incoming(listener: UnixListener) -> impl Stream<Item = io::Result<Connection>> {
    let counts = Arc::new(Mutex::new(BTreeMap::new()));
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Some(connection) = Connection::admit(stream, &counts) else {
                continue;
            };
            if sender.send(Ok(connection)).await.is_err() {
                return;
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

type Counts = Arc<Mutex<BTreeMap<u32, usize>>>;

/// A connection that is counted for as long as it is open.
pub(super) struct Connection {
    stream: UnixStream,
    peer: Peer,
    _place: Place,
}

struct Place {
    uid: u32,
    counts: Counts,
}

impl Connection {
    fn admit(stream: UnixStream, counts: &Counts) -> Option<Self> {
        let uid = stream.peer_cred().ok()?.uid();
        let mut held = counts.lock();
        let count = held.entry(uid).or_insert(0);
        if *count >= CONNECTIONS_PER_UID_MAX {
            return None;
        }
        *count += 1;
        Some(Self {
            peer: Peer::of(&stream),
            stream,
            _place: Place {
                uid,
                counts: Arc::clone(counts),
            },
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.uid) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
