//! What there is: one key, its kmsd, mounts with what the kernel keeps of them, and a program that uses each.

use crate::engine::clearing::{Clearing, Step};

pub(super) const SHOWN: &str = "a mount shows what was revoked";
pub(super) const UNREGISTERED: &str = "a mount holds something, and no row says so";

/// The mounts, each a process of its own.
pub(super) const MOUNTS: usize = 2;
/// Sessions that are in the table, stored, or in use by somebody at once.
pub(super) const SLOTS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Enabled,
    Disabled,
    PendingDeletion,
    Destroyed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Process {
    Unborn,
    Running,
    Stopped,
    Dead,
}

/// The keys in a mount. Whatever the reason why it is dark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum State {
    Live,
    Draining,
    Dark,
}

/// A page of a file in the kernel's cache. One that is dropped while it is dirty or under I/O stays, clean and idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Page {
    None,
    Clean,
    Dirty,
}

impl Page {
    pub(super) fn dropped(self) -> Self {
        match self {
            Self::Dirty => Self::Clean,
            Self::Clean | Self::None => Self::None,
        }
    }
}

/// Where the thread that watches the key is. The epoch is what it is to acknowledge; an outage has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pc {
    Idle,
    /// kmsd has read the epoch, and not the state yet.
    Renewing(u8),
    Answered(u8, bool),
    Draining(Option<u8>),
    Purged(Option<u8>),
    Wiped(Option<u8>),
    Acknowledging(u8),
    /// The session is unknown; afterwards that epoch is acknowledged.
    Opening(Option<u8>),
    /// kmsd has the call.
    Waiting(Option<u8>),
    /// The session is opened, and the mount's descriptors are to be handed over.
    Opened(u8, Option<u8>),
    /// To be live: the volume key is asked for.
    Relighting,
    /// The volume is open, and not mounted yet.
    Mounting,
    /// Its loops have ended, and the session is to be closed.
    Closing,
}

/// A call for keys, as kmsd is at it. The key's read lock is held until the answer leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Ask {
    Permitted,
    Registered,
    Answered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Mount {
    pub(super) process: Process,
    /// SIGKILL was sent.
    pub(super) is_killed: bool,
    /// Its calls do not arrive.
    pub(super) is_cut: bool,
    pub(super) state: State,
    pub(super) has_keys: bool,
    pub(super) pc: Pc,
    pub(super) ask: Option<Ask>,
    /// The caller still waits for it.
    pub(super) is_asking: bool,
    pub(super) session: Option<u8>,
    /// What it remembers of having told its session.
    pub(super) acknowledged: u8,
    /// It answers requests.
    pub(super) serves: bool,
    pub(super) is_mounted: bool,
    /// A program has a file of it open.
    pub(super) is_open: bool,
    pub(super) is_aborted: bool,
    pub(super) page: Page,
    /// The kernel takes writes without asking.
    pub(super) has_attributes: bool,
}

impl Mount {
    fn unborn() -> Self {
        Self {
            process: Process::Unborn,
            is_killed: false,
            is_cut: false,
            state: State::Dark,
            has_keys: false,
            pc: Pc::Opening(None),
            ask: None,
            is_asking: false,
            session: None,
            acknowledged: 0,
            serves: false,
            is_mounted: false,
            is_open: false,
            is_aborted: false,
            page: Page::None,
            has_attributes: false,
        }
    }

    /// Its superblock is there.
    pub(super) fn is_there(&self) -> bool {
        self.is_mounted || self.is_open
    }

    pub(super) fn runs(&self) -> bool {
        self.process == Process::Running && !self.is_killed
    }

    pub(super) fn drop_pages(&mut self) {
        self.has_attributes = false;
        self.page = self.page.dropped();
    }

    /// Nothing of the key can be shown through it.
    pub(super) fn holds_nothing(&self) -> bool {
        let is_on_its_way = self.ask == Some(Ask::Answered) && self.is_asking;
        self.page == Page::None && !self.has_keys && !is_on_its_way
    }
}

/// One holder that is made to let go, by a revocation or by the watcher of exits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Job {
    pub(super) clearing: Clearing,
    pub(super) is_watcher: bool,
    pub(super) decided: Option<Step>,
    pub(super) is_overdue: bool,
}

/// A session: its row, and what kmsd has of it in memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Slot {
    pub(super) mount: u8,
    /// The row, and whether it names the key.
    pub(super) row: Option<(bool, Option<u8>)>,
    /// Its descriptors are in systemd's store.
    pub(super) is_kept: bool,
    pub(super) is_known: bool,
    pub(super) is_left: bool,
    pub(super) uses_key: bool,
    pub(super) minor: Option<u8>,
    pub(super) has_reach: bool,
    pub(super) acknowledged: u8,
    pub(super) cleared: u8,
    pub(super) was_watched: bool,
    pub(super) job: Option<Job>,
}

