//! The runs of one slot file: which are published, which are in use, which wait until their release is durable.

use super::commit::Seq;
use super::format::seal::Seal;
use std::collections::BTreeMap;

/// Runs one bitmap record covers: 4 GiB of slots.
pub(crate) const PAGE_RUNS: u64 = 32_768;
/// Bytes of a bitmap record.
pub(crate) const PAGE_BYTES: usize = 4096;

#[derive(Default)]
struct Page {
    /// Named by a chunk record in storage: what the bitmap record says.
    published: Bits,
    /// Published, or written and about to be, or freed by a commit that is not durable.
    used: Bits,
    /// Of the bitmap record, if there is one.
    seal: Option<Seal>,
}

struct Bits(Box<[u8]>);

impl Default for Bits {
    fn default() -> Self {
        Self(vec![0; PAGE_BYTES].into())
    }
}

impl Bits {
    fn get(&self, bit: u64) -> bool {
        self.0
            .get((bit / 8) as usize)
            .is_some_and(|byte| byte & (1 << (bit % 8)) != 0)
    }

    fn set(&mut self, bit: u64, value: bool) {
        if let Some(byte) = self.0.get_mut((bit / 8) as usize) {
            if value {
                *byte |= 1 << (bit % 8)
            } else {
                *byte &= !(1 << (bit % 8))
            }
        }
    }

    fn first_clear(&self) -> Option<u64> {
        let at = self.0.iter().position(|byte| *byte != 0xff)?;
        let bit = self.0.get(at).map_or(0, |byte| byte.trailing_ones());
        Some(at as u64 * 8 + u64::from(bit))
    }
}

/// A set of runs.
#[derive(Default)]
pub(crate) struct RunSet(BTreeMap<u64, Bits>);

impl RunSet {
    /// False if it was there before.
    pub(crate) fn insert(&mut self, run: u64) -> bool {
        let page = self.0.entry(run / PAGE_RUNS).or_default();
        let is_new = !page.get(run % PAGE_RUNS);
        page.set(run % PAGE_RUNS, true);
        is_new
    }

    pub(crate) fn contains(&self, run: u64) -> bool {
        self.0
            .get(&(run / PAGE_RUNS))
            .is_some_and(|page| page.get(run % PAGE_RUNS))
    }

    /// The bitmap records that say so, by page.
    pub(crate) fn records(&self) -> BTreeMap<u64, Vec<u8>> {
        let pages = self.0.iter();
        pages.map(|(page, bits)| (*page, bits.0.to_vec())).collect()
    }
}

/// A run allocator. Pages are loaded by the caller, so that this module does no I/O.
#[derive(Default)]
pub(crate) struct Runs {
    pages: BTreeMap<u64, Page>,
    quarantine: Vec<(Seq, u64)>,
}

