//! The side channel: takes the descriptors of mounts, on a thread of its own.

use super::{ServeError, kept};
use crate::engine::Engine;
use crate::fence::{Attachment, Reach};
use kms_api::side::{ATTACH_BYTES, ATTACH_DESCRIPTORS_MAX, ATTACHED, Attach};
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::io::{Error, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a mount may take to say what it connected for.
const PATIENCE: Duration = Duration::from_secs(2);
const BACKLOG: i32 = 64;
/// How long to wait when the host has no descriptor for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens until it is dropped.
pub(super) struct SideChannel {
    path: PathBuf,
    listener: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for SideChannel {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        // Wakes the thread that waits in accept(2).
        if let Err(error) = rustix::net::shutdown(&*self.listener, Shutdown::Both) {
            tracing::warn!(%error, "the side channel stays open");
        } else if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the side channel panicked");
        }
    }
}

/// Starts listening at `path`. The caller holds the socket beside it, so that what lies there is a dead daemon's.
pub(super) fn start(
    path: &Path,
    mode: u32,
    engine: Arc<Engine>,
    own_uid: u32,
) -> std::result::Result<SideChannel, ServeError> {
    let failed = |source: Error| ServeError::Socket {
        path: path.to_owned(),
        source,
    };
    let listener = Arc::new(listen(path, mode).map_err(failed)?);
    let heard = Arc::clone(&listener);
    let thread = std::thread::Builder::new()
        .name("side".to_owned())
        .spawn(move || serve(&heard, &engine, own_uid))
        .map_err(failed)?;
    Ok(SideChannel {
        path: path.to_owned(),
        listener,
        thread: Some(thread),
    })
}

fn listen(path: &Path, mode: u32) -> Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn serve(listener: &OwnedFd, engine: &Engine, own_uid: u32) {
    loop {
        let connection = match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(connection) => connection,
            // It was shut down.
            Err(rustix::io::Errno::INVAL) => return,
            Err(error) => {
                tracing::warn!(%error, "a mount could not be heard");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if let Err(why) = attach(&connection, engine, own_uid) {
            tracing::warn!(why, "what a mount handed over was refused");
        }
    }
}

fn attach(connection: &OwnedFd, engine: &Engine, own_uid: u32) -> std::result::Result<(), String> {
    let told = |error: rustix::io::Errno| error.to_string();
    let peer = socket_peercred(connection).map_err(told)?;
    let (uid, pid) = (peer.uid.as_raw(), peer.pid.as_raw_nonzero().get());
    if uid != own_uid && uid != 0 {
        return Err(format!("uid {uid} may not use this kmsd"));
    }
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(connection, timeout, Some(PATIENCE)).map_err(told)?;
    }
    let (attach, descriptors) = receive(connection)?;
    let mut descriptors = descriptors.into_iter();
    let (Some(device), Some(ledger)) = (descriptors.next(), descriptors.next()) else {
        return Err("too few descriptors".to_owned());
    };
    let attachment = Arc::new(Attachment::new(device, ledger, descriptors.next())?);
    // Before it counts: a kmsd that ends between the two finds descriptors of a session that has none.
    kept::keep(attach.session, &attachment.descriptors());
    let reach = attachment as Arc<dyn Reach>;
    engine
        .attach((uid, pid), &attach.session, attach.device_minor, reach)
        .map_err(|error| error.to_string())
        .inspect_err(|_| kept::forget(attach.session))?;
    rustix::net::send(connection, &[ATTACHED], SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(told)
}

fn receive(connection: &OwnedFd) -> std::result::Result<(Attach, Vec<OwnedFd>), String> {
    let mut message = [0; ATTACH_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ATTACH_DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        connection,
        &mut [IoSliceMut::new(&mut message)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|error| error.to_string())?;
    let attach = message.get(..received.bytes).and_then(Attach::decode);
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(part) = part {
            descriptors.extend(part);
        }
    }
    Ok((attach.ok_or("it is no message of this version")?, descriptors))
}
