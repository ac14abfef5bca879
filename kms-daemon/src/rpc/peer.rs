//! Who is at the other end of the socket.

use crate::engine::{OVERFLOW_UID, Principal};
use tonic::Request;
use tonic::transport::server::UdsConnectInfo;

/// The peer by the socket's credentials, never by what it claims. Without credentials it is nobody.
pub(super) fn principal<T>(request: &Request<T>) -> Principal {
    let info = request.extensions().get::<UdsConnectInfo>();
    let Some(credentials) = info.and_then(|info| info.peer_cred) else {
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
