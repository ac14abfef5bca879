//! Inodes without a name. They live until the kernel forgets them; then, or at the next mount, their rows go, and
//! once that is durable their slot file, and last the orphan row that remembers it.

use super::batch::Batch;
use super::commit::Seq;
use super::core::{Access, Core};
use super::domains::KeyDomain;
use super::error::{Error, Result};
use super::format::rowkey::{self, Family, Table};
use super::publish::Publishing;
use super::sync::{Mutex, rank};
use super::types::{Domain, Ino};
use std::collections::BTreeSet;

/// Orphans waiting beyond which the reclaiming thread is woken before its time.
const WAITING_MAX: usize = 256;

/// Inodes without a name, by what they wait for.
#[derive(Default)]
pub(crate) struct Orphans {
    /// For the kernel to forget them.
    held: Mutex<BTreeSet<Ino>, rank::Orphans>,
    /// To be reclaimed.
    waiting: Mutex<BTreeSet<Ino>, rank::Orphans>,
    /// For their deletion to be durable.
    slot_files: Mutex<Vec<(Seq, Ino)>, rank::Orphans>,
}

impl Orphans {
    /// Takes the next that waits to be reclaimed, from `from` on.
    fn next(&self, from: Ino) -> Option<Ino> {
        let mut waiting = self.waiting.lock();
        let next = waiting.range(from..).next().copied()?;
        waiting.remove(&next);
        Some(next)
    }

    /// Forgets those of inodes that are gone.
    pub(crate) fn drop_all(&self, gone: impl Fn(Ino) -> bool) {
        self.held.lock().retain(|ino| !gone(*ino));
        self.waiting.lock().retain(|ino| !gone(*ino));
        self.slot_files.lock().retain(|(_, ino)| !gone(*ino));
    }

    /// The domains of which slot files are to be removed.
    fn domains_of_slot_files(&self) -> BTreeSet<Domain> {
        let waiting = self.slot_files.lock();
        waiting.iter().map(|(_, ino)| ino.domain()).collect()
    }

    /// Whether none waits to be reclaimed of a domain that is `live`.
    pub(crate) fn is_idle(&self, live: impl Fn(Domain) -> bool) -> bool {
        // No gate is looked at under this lock.
        let waiting: BTreeSet<_> = self.waiting.lock().iter().map(|ino| ino.domain()).collect();
        let mut waiting = waiting.into_iter().chain(self.domains_of_slot_files());
        !waiting.any(live)
    }
}

impl Core {
    /// Takes back references of the kernel's. Needs no key.
    pub(crate) fn forget(&self, ino: Ino, count: u64) {
        if self.nodes.forgotten(ino, count) {
            self.reclaim_unheld(ino);
        }
    }

    /// Notes an inode that lost its last name; the commit that took it is made.
    pub(crate) fn orphaned(&self, ino: Ino) {
        self.orphans.held.lock().insert(ino);
        // A forget that came before found nothing held; one that comes later does.
        if !self.nodes.is_known(ino) {
            self.reclaim_unheld(ino);
        }
    }

    fn reclaim_unheld(&self, ino: Ino) {
        if !self.orphans.held.lock().remove(&ino) {
            return;
        }
        let waiting = {
            let mut waiting = self.orphans.waiting.lock();
            waiting.insert(ino);
            waiting.len()
        };
        if waiting == WAITING_MAX {
            self.upkeep_bell.ring();
        }
    }

    /// Reclaims every orphan that waits, each under access of its own. One that fails keeps no other from it, as long as
    /// there is room for its deletion.
    pub(crate) fn reclaim_all(&self) -> Result<()> {
        let mut outcome = Ok(());
        if self.refuse_lost(Domain::FIRST).is_err() {
            return outcome;
        }
        let mut from = Ino::default();
        while let Some(ino) = self.orphans.next(from) {
            let access = self.refuse_lost(ino.domain());
            let access = match access.and_then(|()| self.drain(ino.domain())) {
                Ok(access) => access,
                // They wait for the key.
                Err(error) => {
                    self.orphans.waiting.lock().insert(ino);
                    let Some(next) = ino.domain().0.checked_add(1) else {
                        break;
                    };
                    if ino.domain() == Domain::FIRST {
                        return outcome.and(Err(error));
                    }
                    from = Domain(next).number(0);
                    continue;
                }
            };
            let done = access.reclaim_waiting(ino);
            let is_no_room = done.as_ref().is_err_and(Error::is_no_room);
            outcome = outcome.and(done);
            if is_no_room {
                break;
            }
        }
        outcome
    }

    /// Removes the slot files whose inodes are durably gone. Those of a dark domain wait for its key.
    pub(crate) fn remove_slot_files(&self) -> Result<()> {
        let domains = self.orphans.domains_of_slot_files();
        let mut outcome = Ok(());
        for domain in domains {
            outcome = outcome.and(match self.drain(domain) {
                Ok(access) => access.remove_own_slot_files(),
                Err(error) if domain == Domain::FIRST => Err(error),
                Err(_) => Ok(()),
            });
        }
        outcome
    }

