//! The descriptors that a mount has handed over.

use super::Reach;
use super::ledger;
use fuse_device::{AbortHandle, FuseDevice};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A clone of a mount's FUSE device, its ledger, and what ends its connection.
pub(crate) struct Attachment {
    device: FuseDevice,
    ledger: File,
    abort: Option<AbortHandle>,
}

impl Attachment {
    /// # Errors
    /// In words: what the descriptors are not.
    pub(crate) fn new(device: OwnedFd, ledger: OwnedFd, abort: Option<OwnedFd>) -> Result<Self, String> {
        let attachment = Self {
            device: device.into(),
            ledger: ledger.into(),
            abort: abort.map(AbortHandle::from),
        };
        ledger::check(&attachment.ledger)?;
        attachment
            .device
            .is_gone()
            .map_err(|error| format!("the first descriptor is no FUSE device: {error}"))?;
        Ok(attachment)
    }

    /// Its descriptors, in the order in which a mount hands them over.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let all = [
            Some(self.device.as_fd()),
            Some(self.ledger.as_fd()),
            self.abort.as_ref().map(AsFd::as_fd),
        ];
        all.into_iter().flatten().collect()
    }
}

impl Reach for Attachment {
    fn invalidate(&self) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("the kernel did not drop what it caches: {error}");
        // Attributes before pages: once they are expired, whoever would write asks the mount, and is refused.
        let mut inodes = Vec::new();
        ledger::read(&self.ledger, |inode| {
            self.device.expire_attributes(inode).map_err(failed)?;
            inodes.push(inode);
            Ok(())
        })?;
        for inode in inodes {
            self.device.drop_pages(inode).map_err(failed)?;
        }
        self.device.drop_names().map_err(failed)?;
        Ok(())
    }

    fn abort(&self) -> Result<(), String> {
        match &self.abort {
            Some(abort) => abort.abort().map_err(|error| error.to_string()),
            None => Err("the mount had no access to fusectl".to_owned()),
        }
    }

    fn is_gone(&self) -> bool {
        self.device.is_gone().unwrap_or(false)
    }
}