impl Slot {
    pub(super) fn free() -> Self {
        Self {
            mount: 0,
            row: None,
            is_kept: false,
            is_known: false,
            is_left: false,
            uses_key: false,
            minor: None,
            has_reach: false,
            acknowledged: 0,
            cleared: 0,
            was_watched: false,
            job: None,
        }
    }

    /// What a kmsd has in memory alone.
    pub(super) fn forget(&mut self) {
        *self = Self {
            mount: self.mount,
            row: self.row,
            is_kept: self.is_kept,
            ..Self::free()
        };
        if self.row.is_none() && !self.is_kept {
            self.mount = 0;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Keep,
    Attach,
    Store,
    /// The plant alone: the old rows went first.
    StoreLate,
    Remove,
}

/// A call that opens a session or takes descriptors, at kmsd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Side {
    pub(super) slot: u8,
    pub(super) stage: Stage,
    pub(super) minor: Option<u8>,
}

/// A revocation that waits for its holders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Revoke {
    pub(super) epoch: u8,
    pub(super) destroys: bool,
    /// Slots, as bits.
    pub(super) waits: u8,
    pub(super) stuck: u8,
}

/// What may still go wrong, or be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    pub(super) revocations: u8,
    pub(super) enables: u8,
    pub(super) unstored: u8,
    pub(super) crashes: u8,
    pub(super) stops: u8,
    pub(super) kills: u8,
    pub(super) aborts: u8,
    pub(super) unmounts: u8,
    pub(super) cuts: u8,
    pub(super) births: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) is_up: bool,
    /// The key and the epoch in memory, and as they are stored.
    pub(super) key: (Key, u8),
    pub(super) stored: (Key, u8),
    pub(super) slots: [Slot; SLOTS],
    pub(super) mounts: [Mount; MOUNTS],
    pub(super) revoke: Option<Revoke>,
    pub(super) side: Option<Side>,
    /// A revocation has succeeded, and nobody has given the key back.
    pub(super) is_promised: bool,
    /// Both mounts come to have the same device number, one after the other.
    pub(super) reuses_minor: bool,
    pub(super) budget: Budget,
}

impl World {
    /// One mount that is served, and one to come.
    pub(super) fn new(reuses_minor: bool, budget: Budget) -> Self {
        let mut slots = [const { None::<Slot> }; SLOTS].map(|_| Slot::free());
        slots[0] = Slot {
            row: Some((true, Some(0))),
            is_kept: true,
            is_known: true,
            uses_key: true,
            minor: Some(0),
            has_reach: true,
            ..Slot::free()
        };
        let served = Mount {
            process: Process::Running,
            state: State::Live,
            has_keys: true,
            pc: Pc::Idle,
            session: Some(0),
            serves: true,
            is_mounted: true,
            ..Mount::unborn()
        };
        Self {
            is_up: true,
            key: (Key::Enabled, 0),
            stored: (Key::Enabled, 0),
            slots,
            mounts: [served, Mount::unborn()],
            revoke: None,
            side: None,
            is_promised: false,
            reuses_minor,
            budget,
        }
    }

    pub(super) fn minor_of(&self, mount: usize) -> u8 {
        if self.reuses_minor { 0 } else { mount as u8 }
    }

    pub(super) fn may_be_mounted(&self, minor: u8) -> bool {
        (0..MOUNTS).any(|m| self.minor_of(m) == minor && self.mounts[m].is_there())
    }

    /// What the kernel does by itself: a superblock that nobody uses goes, with its pages; a connection ends with its last
    /// descriptor.
    pub(super) fn settle(&mut self) {
        for m in 0..MOUNTS {
            let is_held = self
                .slots
                .iter()
                .any(|slot| usize::from(slot.mount) == m && (slot.has_reach || slot.is_kept));
            let mount = &mut self.mounts[m];
            if !mount.is_there() {
                (mount.page, mount.has_attributes) = (Page::None, false);
            }
            if mount.process == Process::Dead {
                mount.is_aborted |= !is_held;
                (mount.has_keys, mount.state, mount.serves) = (false, State::Dark, false);
                (mount.is_asking, mount.is_killed, mount.is_cut) = (false, false, false);
                (mount.pc, mount.session, mount.acknowledged) = (Pc::Idle, None, 0);
                if mount.ask == Some(Ask::Answered) {
                    mount.ask = None;
                }
            }
        }
    }

    /// What is wrong with this state.
    pub(super) fn wrong(&self) -> Option<&'static str> {
        for (m, mount) in self.mounts.iter().enumerate() {
            if self.is_promised && !mount.holds_nothing() {
                return Some(SHOWN);
            }
            let has_row = self
                .slots
                .iter()
                .any(|slot| usize::from(slot.mount) == m && slot.row.is_some_and(|(names_key, _)| names_key));
            if !mount.holds_nothing() && !has_row {
                return Some(UNREGISTERED);
            }
        }
        if self.is_promised && (self.stored.0 == Key::Enabled || (self.is_up && self.key.0 == Key::Enabled)) {
            return Some("the key is enabled, and nobody enabled it");
        }
        None
    }
}
