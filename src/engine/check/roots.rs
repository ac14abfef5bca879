//! Roots: whether the records are those that were last written.

use super::repair::Fix;
use super::{Check, Fault};
use crate::engine::error::Result;
use crate::engine::keys::DomainKeys;
use crate::engine::scan::{self, Mismatch};
use crate::engine::types::Domain;
use std::cell::Cell;
use std::sync::Arc;

const PHASE: &str = "roots";
/// Of an inode.
const ROWS_DIFFER: &str = "its records are not those that were last written: some were put back as they once were, removed or added";
/// Of a domain.
const ROOT_DIFFERS: &str = "which inodes there are, and what their records say, is not what was last written: some records \
                            were put back as they once were, removed or added";

impl Check<'_> {
    /// Compares what there is with the sums of what was written. They are set right only if that is to be `accepted`: nobody
    /// can say what is missing, or was put back.
    pub(super) fn check_roots(&mut self, accepted: bool) -> Result<()> {
        for domain in self.access.reached() {
            let keys = Arc::clone(self.access.keys_of(domain)?);
            if keys.has_roots() {
                let mut found = Vec::new();
                let scanned = self.scan(&keys, &mut found);
                self.tolerate(PHASE, scanned)?;
                for mismatch in found {
                    self.tell_mismatch(domain, mismatch, accepted);
                }
            }
        }
        Ok(())
    }

    fn scan(&mut self, keys: &DomainKeys, found: &mut Vec<Mismatch>) -> Result<()> {
        let total = self.core.committer.holds(keys.domain()).inodes;
        self.progress(PHASE, 0, Some(total));
        let done = Cell::new(0);
        let go_on = |inodes| {
            done.set(inodes);
            self.access.go_on()
        };
        let scanned = scan::scan(&self.core.store, keys, &go_on, &mut |mismatch| {
            found.push(mismatch)
        });
        self.progress(PHASE, done.get(), Some(total));
        scanned.map(|_| ())
    }

    fn tell_mismatch(&mut self, domain: Domain, mismatch: Mismatch, accepted: bool) {
        let (ino, detail, fix) = match mismatch {
            Mismatch::Rows(ino, change) => (Some(ino), ROWS_DIFFER, Some(Fix::Rows(ino, change))),
            Mismatch::Root(change) => (None, ROOT_DIFFERS, Some(Fix::Root(domain, change))),
            Mismatch::NoRoot => (None, "the root record fails authentication", None),
            Mismatch::Unknown => (None, "there are rows that are none of its own", None),
            // Both were found by what looks at each record.
            Mismatch::Record(_) | Mismatch::Stray(_) => return,
        };
        let who = match (ino, domain) {
            (Some(_), _) => String::new(),
            (None, Domain::FIRST) => "the volume: ".to_owned(),
            (None, Domain(number)) => format!("key domain {number}: "),
        };
        let detail = format!("{who}{detail}");
        self.found(Fault::Root, ino, detail, fix.filter(|_| accepted));
    }
}
