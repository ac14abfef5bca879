//! Who is at the other end of the socket.

use crate::engine::{OVERFLOW_UID, Principal};
use crate::fence::Process;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tonic::Request;

/// The process that connected, by the kernel's word.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    credentials: Option<UCred>,
    process: Option<Arc<Process>>,
}

impl Peer {
    pub(crate) fn of(stream: &UnixStream) -> Self {
        let credentials = stream.peer_cred().ok();
        let pid = credentials.and_then(|credentials| credentials.pid());
        Self {
            credentials,
            process: pid.and_then(|pid| Process::at_peer(stream.as_fd(), pid).ok().map(Arc::new)),
        }
    }
}

/// The calling process, if it is there still and this host can name it.
pub(super) fn process<T>(request: &Request<T>) -> Option<Arc<Process>> {
    request.extensions().get::<Peer>()?.process.clone()
}

/// The peer by the socket's credentials, never by what it claims. Without credentials it is nobody.
pub(super) fn principal<T>(request: &Request<T>) -> Principal {
    let peer = request.extensions().get::<Peer>();
    let Some(credentials) = peer.and_then(|peer| peer.credentials) else {
        return Principal {
            uid: OVERFLOW_UID,
            gid: OVERFLOW_UID,
            pid: 0,
            exe: String::new(),
        };
    };
    let pid = credentials.pid().unwrap_or_default();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    Principal {
        uid: credentials.uid(),
        gid: credentials.gid(),
        pid,
        exe: exe.to_string_lossy().into_owned(),
    }
}

/// kmsd's own user and root; never the uid that stands for whomever the kernel cannot name.
pub(super) fn admitted(principal: &Principal, own_uid: u32) -> bool {
    principal.uid != OVERFLOW_UID && (principal.uid == own_uid || principal.uid == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_user_and_root_are_admitted() {
        let peer = |uid| Principal {
            uid,
            gid: 0,
            pid: 1,
            exe: String::new(),
        };
        assert!(admitted(&peer(1000), 1000));
        assert!(admitted(&peer(0), 1000));
        assert!(!admitted(&peer(1001), 1000));
        assert!(!admitted(&peer(OVERFLOW_UID), OVERFLOW_UID));
        assert_eq!(principal(&Request::new(())).uid, OVERFLOW_UID);
    }
}