impl Runs {
    pub(crate) fn has_page(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    /// Takes in a bitmap record, or its absence.
    pub(crate) fn load(&mut self, page: u64, record: Option<(&[u8], Seal)>) {
        let mut loaded = Page::default();
        if let Some((bytes, seal)) = record {
            loaded.seal = Some(seal);
            for bits in [&mut loaded.published, &mut loaded.used] {
                for (to, from) in bits.0.iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
        }
        self.pages.insert(page, loaded);
    }

    /// Whether a run of a loaded page is in use; those of others are taken to be.
    pub(crate) fn is_used(&self, run: u64) -> bool {
        self.pages
            .get(&(run / PAGE_RUNS))
            .is_none_or(|page| page.used.get(run % PAGE_RUNS))
    }

    /// Takes `wanted` if it is free.
    pub(crate) fn take(&mut self, wanted: u64) -> bool {
        let Some(page) = self.pages.get_mut(&(wanted / PAGE_RUNS)) else {
            return false;
        };
        let bit = wanted % PAGE_RUNS;
        if page.used.get(bit) {
            return false;
        }
        page.used.set(bit, true);
        true
    }

    /// Takes the first free run of a loaded page.
    pub(crate) fn take_from(&mut self, page_number: u64) -> Option<u64> {
        let page = self.pages.get_mut(&page_number)?;
        let bit = page.used.first_clear()?;
        page.used.set(bit, true);
        Some(page_number * PAGE_RUNS + bit)
    }

    /// Gives back a run that no commit ever named.
    pub(crate) fn give_back(&mut self, run: u64) {
        if let Some(page) = self.pages.get_mut(&(run / PAGE_RUNS)) {
            page.used.set(run % PAGE_RUNS, false);
        }
    }

    /// The bitmap record of a page after `added` were published and `freed` no longer are.
    pub(crate) fn record_after(&self, page_number: u64, added: &[u64], freed: &[u64]) -> Vec<u8> {
        let mut bits = Bits::default();
        if let Some(page) = self.pages.get(&page_number) {
            bits.0.copy_from_slice(&page.published.0);
        }
        for (runs, value) in [(added, true), (freed, false)] {
            for run in runs.iter().filter(|run| **run / PAGE_RUNS == page_number) {
                bits.set(run % PAGE_RUNS, value);
            }
        }
        bits.0.into_vec()
    }

    /// The seal of a page's bitmap record.
    pub(crate) fn seal_of(&self, page_number: u64) -> Option<&Seal> {
        self.pages.get(&page_number).and_then(|page| page.seal.as_ref())
    }

    /// Notes that commit `seq` published `added` and freed `freed`, by these bitmap records.
    pub(crate) fn committed(&mut self, seq: Seq, added: &[u64], freed: &[u64], records: &[(u64, Seal)]) {
        for (number, seal) in records {
            if let Some(page) = self.pages.get_mut(number) {
                page.seal = Some(*seal);
            }
        }
        for (runs, value) in [(added, true), (freed, false)] {
            for run in runs {
                if let Some(page) = self.pages.get_mut(&(run / PAGE_RUNS)) {
                    page.published.set(run % PAGE_RUNS, value);
                }
            }
        }
        self.quarantine.extend(freed.iter().map(|run| (seq, *run)));
    }

    /// The runs whose release became durable; they are free from now on.
    pub(crate) fn release(&mut self, durable: Seq) -> Vec<u64> {
        let (free, kept): (Vec<_>, Vec<_>) = self.quarantine.drain(..).partition(|(seq, _)| *seq <= durable);
        self.quarantine = kept;
        for (_, run) in &free {
            self.give_back(*run);
        }
        free.into_iter().map(|(_, run)| run).collect()
    }

    /// Whether a release still waits.
    pub(crate) fn is_settled(&self) -> bool {
        self.quarantine.is_empty()
    }

    /// Every published run of the loaded pages.
    #[cfg(test)]
    pub(crate) fn published(&self) -> Vec<u64> {
        let pages = self.pages.iter();
        pages
            .flat_map(|(number, page)| {
                (0..PAGE_RUNS)
                    .filter(|bit| page.published.get(*bit))
                    .map(move |bit| number * PAGE_RUNS + bit)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_run_is_reused_only_after_its_release_is_durable() {
        let mut runs = Runs::default();
        runs.load(0, None);
        assert!(runs.take(3));
        runs.committed(Seq(1), &[3], &[], &[]);
        assert_eq!(runs.published(), [3]);
        runs.committed(Seq(2), &[], &[3], &[]);
        assert!(!runs.take(3));
        assert!(runs.release(Seq(1)).is_empty());
        assert!(!runs.take(3));
        assert_eq!(runs.release(Seq(2)), [3]);
        assert!(runs.is_settled() && runs.take(3));
    }

    #[test]
    fn a_page_gives_each_run_once() {
        let mut runs = Runs::default();
        runs.load(1, None);
        for expected in 0..PAGE_RUNS {
            assert_eq!(runs.take_from(1), Some(PAGE_RUNS + expected));
        }
        assert_eq!(runs.take_from(1), None);
    }
}