    /// Notes the orphans that an earlier mount left in a domain, once its keys are there.
    pub(crate) fn know_orphans(&self, domain: &KeyDomain) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        let access = self.drain(domain.id)?;
        match domain.begin_orphans() {
            true => access.collect_orphans(),
            false => Ok(()),
        }
    }

    /// Lets none be reclaimed of those that wait; they are given out instead.
    pub(crate) fn withhold_orphans(&self) -> BTreeSet<Ino> {
        std::mem::take(&mut *self.orphans.waiting.lock())
    }

    /// Lets these be reclaimed.
    pub(crate) fn release_orphans(&self, inodes: impl Iterator<Item = Ino>) {
        self.orphans.waiting.lock().extend(inodes);
    }

    /// The kernel is gone, and every reference of its with it.
    pub(crate) fn forget_all(&self) {
        self.nodes.forget_all();
        let held = std::mem::take(&mut *self.orphans.held.lock());
        self.orphans.waiting.lock().extend(held);
    }
}

impl Access<'_> {
    /// Notes every orphan that an earlier mount left in this domain.
    pub(crate) fn collect_orphans(&self) -> Result<()> {
        let (from, to) = rowkey::all(self.home().id, rowkey::Kind::Orphan);
        self.store.scan(Family::Meta, &from, &to, |key, sealed| {
            let ino = Ino(rowkey::last_number(key).unwrap_or_default());
            match self.open_row(ino, key, sealed) {
                Ok(_) => drop(self.orphans.waiting.lock().insert(ino)),
                // Whether it has a name is for fsck.
                Err(error) => {
                    tracing::error!(inode = ino.0, %error, "the mark of an unlinked inode is damaged")
                }
            }
            Ok(true)
        })
    }

    pub(crate) fn put_orphan(&self, batch: &mut Batch, ino: Ino) -> Result<()> {
        self.put_row(batch, rowkey::orphan(ino), &[], None).map(|_| ())
    }

    fn delete_orphan(&self, batch: &mut Batch, ino: Ino) -> Result<()> {
        let key = rowkey::orphan(ino);
        let seal = self.stored_seal(&key)?;
        self.delete_row(batch, key, seal.as_ref())
    }

    /// Reclaims an orphan that waited. One that fails waits for the next mount, or, if there was no room, for the next time.
    fn reclaim_waiting(&self, ino: Ino) -> Result<()> {
        match self.reclaim(ino) {
            // Only the slot file is left, and the row that says so.
            Err(Error::Posix(libc::ESTALE)) => {
                self.orphans.slot_files.lock().push((Seq::default(), ino));
                Ok(())
            }
            Err(error) if error.is_no_room() => {
                self.orphans.waiting.lock().insert(ino);
                Err(error)
            }
            other => other,
        }
    }

    fn reclaim(&self, ino: Ino) -> Result<()> {
        let node = self.node(ino)?;
        let _right = Publishing::begin(&node);
        let mut state = node.state.write();
        let state = &mut *state;
        if state.record.nlink > 0 || state.record.children > 0 {
            // The second is for fsck: what is in it has no other way to be found.
            return Ok(());
        }
        if self.nodes.is_known(ino) {
            // Found by its number meanwhile: it waits to be forgotten again.
            self.orphaned(ino);
            return Ok(());
        }
        let mut batch = self.erase_chunks(&node)?;
        self.take_pending(state);
        if state.record.xattrs > 0 {
            let row = |place| rowkey::entry(Table::Xattrs, ino, place);
            batch.delete_range(Family::Meta, row(0), row(u64::MAX));
        }
        let has_slot_file = state.file.has_slot_file || self.slots.exists(ino);
        if has_slot_file {
            batch.delete_range(
                Family::Meta,
                rowkey::bitmap(ino, 0),
                rowkey::bitmap(ino, u64::MAX),
            );
        }
        if !has_slot_file {
            self.delete_orphan(&mut batch, ino)?;
        }
        // What else there is of it goes without a note: this record is what covers it.
        self.delete_row(&mut batch, rowkey::inode(ino), Some(&state.stored.seal))?;
        batch.count_inodes(ino.domain(), -1);
        batch.count_blocks(ino.domain(), state.published.blocks, 0);
        let seq = self.commit(batch)?;
        // Whoever still holds the node must find nothing to publish: it would bring the inode back.
        state.file.dirty = false;
        self.nodes.remove(ino);
        self.active.remove(ino, state);
        self.domains.of(ino)?.keyring.forget(ino);
        if has_slot_file {
            self.orphans.slot_files.lock().push((seq, ino));
        }
        Ok(())
    }

    /// Removes the slot files of this domain whose inodes are durably gone.
    fn remove_own_slot_files(&self) -> Result<()> {
        let durable = self.committer.durable();
        let home = self.home().id;
        let gone: BTreeSet<_> = {
            let mut waiting = self.orphans.slot_files.lock();
            let is_gone = |(seq, ino): &(Seq, Ino)| *seq <= durable && ino.domain() == home;
            let (gone, kept): (Vec<_>, _) = waiting.drain(..).partition(is_gone);
            *waiting = kept;
            gone.into_iter().map(|(_, ino)| ino).collect()
        };
        if gone.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::default();
        let mut removed = gone.iter().map(|ino| {
            self.delete_orphan(&mut batch, *ino)?;
            self.slots.remove(*ino)
        });
        let outcome = removed.try_for_each(std::convert::identity);
        let outcome = outcome.and_then(|()| self.commit(batch).map(|_| ()));
        if outcome.is_err() {
            let again = gone.into_iter().map(|ino| (durable, ino));
            self.orphans.slot_files.lock().extend(again);
        }
        outcome
    }
}
