//! The key domains of a volume: the first, which every operation needs, and those of subtrees under CMKs of their own.
//! docs/domains.md has the rules.

use super::bell::Bell;
use super::dek::Misses;
use super::error::{Error, Result};
use super::format::domain::{DomainRecord, DomainState};
use super::keyring::Keyring;
use super::keyservice::Dependants;
use super::nursery::Nursery;
use super::sync::{Mutex, RwLock, rank};
use super::types::{Domain, Ino};
use super::verification::Trust;
use super::watch::Lease;
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Domains in one part of the table.
const PART: usize = 256;

/// A domain whose keys may be had.
pub(crate) struct KeyDomain {
    pub(crate) id: Domain,
    pub(crate) keyring: Keyring,
    pub(crate) nursery: Nursery,
    pub(crate) misses: Misses,
    /// Whether what storage holds of it is what was written.
    pub(crate) trust: Trust,
    /// Whether somebody here wants it dark, whatever the KMS says. Held over every change of the key's state.
    pub(crate) is_shut_by_hand: Mutex<bool, rank::Darkening>,
    /// Wakes the thread that watches the CMK's state.
    pub(crate) bell: Bell,
    /// The lease that the watch begins with; it takes it.
    pub(crate) lease: Mutex<Option<Lease>, rank::Domains>,
    /// What the KMS was told last that depends on the key, and when.
    pub(crate) reported: Mutex<Option<(Dependants, Instant)>, rank::Domains>,
    /// The KMS says that the CMK is destroyed.
    is_destroyed: AtomicBool,
    /// The orphans that an earlier mount left in it are noted.
    are_orphans_known: AtomicBool,
}

impl KeyDomain {
    pub(crate) fn new(
        id: Domain,
        keyring: Keyring,
        trust: Trust,
        dek_prefetch: usize,
        lease: Option<Lease>,
    ) -> Self {
        Self {
            id,
            keyring,
            nursery: Nursery::new(dek_prefetch),
            misses: Misses::default(),
            trust,
            is_shut_by_hand: Mutex::numbered(id.0.into(), false),
            bell: Bell::default(),
            lease: Mutex::new(lease),
            reported: Mutex::new(None),
            is_destroyed: AtomicBool::new(false),
            are_orphans_known: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_destroyed(&self) -> bool {
        self.is_destroyed.load(Ordering::Acquire)
    }

    pub(crate) fn note_destroyed(&self) {
        self.is_destroyed.store(true, Ordering::Release);
    }

    /// True once: whoever hears it notes the orphans.
    pub(crate) fn begin_orphans(&self) -> bool {
        !self.are_orphans_known.swap(true, Ordering::AcqRel)
    }
}

type Part = Box<[OnceLock<Box<KeyDomain>>]>;

/// What is known of a domain without any key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) state: DomainState,
    /// Whether an entry leads to its root.
    pub(crate) is_named: bool,
}

/// The domains of an open volume. One that is there stays in memory until the volume is closed.
pub(crate) struct Domains {
    first: KeyDomain,
    others: Box<[OnceLock<Part>]>,
    /// The others, those included that are removed or erased. What else the volume says of them is the first domain's, and goes
    /// with its keys.
    known: RwLock<BTreeMap<Domain, Known>, rank::Domains>,
    /// Held by whoever makes one.
    pub(crate) making: Mutex<(), rank::NewDomain>,
}

impl Domains {
    pub(crate) fn new(first: KeyDomain) -> Self {
        Self {
            first,
            others: (0..PART).map(|_| OnceLock::new()).collect(),
            known: RwLock::new(BTreeMap::new()),
            making: Mutex::new(()),
        }
    }

    pub(crate) fn first(&self) -> &KeyDomain {
        &self.first
    }

    fn place(&self, domain: Domain) -> Option<&OnceLock<Box<KeyDomain>>> {
        let (part, index) = (usize::from(domain.0) / PART, usize::from(domain.0) % PART);
        let new_part = || (0..PART).map(|_| OnceLock::new()).collect();
        self.others.get(part)?.get_or_init(new_part).get(index)
    }

    /// A domain that keys may be had of.
    ///
    /// # Errors
    /// [`Error::KeyErased`] for an erased one; ESTALE if there is none of that number.
    pub(crate) fn get(&self, domain: Domain) -> Result<&KeyDomain> {
        if domain == Domain::FIRST {
            return Ok(&self.first);
        }
        if let Some(found) = self.place(domain).and_then(OnceLock::get) {
            return Ok(found);
        }
        match self.known(domain).map(|known| known.state) {
            Some(DomainState::Erased) => Err(Error::KeyErased),
            _ => Err(Error::Posix(libc::ESTALE)),
        }
    }

    /// The domain of an inode.
    pub(crate) fn of(&self, ino: Ino) -> Result<&KeyDomain> {
        self.get(ino.domain())
    }

    /// Every domain that keys may be had of, in ascending order.
    pub(crate) fn all(&self) -> impl Iterator<Item = &KeyDomain> {
        let parts = self.others.iter().filter_map(OnceLock::get);
        let others = parts.flat_map(|part| part.iter().filter_map(OnceLock::get));
        std::iter::once(&self.first).chain(others.map(Box::as_ref))
    }

    /// The same without the first.
    pub(crate) fn others(&self) -> impl Iterator<Item = &KeyDomain> {
        self.all().skip(1)
    }

    /// Whether there was never another than the first.
    pub(crate) fn is_single(&self) -> bool {
        self.known.read().is_empty()
    }

    /// Adds a domain whose record is committed.
    pub(crate) fn add(&self, domain: KeyDomain, record: &DomainRecord) {
        let id = domain.id;
        if let Some(place) = self.place(id) {
            // A number is given out once.
            let _first = place.set(Box::new(domain));
        }
        self.note(id, record);
    }

    /// What is known of a domain but the first.
    pub(crate) fn known(&self, domain: Domain) -> Option<Known> {
        self.known.read().get(&domain).copied()
    }

    /// The same of all of them.
    pub(crate) fn all_known(&self) -> Vec<(Domain, Known)> {
        let known = self.known.read();
        known.iter().map(|(id, known)| (*id, *known)).collect()
    }

    /// Notes a record that is committed.
    pub(crate) fn note(&self, domain: Domain, record: &DomainRecord) {
        let known = Known {
            state: record.state,
            is_named: !record.name.is_empty(),
        };
        self.known.write().insert(domain, known);
    }

    /// A number that was never given out. To be called with `making` held.
    pub(crate) fn next(&self) -> Result<Domain> {
        let last = self.known.read().keys().next_back().map_or(0, |last| last.0);
        last.checked_add(1).map(Domain).ok_or(Error::Posix(libc::ENOSPC))
    }
}
