//! The files below VOLUME/data: each is the slot file of an inode that has runs.

use super::repair::Fix;
use super::{Check, Fault};
use crate::engine::error::Result;
use crate::engine::types::FileKind;

impl Check<'_> {
    pub(super) fn check_slot_files(&mut self) -> Result<()> {
        let core = self.core;
        let mut done = 0_u64;
        core.slots.each_file(|file| {
            self.access.go_on()?;
            done += 1;
            if done.is_multiple_of(super::records::PROGRESS_ROWS) {
                self.progress("slot files", done, None);
            }
            let Some(ino) = file.ino else {
                let detail = format!("{} is no slot file", file.path.display());
                self.found(Fault::Foreign, None, detail, None);
                return Ok(());
            };
            // Of a domain whose keys may not be used nothing is known.
            if self.access.keys_of(ino.domain()).is_err() {
                return Ok(());
            }
            if self.damaged.contains(&ino) || self.unlinked.contains(&ino) {
                return Ok(());
            }
            match self.inodes.get(&ino) {
                Some(known) if known.kind == Some(FileKind::Regular) => {
                    let found = &known.found;
                    let has_runs = known.runs > 0 || found.has_runs || found.is_content_damaged;
                    if !has_runs && file.allocated_bytes > 0 {
                        let detail =
                            format!("its slot file takes {} bytes, for nothing", file.allocated_bytes);
                        self.found(
                            Fault::LeakedSpace,
                            Some(ino),
                            detail,
                            Some(Fix::RemoveSlotFile(ino)),
                        );
                    }
                }
                _ => {
                    let detail = "a slot file of no inode".to_owned();
                    self.found(
                        Fault::LeakedSpace,
                        Some(ino),
                        detail,
                        Some(Fix::RemoveSlotFile(ino)),
                    );
                }
            }
            Ok(())
        })?;
        self.progress("slot files", done, None);
        Ok(())
    }
}
