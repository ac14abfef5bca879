//! What one operation commits: changed rows, what they add to the counters, and by how much they change the sums that cover them.

use super::commit::Counted;
use super::format::domain::Usage;
use super::format::rowkey::{self, Cover, Family};
use super::format::rowsum::RowSum;
use super::format::seal::Seal;
use super::keys::DomainKeys;
use super::store::Change;
use super::types::{Domain, Ino};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the log adds to the keys and the value of a change, at most, in bytes.
const CHANGE_BYTES: usize = 24;

/// The changes of one operation, sealed, with what they add to the counters.
#[derive(Default)]
pub(crate) struct Batch {
    pub(super) changes: Vec<Change>,
    /// Whose inodes and blocks are counted, beside the volume's as a whole.
    domain: Domain,
    pub(super) inodes: i64,
    pub(super) blocks: i64,
    /// What a domain is said to hold from now on, whatever it was; none to have nothing said of it any more.
    usage: Option<(Domain, Option<Usage>)>,
    /// By how much the sums change that cover the changed rows.
    pub(super) sums: Sums,
    /// What seals the roots of the domains but the first whose sums change.
    pub(super) keys: Vec<Arc<DomainKeys>>,
    /// A domain all of whose rows go.
    pub(super) ended: Option<Domain>,
}

/// By how much sums of rows change.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) domains: BTreeMap<Domain, RowSum>,
    /// Until the inodes' records take them in.
    inodes: BTreeMap<Ino, RowSum>,
}

impl Batch {
    pub(crate) fn put(&mut self, family: Family, key: Vec<u8>, value: Vec<u8>) {
        self.changes.push(Change::Put(family, key, value));
    }

    pub(crate) fn delete(&mut self, family: Family, key: Vec<u8>) {
        self.changes.push(Change::Delete(family, key));
    }

    pub(crate) fn delete_range(&mut self, family: Family, from: Vec<u8>, to: Vec<u8>) {
        self.changes.push(Change::DeleteRange(family, from, to));
    }

    /// Notes that a row takes the place of another, in the sum that covers both.
    pub(crate) fn note_replaced(
        &mut self,
        keys: &DomainKeys,
        key: &[u8],
        old: Option<&Seal>,
        new: Option<&Seal>,
    ) {
        if !keys.has_roots() {
            return;
        }
        let sum = match rowkey::cover(key) {
            Some(Cover::Domain(domain)) => self.sums.domains.entry(domain).or_default(),
            Some(Cover::Inode(ino)) => self.sums.inodes.entry(ino).or_default(),
            None => return,
        };
        keys.replace_in(sum, key, old, new);
    }

    /// Changes the sum of a domain's records by so much more than its records do.
    pub(crate) fn adjust(&mut self, domain: Domain, change: RowSum) {
        self.sums.domains.entry(domain).or_default().merge(change);
    }

    /// Takes out by how much the sum of an inode's rows changes, for its record.
    pub(crate) fn take_change_of(&mut self, ino: Ino) -> RowSum {
        self.sums.inodes.remove(&ino).unwrap_or_default()
    }

    /// The domains but the first whose sums change.
    pub(crate) fn summed_domains(&self) -> impl Iterator<Item = Domain> {
        let domains = self.sums.domains.keys().copied();
        domains.filter(|domain| *domain != Domain::FIRST)
    }

    /// Hands over what seals the root of a domain.
    pub(crate) fn seal_with(&mut self, keys: Arc<DomainKeys>) {
        self.keys.push(keys);
    }

    /// Whether a change to the rows of an inode has been taken in by no record.
    pub(crate) fn has_loose_change(&self) -> bool {
        !self.sums.inodes.is_empty()
    }

    /// Notes that all rows of a domain go.
    pub(crate) fn end_domain(&mut self, domain: Domain) {
        self.ended = Some(domain);
    }

    /// Counts inodes of a domain, the only one that this batch counts for.
    pub(crate) fn count_inodes(&mut self, domain: Domain, delta: i64) {
        self.domain = domain;
        self.inodes = self.inodes.saturating_add(delta);
    }

    /// Counts blocks; as [`Self::count_inodes`].
    pub(crate) fn count_blocks(&mut self, domain: Domain, before: u64, after: u64) {
        self.domain = domain;
        let delta = i128::from(after) - i128::from(before);
        self.blocks = self.blocks.saturating_add(i64::try_from(delta).unwrap_or(0));
    }

    /// Sets what a domain holds, for whoever makes or ends one; the volume's counters are not changed by it.
    pub(crate) fn set_usage(&mut self, domain: Domain, usage: Option<Usage>) {
        self.usage = Some((domain, usage));
    }

    /// Takes what a domain held off the volume's counters.
    pub(crate) fn discount(&mut self, usage: Usage) {
        let negative = |count: u64| i64::try_from(count).map_or(i64::MIN, |count| -count);
        self.inodes = self.inodes.saturating_add(negative(usage.inodes));
        self.blocks = self.blocks.saturating_add(negative(usage.blocks));
    }

    /// Adds to what is said of domains what this batch says: `before` of those that nothing was said of yet in this commit.
    pub(super) fn note_usage(
        &self,
        before: &BTreeMap<Domain, Counted>,
        said: &mut BTreeMap<Domain, Option<Usage>>,
    ) {
        if let Some((domain, usage)) = self.usage {
            said.insert(domain, usage);
        }
        if self.domain == Domain::FIRST {
            return;
        }
        let usage = said
            .entry(self.domain)
            .or_insert_with(|| before.get(&self.domain).map(|counted| counted.usage));
        // Nothing is counted for a domain that is gone.
        if let Some(usage) = usage {
            usage.inodes = usage.inodes.saturating_add_signed(self.inodes);
            usage.blocks = usage.blocks.saturating_add_signed(self.blocks);
        }
    }

    /// About what it takes in the log.
    pub(super) fn bytes(&self) -> u64 {
        let bytes = |change: &Change| match change {
            Change::Put(_, key, value) => key.len() + value.len(),
            Change::Delete(_, key) => key.len(),
            Change::DeleteRange(_, from, to) => from.len() + to.len(),
        };
        let sum: usize = self
            .changes
            .iter()
            .map(|change| bytes(change) + CHANGE_BYTES)
            .sum();
        sum as u64
    }

    pub(super) fn has_content(&self) -> bool {
        let is_content = |change: &Change| matches!(change, Change::Put(Family::Content, ..));
        self.changes.iter().any(is_content)
    }
}
