//! The processes that write, and what they were told of it.
use crate::c;
use crate::herd::STUCK_S;
use crate::log::Log;
use crate::readers::ready;
use crate::system::{Aligned, Mover, PAGE, map, now, shared_words};
use crate::world::{Random, Role, What, World, fill_page, mix, word_of};
use std::fs::{self, File, OpenOptions};
use std::io::{Error, Result, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{process, ptr, thread};

/// Pages of a file that is written to in place.
pub const SLOTS: usize = 512;
/// Longest record that is appended.
pub const RECORD_MAX: u64 = 6000;
pub const APPENDED_MAX: u64 = 256 << 20;
/// How many writes one fsync or msync covers.
pub const WRITES_PER_SYNC: u64 = 8;

/// What a writer was told of what it wrote: for each page in place, or of a stream of appended bytes.
pub struct Journal {
    pub words: &'static [AtomicU64],
}

#[derive(Clone, Copy)]
pub struct Acknowledged {
    /// Last version of which a write was tried: one more than `accepted` after it failed.
    pub attempted: u64,
    /// Last version of which a write succeeded.
    pub accepted: u64,
    /// Last version that a sync covered.
    pub synced: u64,
}

impl Journal {
    pub fn of(world: &World, role: Role) -> Result<Self> {
        let words = shared_words(&world.state.join(format!("journal-{role:?}")), SLOTS * 3)?;
        Ok(Self { words })
    }

    pub fn get(&self, slot: usize) -> Acknowledged {
        let [attempted, accepted, synced] =
            [0, 1, 2].map(|n| self.words[slot * 3 + n].load(Ordering::SeqCst));
        Acknowledged {
            attempted,
            accepted,
            synced,
        }
    }

    pub fn set(&self, slot: usize, is: Acknowledged) {
        for (n, value) in [is.attempted, is.accepted, is.synced].into_iter().enumerate() {
            self.words[slot * 3 + n].store(value, Ordering::SeqCst);
        }
    }
}

pub fn slot_seed(role: Role, slot: usize, version: u64) -> u64 {
    // Its lower half says which version it is.
    if version == 0 {
        0
    } else {
        (mix((role as u64) << 32 | slot as u64) << 32) | version
    }
}

/// The bytes at `offset` of a stream.
pub fn fill_stream(offset: u64, bytes: &mut [u8]) {
    for (place, byte) in bytes.iter_mut().enumerate() {
        let at = offset + place as u64;
        *byte = mix(at / 8).to_ne_bytes()[(at % 8) as usize];
    }
}

/// What a writer finds.
#[derive(Default, Debug)]
pub struct Findings {
    /// Synced, and not there.
    pub lost_synced: u64,
    /// Accepted, not synced, and not there.
    pub lost_accepted: u64,
    /// Never written so.
    pub wrong: u64,
}

/// Compares a file with its journal, which says thereafter what was found.
pub fn verify(world: &World, role: Role, after_crash: bool) -> Result<Findings> {
    let journal = Journal::of(world, role)?;
    let path = world.written(role);
    let mut found = Findings::default();
    let say = |what: String| eprintln!("{role:?} writer: {what}");
    if role == Role::Append {
        let is = journal.get(0);
        let file = File::open(&path)?;
        let size = file.metadata()?.len();
        if size < is.synced {
            found.lost_synced += is.synced - size;
            say(format!("{size} bytes, {} were synced", is.synced));
        } else if size < is.accepted && !after_crash {
            found.lost_accepted += is.accepted - size;
            say(format!("{size} bytes, {} were accepted", is.accepted));
        }
        let (mut bytes, mut whole) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        // What came since the last look, and some of before.
        let mut at = journal.get(1).accepted.min(size).saturating_sub(1 << 20);
        while at < size {
            let count = file.read_at(&mut bytes, at)?;
            fill_stream(at, &mut whole[..count]);
            if count == 0 || bytes[..count] != whole[..count] {
                found.wrong += 1;
                say(format!(
                    "within {count} bytes at {at} of {size}: {is:?}",
                    is = (is.accepted, is.synced)
                ));
            }
            at += count.max(1) as u64;
        }
        journal.set(
            0,
            Acknowledged {
                attempted: size,
                accepted: size,
                synced: is.synced.min(size),
            },
        );
        journal.set(
            1,
            Acknowledged {
                attempted: size,
                accepted: size,
                synced: size,
            },
        );
        return Ok(found);
    }
    let bytes = fs::read(&path)?;
    for (slot, page) in bytes.chunks(PAGE).enumerate() {
        let is = journal.get(slot);
        let words = || {
            page.chunks_exact(8)
                .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
        };
        let version = words().next().map_or(0, |word| word & 0xffff_ffff);
        let is_whole = |version| {
            words()
                .enumerate()
                .all(|(n, word)| word == word_of(slot_seed(role, slot, version), n))
        };
        if !is_whole(version) || version > is.attempted {
            let either = |n, word| {
                [is.accepted, is.attempted]
                    .iter()
                    .any(|v| word == word_of(slot_seed(role, slot, *v), n))
            };
            if is.attempted == is.accepted || !words().enumerate().all(|(n, word)| either(n, word)) {
                found.wrong += 1;
                say(format!(
                    "page {slot} is of no version: {version}, {:?}",
                    (is.attempted, is.accepted, is.synced)
                ));
            }
            continue;
        }
        if version < is.synced {
            found.lost_synced += 1;
            say(format!(
                "page {slot} has version {version}, {} was synced",
                is.synced
            ));
        } else if version < is.accepted && !after_crash {
            found.lost_accepted += 1;
            say(format!(
                "page {slot} has version {version}, {} was accepted",
                is.accepted
            ));
        }
        // What failed may have come about.
        journal.set(
            slot,
            Acknowledged {
                attempted: version,
                accepted: version,
                synced: is.synced.min(version),
            },
        );
    }
    Ok(found)
}

/// What the herd tells its writers, and they it: words of a shared file.
pub struct Signals(pub &'static [AtomicU64]);

pub const FINDINGS: usize = 16;

impl Signals {
    pub fn of(world: &World) -> Result<Self> {
        shared_words(&world.state.join("signals"), 64).map(Self)
    }

    /// How often writers were told to verify.
    pub fn round(&self) -> &AtomicU64 {
        &self.0[0]
    }

    /// How often one has.
    pub fn verified(&self, writer: usize) -> &AtomicU64 {
        &self.0[1 + writer]
    }

    pub fn findings(&self, writer: usize, n: usize) -> &AtomicU64 {
        &self.0[FINDINGS + writer * 3 + n]
    }
}

pub fn write_for_ever(world: &World, role: Role, writer: usize, log: Log) -> Result<()> {
    let signals = Signals::of(world)?;
    let journal = Journal::of(world, role)?;
    let path = world.written(role);
    let mut random = Random(u64::from(process::id()) << 32);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    match role {
        Role::Append => options.append(true),
        Role::WriteDirect => options.custom_flags(c::O_DIRECT),
        _ => &mut options,
    };
    let file = options.open(&path)?;
    let mut at = ptr::null_mut();
    if role != Role::Append {
        file.set_len((SLOTS * PAGE) as u64)?;
        at = map(&file, SLOTS * PAGE, c::PROT_READ | c::PROT_WRITE, c::MAP_SHARED)?;
    }
    file.sync_all()?;
    let mut mover = Mover::new()?;
    let mut page = Box::new(Aligned([0; PAGE]));
    let mut record = vec![0; RECORD_MAX as usize];
    let mut unsynced: Vec<usize> = Vec::new();
    let mut round = signals.round().load(Ordering::SeqCst);
    ready()?;
    loop {
        let asked = signals.round().load(Ordering::SeqCst);
        if asked != round {
            let found = verify_when_lit(world, role)?;
            for (n, count) in [found.lost_synced, found.lost_accepted, found.wrong]
                .into_iter()
                .enumerate()
            {
                signals.findings(writer, n).fetch_add(count, Ordering::SeqCst);
            }
            if role == Role::Append && journal.get(0).accepted > APPENDED_MAX {
                file.set_len(0)?;
                for slot in 0..2 {
                    journal.set(
                        slot,
                        Acknowledged {
                            attempted: 0,
                            accepted: 0,
                            synced: 0,
                        },
                    );
                }
            }
            unsynced.clear();
            round = asked;
            signals.verified(writer).store(round, Ordering::SeqCst);
        }
        for _ in 0..1 + random.below(WRITES_PER_SYNC) {
            if role == Role::Append {
                let is = journal.get(0);
                let length = 1 + random.below(RECORD_MAX) as usize;
                fill_stream(is.accepted, &mut record[..length]);
                if let Ok(count) = log.time(What::Access, || (&file).write(&record[..length])) {
                    journal.set(
                        0,
                        Acknowledged {
                            accepted: is.accepted + count as u64,
                            ..is
                        },
                    );
                }
                continue;
            }
            let slot = random.below(SLOTS as u64) as usize;
            let is = journal.get(slot);
            let version = is.accepted + 1;
            journal.set(
                slot,
                Acknowledged {
                    attempted: version,
                    ..is
                },
            );
            fill_page(slot_seed(role, slot, version), &mut page.0);
            let stored = log.time(What::Access, || match role {
                // SAFETY: the page lies within the mapping, and nothing refers to it.
                Role::MapMsync => unsafe { mover.store(at.add(slot * PAGE), &page.0) },
                _ => file.write_all_at(&page.0, (slot * PAGE) as u64),
            });
            if stored.is_ok() {
                journal.set(
                    slot,
                    Acknowledged {
                        attempted: version,
                        accepted: version,
                        ..is
                    },
                );
                unsynced.push(slot);
            }
        }
        let synced = log.time(What::Sync, || match role {
            // SAFETY: the whole mapping.
            Role::MapMsync => match unsafe { c::msync(at, SLOTS * PAGE, c::MS_SYNC) } {
                0 => Ok(()),
                _ => Err(Error::last_os_error()),
            },
            _ => file.sync_all(),
        });
        if synced.is_ok() {
            if role == Role::Append {
                unsynced.push(0);
            }
            for slot in unsynced.drain(..) {
                let is = journal.get(slot);
                journal.set(
                    slot,
                    Acknowledged {
                        synced: is.accepted,
                        ..is
                    },
                );
            }
        }
    }
}

/// Verifies as soon as the mount shows something again, which is a moment after EnableKey.
pub fn verify_when_lit(world: &World, role: Role) -> Result<Findings> {
    let begin = now();
    loop {
        match verify(world, role, false) {
            Err(error) if now() - begin > STUCK_S / 2 * 1_000_000_000 => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(2)),
            found => return found,
        }
    }
}
