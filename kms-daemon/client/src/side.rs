//! Handing a mount's descriptors over to kmsd.

use crate::ClientError;
use kms_api::side::{ATTACH_DESCRIPTORS_MAX, ATTACHED, Attach};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

/// Sends `attach` with its descriptors to the side channel at `path`, and waits until they count.
pub(crate) fn attach(
    path: &Path,
    attach: &Attach,
    descriptors: &[BorrowedFd<'_>],
    timeout: Duration,
) -> Result<(), ClientError> {
    exchange(path, attach, descriptors, timeout)
        .map_err(|error| ClientError::Unreachable(format!("{}: {error}", path.display())))?
        .then_some(())
        .ok_or_else(|| ClientError::Protocol("kmsd refused the mount's descriptors; see its log".to_owned()))
}

fn exchange(
    path: &Path,
    attach: &Attach,
    descriptors: &[BorrowedFd<'_>],
    timeout: Duration,
) -> rustix::io::Result<bool> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    for side in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, side, Some(timeout))?;
    }
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ATTACH_DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(rustix::io::Errno::MSGSIZE);
    }
    let message = attach.encode();
    rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(&message)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    let mut answer = [0];
    let (received, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    Ok(received == 1 && answer == [ATTACHED])
}
