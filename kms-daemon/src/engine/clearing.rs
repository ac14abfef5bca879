//! How one holder of data keys is made to let go of them: the decisions alone, so that every interleaving can be tried
//! (see `explorer`). `holders` sees, and does what is decided.

/// What is known of a holder at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Seen {
    /// The epoch up to which it has said that everything revoked is gone.
    pub(crate) acknowledged: u64,
    /// Its process has ended, and can decrypt nothing any more.
    pub(crate) has_exited: bool,
    /// The kernel's cache of its mount.
    pub(crate) cache: Cache,
    /// The time that it was given is over.
    pub(crate) is_overdue: bool,
}

/// What the kernel may still cache of a holder's mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Cache {
    /// Nothing: it never had a mount, or that mount's superblock is gone.
    Nothing,
    /// Anything, and kmsd has a descriptor through which it can have it dropped.
    Reachable,
    /// Anything, and kmsd has none: it was started anew, and the mount has not handed it another.
    OutOfReach,
}

impl Cache {
    /// By the descriptor that kmsd has of the mount, which knows whether the superblock is gone, else by the number of the
    /// mount's device, which another mount may have come to have.
    pub(crate) fn of<M: Copy>(
        reach_is_gone: Option<bool>,
        minor: Option<M>,
        may_be_mounted: impl FnOnce(M) -> bool,
    ) -> Self {
        match (reach_is_gone, minor) {
            (Some(false), _) => Self::Reachable,
            (None, Some(minor)) if may_be_mounted(minor) => Self::OutOfReach,
            _ => Self::Nothing,
        }
    }
}

/// Whether a session of the same process answers for one that was left behind: at once if that never had a mount, else
/// with the descriptors of the same mount. `attached` is the device of what was handed over just now.
pub(crate) fn takes_over<M: PartialEq>(attached: Option<M>, left: Option<M>) -> bool {
    left.is_none() || left == attached
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// Look again when something has changed.
    Wait,
    /// Drop what the kernel caches, once: the holder is dark, and this repeats what it did itself.
    Invalidate,
    /// End its process.
    Kill,
    /// End its connection, then drop what the kernel caches, twice: what the first leaves since it was dirty or under I/O,
    /// the second finds clean and idle.
    Bury,
    /// It is over.
    Done(Cleared),
    /// Nothing more can be done.
    Stuck(Stuck),
}

/// How a holder came to hold nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Cleared {
    /// It said so, and kmsd repeated the invalidation.
    Acknowledged,
    /// Its process was ended, and kmsd had the kernel drop what it cached.
    Fenced,
    /// Its process and its mount are gone.
    Gone,
}

/// Why a holder may still show something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stuck {
    /// SIGKILL had no effect in time.
    DoesNotEnd,
    /// Its process is gone, its mount is not, and kmsd has no descriptor of it.
    OutOfReach,
    /// The kernel did not drop its cache.
    StaysCached,
}

impl Stuck {
    /// In words, for whoever revoked.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::DoesNotEnd => "its process did not end when it was killed",
            Self::OutOfReach => {
                "its process is gone, but files of its mount may be open still, and kmsd has no descriptor of that mount; end \
                 the programs that use it"
            }
            Self::StaysCached => {
                "the kernel did not drop what it caches of its mount; end the programs that use it"
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    /// It was told, and has some time.
    Told,
    /// It said that all is gone, and something stayed cached: it is not to be relied on.
    Distrusted,
    /// It was killed, and has some time to end.
    Killed,
    /// Over, or hopeless.
    Ended(Step),
}

/// One holder on its way to hold nothing of what was revoked up to an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Clearing {
    epoch: u64,
    phase: Phase,
}

impl Clearing {
    pub(crate) fn of(epoch: u64) -> Self {
        Self {
            epoch,
            phase: Phase::Told,
        }
    }

    /// What is to be done, by what is seen. After each step but `Wait` its outcome is to be told to [`Self::did`].
    pub(crate) fn next(&self, seen: &Seen) -> Step {
        match (self.phase, seen) {
            (Phase::Ended(step), _) => step,
            (
                _,
                Seen {
                    has_exited: true,
                    cache,
                    ..
                },
            ) => match cache {
                Cache::Nothing => Step::Done(Cleared::Gone),
                Cache::Reachable => Step::Bury,
                Cache::OutOfReach => Step::Stuck(Stuck::OutOfReach),
            },
            (Phase::Told, seen) if seen.acknowledged >= self.epoch => match seen.cache {
                Cache::Reachable => Step::Invalidate,
                // Its own word: it has invalidated, and then said so.
                Cache::Nothing | Cache::OutOfReach => Step::Done(Cleared::Acknowledged),
            },
            (Phase::Told, seen) if seen.is_overdue => Step::Kill,
            (Phase::Distrusted, _) => Step::Kill,
            (Phase::Killed, seen) if seen.is_overdue => Step::Stuck(Stuck::DoesNotEnd),
            _ => Step::Wait,
        }
    }

    /// Takes in how a step went.
    pub(crate) fn did(&mut self, step: Step, went_well: bool) {
        self.phase = match (step, went_well) {
            (Step::Invalidate, true) => Phase::Ended(Step::Done(Cleared::Acknowledged)),
            (Step::Invalidate, false) => Phase::Distrusted,
            (Step::Kill, _) => Phase::Killed,
            (Step::Bury, true) => Phase::Ended(Step::Done(Cleared::Fenced)),
            (Step::Bury, false) => Phase::Ended(Step::Stuck(Stuck::StaysCached)),
            (Step::Wait | Step::Done(_) | Step::Stuck(_), _) => self.phase,
        };
    }
}
