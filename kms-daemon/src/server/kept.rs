//! Descriptors that outlive the daemon, in systemd's descriptor store (sd_notify(3), FDSTORE): with them a kmsd that was
//! started anew still reaches the mounts of the one before. Without systemd nothing is kept.

use crate::engine::SessionId;
use crate::fence::{Attachment, Reach};
use sd_notify::NotifyState;
use std::collections::BTreeMap;
use std::io::Result;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// What each descriptor of a session is, in the order of [`Attachment::descriptors`].
const ROLES: [&str; 3] = ["device", "ledger", "abort"];

fn name(session: SessionId, role: &str) -> String {
    format!("{}.{role}", hex::encode(session))
}

/// Puts a session's descriptors into the store.
pub(super) fn keep(session: SessionId, descriptors: &[BorrowedFd<'_>]) {
    for (descriptor, role) in descriptors.iter().zip(ROLES) {
        let name = name(session, role);
        let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
        log(sd_notify::notify_with_fds(&state, &[*descriptor]));
    }
}

/// Takes a session's descriptors out of the store.
pub(super) fn forget(session: SessionId) {
    for role in ROLES {
        let name = name(session, role);
        log(sd_notify::notify(&[
            NotifyState::FdStoreRemove,
            NotifyState::FdName(&name),
        ]));
    }
}

fn log(sent: Result<()>) {
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd's descriptor store");
    }
}

/// What the store gave back. To be called once, before the daemon opens anything.
pub(super) fn taken_back() -> BTreeMap<SessionId, Arc<dyn Reach>> {
    let Ok(inherited) = sd_notify::listen_fds_with_names() else {
        return BTreeMap::new();
    };
    let mut found: BTreeMap<SessionId, BTreeMap<String, OwnedFd>> = BTreeMap::new();
    for (descriptor, name) in inherited {
        // SAFETY: systemd passed this descriptor to this very process (sd_listen_fds(3) compares LISTEN_PID), nothing has
        // taken it yet, and this is called once.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        if let Err(error) = rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC) {
            tracing::warn!(%error, "an inherited descriptor");
        }
        if let Some((session, role)) = parse(&name) {
            found.entry(session).or_default().insert(role, descriptor);
        }
    }
    let attachments = found.into_iter().filter_map(|(session, mut roles)| {
        let [device, ledger, abort] = ROLES.map(|role| roles.remove(role));
        let attachment = Attachment::new(device?, ledger?, abort)
            .inspect_err(|error| tracing::warn!(error, "descriptors that were kept are of no use"));
        Some((session, Arc::new(attachment.ok()?) as Arc<dyn Reach>))
    });
    attachments.collect()
}

fn parse(name: &str) -> Option<(SessionId, String)> {
    let (session, role) = name.split_once('.')?;
    let session = hex::decode(session).ok()?.try_into().ok()?;
    Some((session, role.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_back_to_its_session() {
        let session = [0xab; 16];
        assert_eq!(
            parse(&name(session, "device")),
            Some((session, "device".to_owned()))
        );
        for other in ["stored", "abcd.device", ""] {
            assert_eq!(parse(other), None);
        }
    }
}
