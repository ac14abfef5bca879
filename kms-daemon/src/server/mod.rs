//! The daemon: one engine behind one socket, until a signal ends it.

mod kept;
mod listener;
mod side;

use crate::clock::SystemClock;
use crate::engine::{Engine, OpenError};
use crate::rpc::{FilesystemService, Gate, KmsService, watch_exit};
use crate::slot::Keeper;
use kms_api::MESSAGE_BYTES_MAX;
use kms_api::proto::filesystem_keys_server::FilesystemKeysServer;
use kms_api::proto::kms_server::KmsServer;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tonic::transport::Server;

/// Calls under way on one connection, at most.
const STREAMS_PER_CONNECTION_MAX: u32 = 128;
/// Calls under way at all, at most; more wait.
const BLOCKING_THREADS_MAX: usize = 64;
/// Changes of keys' states under way, at most: each may wait long for mounts, which must find threads for what they say.
const CHANGES_MAX: usize = 16;
/// How long a stopping daemon waits for the calls that are under way.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// How long a connection may take to answer a ping before it is given up.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// The priority (nice(1)) of the daemon, where that is permitted.
const NICE: i32 = -10;
/// How often it looks for keys whose window has passed.
const DESTRUCTION_INTERVAL: Duration = Duration::from_secs(60);

/// What `kmsd serve` is told.
pub struct ServeOptions {
    /// The keystore.
    pub home: PathBuf,
    /// What opens its root slot.
    pub keeper: Keeper,
    /// Where to listen.
    pub socket: PathBuf,
    /// The socket's permission bits.
    pub socket_mode: u32,
}

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The keystore.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The socket.
    #[error("socket {path}: {source}")]
    Socket {
        /// Where it was to be.
        path: PathBuf,
        /// Why it is not.
        source: io::Error,
    },
    /// The runtime or a signal handler.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// gRPC's server.
    #[error("the server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until SIGTERM or SIGINT, then finishes the calls that are under way. Prints one line on standard output when
/// the socket accepts.
///
/// # Errors
/// [`ServeError`]
pub fn serve(options: ServeOptions) -> Result<(), ServeError> {
    take_precedence();
    let kept = kept::taken_back();
    // The keystore's lock is taken first: it decides whether what lies at the socket's path may be replaced.
    let sessions: Vec<_> = kept.keys().copied().collect();
    let engine = Engine::open_with(&options.home, options.keeper, Arc::new(SystemClock), kept)?;
    let engine = Arc::new(engine);
    // What is kept for nobody would hold a dead mount's connection open, and its programs up, until the host stops.
    for session in sessions.into_iter().filter(|&session| !engine.knows(session)) {
        kept::forget(session);
    }
    let (socket, socket_mode) = (options.socket.as_path(), options.socket_mode);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(run(socket, socket_mode, &engine));
    // What still runs after the drain has not answered, and will not.
    runtime.shutdown_timeout(Duration::from_secs(1));
    engine.close();
    outcome
}

/// Has this thread, and those that it starts, go before other programs where that is permitted: what keeps every processor
/// busy may be the very programs that are to see nothing more of a key that is taken away.
fn take_precedence() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "it goes before no other program");
    }
}

async fn run(socket: &Path, socket_mode: u32, engine: &Arc<Engine>) -> Result<(), ServeError> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopping) = watch::channel(false);
    let own_uid = rustix::process::geteuid().as_raw();
    let gate = Arc::new(Gate {
        engine: Arc::clone(engine),
        own_uid,
        stopping: stopping.clone(),
        changes: Semaphore::new(CHANGES_MAX),
        forget: kept::forget,
    });
    let listener = listener::bind(socket, socket_mode)?;
    let side = kms_api::side::side_channel_path(socket);
    let side = side::start(&side, socket_mode, Arc::clone(engine), own_uid)?;
    for exit in engine.left_behind() {
        tokio::spawn(watch_exit(Arc::clone(&gate), exit));
    }
    let kms = KmsServer::new(KmsService(Arc::clone(&gate))).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let files =
        FilesystemKeysServer::new(FilesystemService(gate)).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let server = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .add_service(kms)
        .add_service(files);
    let mut until = stopping.clone();
    let serving = server.serve_with_incoming_shutdown(listener::incoming(listener), async move {
        // The sender outlives the server.
        let _ = until.wait_for(|&stopping| stopping).await;
    });
    let mut serving = tokio::spawn(serving);
    tokio::spawn(destroy_due(Arc::clone(engine), stopping));
    announce(socket)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut serving => return flatten(ended),
    }
    tracing::info!("stopping");
    // First the name goes, so that nobody connects to a daemon that will not answer.
    let _ = std::fs::remove_file(socket);
    drop(side);
    stop.send_replace(true);
    match tokio::time::timeout(DRAIN_MAX, serving).await {
        Ok(ended) => flatten(ended),
        Err(_) => {
            tracing::warn!("calls were still under way after {DRAIN_MAX:?}");
            Ok(())
        }
    }
}

/// Destroys what is due, at once and every so often, until the daemon stops. A destruction that is under way then is
/// finished, or by the next start.
async fn destroy_due(engine: Arc<Engine>, mut stopping: watch::Receiver<bool>) {
    let mut ticks = tokio::time::interval(DESTRUCTION_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopping.wait_for(|&stopping| stopping) => return,
        }
        let engine = Arc::clone(&engine);
        // It logs what fails, and the next tick tries again.
        let _ = tokio::task::spawn_blocking(move || engine.destroy_due()).await;
    }
}

fn announce(socket: &Path) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "ready socket={}", socket.display())?;
    out.flush()
}

fn flatten(
    ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>,
) -> Result<(), ServeError> {
    ended.map_err(io::Error::other)?.map_err(ServeError::from)
}
