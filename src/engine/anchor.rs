//! The anchor: how far the volume is known to the KMS to have come (docs/integrity.md). What was put back as a whole, all records and
//! roots consistent with each other, is known by it; and a copy that was mounted elsewhere.
//!
//! The first domain's root is anchored, which covers those of all others. Told by the thread that fetches keys, never on the way of
//! an fsync(2); before anything is told, the seal file has it.

use super::batch::Batch;
use super::core::Core;
use super::error::Result;
use super::format::root::{Anchors, RootRecord};
use super::keyring::Keyring;
use super::keys::DomainKeys;
use super::keyservice::{Anchor, KeyError};
use super::open::OpenError;
use super::types::Domain;
use super::volume::Options;
use std::sync::atomic::Ordering;

/// What the volume would be anchored as; none in a format without roots.
pub(crate) fn of_root(keys: &DomainKeys, root: &RootRecord) -> Option<Anchor> {
    let mac = keys.anchor_mac(root.commit_seq, root.sum.as_ref()?)?;
    Some(Anchor {
        commit_seq: root.commit_seq,
        mac,
        ino_limit: root.ino_limit,
    })
}

/// What a volume that is being opened turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// What the KMS knows, or later.
    Good(Anchors),
    /// Nothing is known of it, and it knows of nothing.
    New,
    /// It was anchored, and the KMS knows nothing of that, or less.
    Forgotten,
    /// It lacks so many operations of what the KMS knows.
    Older(u64),
    /// The KMS knows of another history.
    Forked,
}

/// Compares the root that was found, and what the seal file says, with the anchor that the KMS has.
pub(crate) fn stand(
    keys: &DomainKeys,
    root: &RootRecord,
    sealed: Anchors,
    found: Option<Anchor>,
) -> Standing {
    let reached = |anchor: Anchor| anchor.commit_seq;
    if sealed.accepted.map(reached) > found.map(reached) {
        return Standing::Forgotten;
    }
    let Some(found) = found else {
        return Standing::New;
    };
    let missing = found.commit_seq.saturating_sub(root.commit_seq);
    if missing > 0 {
        return Standing::Older(missing);
    }
    let mut known = [sealed.accepted, sealed.proposed].into_iter().flatten();
    let is_known = known.any(|known| known.agrees(&found));
    // Where the numbers are the same, the roots must be.
    let is_same =
        root.commit_seq > found.commit_seq || of_root(keys, root).is_some_and(|here| here.mac == found.mac);
    match is_known && is_same {
        // What was proposed may be on its way still: it is told again, and nothing else before.
        true => Standing::Good(Anchors {
            accepted: Some(found),
            ..sealed
        }),
        false => Standing::Forked,
    }
}

/// Checks a volume that is being opened. What the seal file is to say of anchors from now on; and the anchor of the history that is
/// given up, if a restored volume is taken in.
pub(crate) fn check(
    keyring: &Keyring,
    keys: &DomainKeys,
    root: &RootRecord,
    sealed: Anchors,
    options: &Options,
) -> std::result::Result<(Anchors, Option<Anchor>), OpenError> {
    if !keys.has_roots() || !options.anchor {
        return Ok((sealed, None));
    }
    let found = keyring.service().anchor()?;
    match stand(keys, root, sealed, found) {
        Standing::Good(anchors) => Ok((anchors, None)),
        // What was proposed first may be on its way still.
        Standing::New => Ok((sealed, None)),
        // From where it is known there, it goes on.
        Standing::Forgotten if options.accept_kms_restore => Ok((
            Anchors {
                accepted: found,
                proposed: None,
            },
            None,
        )),
        Standing::Forgotten if options.accept_restore => Ok((sealed, found)),
        Standing::Forgotten => Err(KeyError::RolledBack.into()),
        Standing::Older(_) | Standing::Forked if options.accept_restore => Ok((sealed, found)),
        Standing::Older(missing) => Err(OpenError::Older(missing)),
        Standing::Forked => Err(OpenError::Forked),
    }
}

impl Core {
    /// Tells the KMS how far the volume has come, as the seal file has it.
    pub(crate) fn tell_anchor(&self) {
        // What a backup had proposed is of the history that is being given up.
        if self.is_restored.load(Ordering::Acquire) {
            return;
        }
        let anchors = self.sealed.lock().anchors;
        let Some(to) = anchors.outstanding() else {
            return;
        };
        let first = self.domains.first();
        let told = first
            .keyring
            .with_volume_key(|service| service.advance_anchor(anchors.accepted, to));
        match told {
            Ok(()) => self.sealed.lock().anchors.accept(to),
            Err(KeyError::AnchorConflict) => {
                first.trust.lose();
                tracing::error!(
                    "the KMS knows of another history of this volume: a copy of it is, or was, mounted elsewhere; nothing more is changed here"
                );
            }
            // It is told again.
            Err(error) => tracing::debug!(%error, "the KMS was not told how far the volume has come"),
        }
    }

    /// What is to be anchored next, if that is wanted, by a root that is durable.
    pub(crate) fn anchor_candidate(&self, keys: &DomainKeys, root: &RootRecord) -> Option<Anchor> {
        let is_wanted =
            self.options.anchor && !self.options.read_only && !self.is_restored.load(Ordering::Acquire);
        of_root(keys, root).filter(|_| is_wanted && !self.domains.first().trust.is_lost())
    }

    /// Has the KMS take in a volume that was put back, if it was: its history begins anew here. The seal file has that before.
    pub(crate) fn take_in_restored(&self) -> Result<()> {
        if !self.is_restored.load(Ordering::Acquire) || self.options.read_only {
            return Ok(());
        }
        tracing::warn!(
            "the volume was put back, or is a copy, which its user accepts: its history begins anew"
        );
        let access = self.drain(Domain::FIRST)?;
        let keys = access.keys_of(Domain::FIRST)?;
        // With the limit of inode numbers that the lost history had come to.
        self.committer.commit(keys, Batch::default())?;
        let root = self.committer.root();
        self.committer.sync_to(self.committer.committed())?;
        let Some(to) = of_root(keys, &root) else {
            return Ok(());
        };
        {
            let mut sealed = self.sealed.lock();
            let mut next = *sealed;
            next.anchors.proposed = Some(to);
            super::seal::write(&self.dir, keys, next)?;
            *sealed = next;
        }
        let keyring = &self.domains.first().keyring;
        let told = keyring.with_volume_key(|service| service.accept_restore(to));
        told.map_err(|error| super::keyring::key_failure(Domain::FIRST.root(), &error))?;
        self.sealed.lock().anchors.accept(to);
        self.is_restored.store(false, Ordering::Release);
        Ok(())
    }
}
