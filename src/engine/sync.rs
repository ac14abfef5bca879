//! The engine's locks and the order in which they are taken. [`Rank`] is that order's one record.
//!
//! With debug assertions each thread knows which locks it holds: one that is taken out of order panics, and names both.
//! Without them a lock is parking_lot's and nothing else. With the feature `shuttle` locks and atomics are those of a
//! scheduler that tries interleavings; see `models`.

use order::{Held, Place};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

/// Makes the enum, and a type of the same name for each rank.
macro_rules! ranks {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a lock may be taken under: locks of the ranks before its own, and none of the others. From `LogQueue` on
        /// they are leaves: nothing is taken under them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[cfg_attr(feature = "shuttle", allow(dead_code))]
        pub(crate) enum Rank {
            $($(#[$doc])* $name,)*
        }

        /// The ranks as types, for the types of the locks.
        pub(crate) mod rank {
            use super::{Rank, Ranked};
            $(
                // A model has some of them replaced.
                #[cfg_attr(feature = "shuttle", allow(dead_code))]
                pub(crate) enum $name {}

                impl Ranked for $name {
                    const RANK: Rank = Rank::$name;
                }
            )*
        }
    };
}

ranks! {
    /// One change of a key's state at a time. Only those who change it take it, over the whole change; that of the first domain
    /// before those of others.
    Darkening,
    /// One new domain at a time. Held over calls to the KMS, with no gate held: they may take long.
    NewDomain,
    /// A domain's gate; several in ascending order of domains. Every operation holds that of its domain and of the first
    /// throughout, for reading and once: a second time would wait behind a revocation that waits for the first.
    Gate,
    /// One refill of the pool of DEKs. Held over a call to the KMS and a sync of the log, so no lock but the gate is held
    /// when it is taken.
    NurseryRefill,
    /// Renames from one directory to another. Before the locks of all that they look up, publish and change.
    Rename,
    /// The numbers for inodes without a DEK. Held over a reservation, which commits and syncs the log; a rename takes one.
    NurseryPlain,
    /// One sync of the log at a time. Never under a node, nor under the writer: neither waits for the disk.
    LogSync,
    /// What the seal file says. Held while the file is written and synced, so not under a node either.
    SealFile,
    /// A whole publish, cut or drain of a file, which takes the node again and again. One at a time for each thread.
    Publishing,
    /// An inode's state; several in ascending order of inodes.
    Node,
    /// The root record, and the right to append to the log. Under the nodes whose changes it commits.
    LogWriter,
    /// The batches that wait to be committed: filled before the writer's lock, emptied under it.
    LogQueue,
    /// What became of a batch that another thread committed.
    LogOutcome,
    /// Whether the ballast is there.
    Ballast,
    /// The database, which a commit without room closes and opens again.
    Store,
    /// The nodes with work left.
    Active,
    /// The files that lost content.
    Poisoned,
    /// A shard of the nodes in memory.
    NodeTable,
    /// A shard of the kernel's references.
    Lookups,
    /// A shard of the decoded chunk records.
    ChunkCache,
    /// A shard of the files' keys.
    FileKeys,
    /// Who has calls to the KMS broken off.
    Closing,
    /// What the domains are.
    Domains,
    /// The pool of DEKs for inodes not yet born.
    NurseryFiles,
    /// The inodes without a name, by what they wait for.
    Orphans,
    /// The open slot files.
    SlotFiles,
    /// Who is told that the kernel's caches must go.
    Observer,
    /// What a background thread is woken for.
    Bell,
    /// The background threads.
    Threads,
}

/// A type that stands for a rank.
pub(crate) trait Ranked {
    const RANK: Rank;
}

#[cfg(debug_assertions)]
mod order {
    use super::Rank;
    use std::cell::RefCell;
    use std::fmt;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[cfg(feature = "shuttle")]
    use shuttle::thread_local;

    const FIRST_LEAF: Rank = Rank::LogQueue;

    thread_local! {
        /// In ascending order, since each was above all others when it was taken.
        static HELD: RefCell<Vec<Place>> = const { RefCell::new(Vec::new()) };
    }

    fn with_held<T>(look: impl FnOnce(&mut Vec<Place>) -> T) -> T {
        HELD.with(|held| look(&mut held.borrow_mut()))
    }

    /// Whether a lock was ever taken out of order.
    static BROKEN: AtomicBool = AtomicBool::new(false);

    /// Where a lock stands in the order.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub(super) struct Place(Rank, u64);

    impl fmt::Display for Place {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.1 {
                0 => write!(f, "{:?}", self.0),
                number => write!(f, "{:?} {number}", self.0),
            }
        }
    }

    /// That this thread holds a lock.
    pub(super) struct Held(Place);

    impl Place {
        pub(super) const fn new(rank: Rank, number: u64) -> Self {
            Self(rank, number)
        }

        /// Notes that the lock is about to be taken: before it is waited for, since what is wrong may never end.
        #[track_caller]
        pub(super) fn enter(self) -> Held {
            let last = with_held(|held| held.last().copied());
            if let Some(last) = last.filter(|last| *last >= self || last.0 >= FIRST_LEAF) {
                violated(format_args!("{self} is taken under {last}"));
            }
            with_held(|held| held.push(self));
            Held(self)
        }
    }

    impl Held {
        /// Checks that the thread, which is about to wait for what another does, holds nothing else.
        #[track_caller]
        pub(super) fn is_alone(&self) {
            let other = with_held(|held| held.iter().find(|other| **other != self.0).copied());
            if let Some(other) = other {
                violated(format_args!("{} is waited on under {other}", self.0));
            }
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            with_held(|held| held.retain(|other| *other != self.0));
        }
    }

    #[track_caller]
    pub(super) fn at_most(limit: Option<Rank>, what: &str) {
        let above = with_held(|held| held.iter().find(|place| Some(place.0) > limit).copied());
        if let Some(above) = above {
            violated(format_args!("{what} comes under {above}"));
        }
    }

    pub(super) fn assert_unbroken() {
        assert!(
            !BROKEN.load(Ordering::Relaxed) || std::thread::panicking(),
            "the order of locks was violated"
        );
    }

    #[track_caller]
    #[expect(clippy::panic, reason = "debug builds alone have it")]
    fn violated(how: fmt::Arguments<'_>) {
        // A second panic would hide the first.
        if std::thread::panicking() {
            return;
        }
        // The tests of this module do it on purpose.
        BROKEN.store(!cfg!(test), Ordering::Relaxed);
        panic!("the order of locks is violated: {how}");
    }
}

#[cfg(not(debug_assertions))]
mod order {
    use super::Rank;

    #[derive(Clone, Copy)]
    pub(super) struct Place;

    pub(super) struct Held;

    impl Place {
        pub(super) const fn new(_: Rank, _: u64) -> Self {
            Self
        }

        #[inline(always)]
        pub(super) fn enter(self) -> Held {
            Held
        }
    }

    impl Held {
        #[inline(always)]
        pub(super) fn is_alone(&self) {}
    }

    #[inline(always)]
    pub(super) fn at_most(_: Option<Rank>, _: &str) {}

    #[inline(always)]
    pub(super) fn assert_unbroken() {}
}

#[cfg(not(feature = "shuttle"))]
mod raw {
    pub(super) use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    use std::time::Duration;

    #[inline(always)]
    pub(super) fn whole<G>(guard: G) -> G {
        guard
    }

    #[inline(always)]
    pub(super) fn wait<'l, T>(
        condvar: &Condvar,
        mut guard: MutexGuard<'l, T>,
        limit: Duration,
    ) -> MutexGuard<'l, T> {
        condvar.wait_for(&mut guard, limit);
        guard
    }
}

#[cfg(feature = "shuttle")]
mod raw {
    pub(super) use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    use std::sync::{LockResult, PoisonError};
    use std::time::Duration;

    pub(super) fn whole<G>(guard: LockResult<G>) -> G {
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// No time passes in a model: it waits until it is woken.
    pub(super) fn wait<'l, T>(condvar: &Condvar, guard: MutexGuard<'l, T>, _: Duration) -> MutexGuard<'l, T> {
        whole(condvar.wait(guard))
    }
}

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::atomic;
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::atomic;

/// Mutual exclusion in the rank `R`.
pub(crate) struct Mutex<T, R> {
    place: Place,
    rank: PhantomData<fn() -> R>,
    lock: raw::Mutex<T>,
}

impl<T, R: Ranked> Mutex<T, R> {
    pub(crate) const fn new(value: T) -> Self {
        Self::numbered(0, value)
    }

    /// One of several of its rank, which are taken in ascending order of their numbers.
    pub(crate) const fn numbered(number: u64, value: T) -> Self {
        Self {
            place: Place::new(R::RANK, number),
            rank: PhantomData,
            lock: raw::Mutex::new(value),
        }
    }

    #[inline]
    #[track_caller]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.place.enter();
        MutexGuard {
            guard: raw::whole(self.lock.lock()),
            held,
        }
    }
}

impl<T: Default, R: Ranked> Default for Mutex<T, R> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

pub(crate) struct MutexGuard<'l, T> {
    guard: raw::MutexGuard<'l, T>,
    held: Held,
}

/// Readers together or one writer, in the rank `R`.
pub(crate) struct RwLock<T, R> {
    place: Place,
    rank: PhantomData<fn() -> R>,
    lock: raw::RwLock<T>,
}

impl<T, R: Ranked> RwLock<T, R> {
    pub(crate) const fn new(value: T) -> Self {
        Self::numbered(0, value)
    }

    /// One of several of its rank, which are taken in ascending order of their numbers.
    pub(crate) const fn numbered(number: u64, value: T) -> Self {
        Self {
            place: Place::new(R::RANK, number),
            rank: PhantomData,
            lock: raw::RwLock::new(value),
        }
    }

    #[inline]
    #[track_caller]
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        let held = self.place.enter();
        RwLockReadGuard {
            guard: raw::whole(self.lock.read()),
            _held: held,
        }
    }

    #[inline]
    #[track_caller]
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        let held = self.place.enter();
        RwLockWriteGuard {
            guard: raw::whole(self.lock.write()),
            _held: held,
        }
    }
}

pub(crate) struct RwLockReadGuard<'l, T> {
    guard: raw::RwLockReadGuard<'l, T>,
    _held: Held,
}

pub(crate) struct RwLockWriteGuard<'l, T> {
    guard: raw::RwLockWriteGuard<'l, T>,
    _held: Held,
}

macro_rules! guards {
    ($($name:ident)* ; $($mut_name:ident)*) => {
        $(impl<T> Deref for $name<'_, T> {
            type Target = T;

            #[inline]
            fn deref(&self) -> &T {
                &self.guard
            }
        })*
        $(impl<T> DerefMut for $mut_name<'_, T> {
            #[inline]
            fn deref_mut(&mut self) -> &mut T {
                &mut self.guard
            }
        })*
    };
}

guards!(MutexGuard RwLockReadGuard RwLockWriteGuard; MutexGuard RwLockWriteGuard);

/// Wakes a thread that waits for a change.
#[derive(Default)]
pub(crate) struct Condvar(raw::Condvar);

impl Condvar {
    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Waits at most `limit`, with the lock let go of meanwhile. The thread is to hold no other.
    #[track_caller]
    pub(crate) fn wait_for<'l, T>(&self, guard: MutexGuard<'l, T>, limit: Duration) -> MutexGuard<'l, T> {
        let MutexGuard { guard, held } = guard;
        held.is_alone();
        MutexGuard {
            guard: raw::wait(&self.0, guard, limit),
            held,
        }
    }
}

/// Checks that no lock is held but gates, and those of a refill of the nursery and of a new domain: a call to the KMS may take as long as its limit.
#[track_caller]
pub(crate) fn before_call_to_kms() {
    order::at_most(Some(Rank::NurseryRefill), "a call to the KMS");
}

/// Checks that no lock is held that an operation takes: to drop its caches the kernel may wait for what another thread answers.
#[track_caller]
pub(crate) fn before_purge() {
    order::at_most(Some(Rank::Darkening), "a purge of the kernel's caches");
}

/// Fails if a lock was ever taken out of order: a background thread that panics for it stops no test.
pub(crate) fn assert_unbroken() {
    order::assert_unbroken();
}

#[cfg(all(test, debug_assertions, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn node(number: u64) -> RwLock<(), rank::Node> {
        RwLock::numbered(number, ())
    }

    /// What `work` panics with; afterwards nothing is held.
    fn panic_of(work: impl FnOnce()) -> String {
        let payload = catch_unwind(AssertUnwindSafe(work)).unwrap_err();
        order::at_most(None, "a test");
        payload.downcast_ref::<String>().unwrap().clone()
    }

    #[test]
    fn locks_in_order_may_be_let_go_of_in_any() {
        let (gate, one, two) = (RwLock::<_, rank::Gate>::new(()), node(1), node(2));
        let writer = Mutex::<_, rank::LogWriter>::new(());
        for _ in 0..2 {
            let (gate, first) = (gate.read(), one.write());
            let (second, last) = (two.write(), writer.lock());
            drop(first);
            drop(last);
            drop(writer.lock());
            drop(gate);
            drop(second);
        }
        order::at_most(None, "a test");
    }

    #[test]
    fn a_lock_under_one_of_a_later_rank_panics_with_both() {
        let (gate, node) = (RwLock::<_, rank::Gate>::new(()), node(7));
        let message = panic_of(|| {
            let _node = node.read();
            let _gate = gate.write();
        });
        assert!(message.ends_with("Gate is taken under Node 7"), "{message}");
    }

    #[test]
    fn a_lock_between_two_that_are_held_panics() {
        let (writer, node) = (Mutex::<_, rank::LogWriter>::new(()), node(7));
        let gate = RwLock::<_, rank::Gate>::new(());
        let message = panic_of(|| {
            let (_gate, _writer) = (gate.read(), writer.lock());
            let _node = node.write();
        });
        assert!(message.ends_with("Node 7 is taken under LogWriter"), "{message}");
    }

    #[test]
    fn a_lock_that_is_held_panics_even_for_reading() {
        let (gate, node) = (RwLock::<_, rank::Gate>::new(()), node(7));
        let message = panic_of(|| {
            let (_once, _twice) = (gate.read(), gate.read());
        });
        assert!(message.ends_with("Gate is taken under Gate"), "{message}");
        let message = panic_of(|| {
            let (_once, _twice) = (node.write(), node.write());
        });
        assert!(message.ends_with("Node 7 is taken under Node 7"), "{message}");
    }

    #[test]
    fn nodes_in_descending_order_panic() {
        let (one, two) = (node(1), node(2));
        let message = panic_of(|| {
            let (_two, _one) = (two.write(), one.write());
        });
        assert!(message.ends_with("Node 1 is taken under Node 2"), "{message}");
    }

    #[test]
    fn two_publishes_at_once_panic() {
        let (one, other) = (
            Mutex::<_, rank::Publishing>::new(()),
            Mutex::<_, rank::Publishing>::new(()),
        );
        let message = panic_of(|| {
            let (_one, _other) = (one.lock(), other.lock());
        });
        assert!(
            message.ends_with("Publishing is taken under Publishing"),
            "{message}"
        );
    }

    #[test]
    fn nothing_is_taken_under_a_leaf() {
        let (queue, bell) = (
            Mutex::<_, rank::LogQueue>::new(()),
            Mutex::<_, rank::Bell>::new(()),
        );
        let message = panic_of(|| {
            let (_queue, _bell) = (queue.lock(), bell.lock());
        });
        assert!(message.ends_with("Bell is taken under LogQueue"), "{message}");
    }

    #[test]
    fn a_wait_under_another_lock_panics() {
        let (gate, bell) = (RwLock::<_, rank::Gate>::new(()), Mutex::<_, rank::Bell>::new(()));
        let changed = Condvar::default();
        drop(changed.wait_for(bell.lock(), Duration::ZERO));
        let message = panic_of(|| {
            let _gate = gate.read();
            drop(changed.wait_for(bell.lock(), Duration::ZERO));
        });
        assert!(message.ends_with("Bell is waited on under Gate"), "{message}");
    }

    #[test]
    fn a_call_to_the_kms_under_a_node_panics() {
        let (gate, node) = (RwLock::<_, rank::Gate>::new(()), node(7));
        let message = panic_of(|| {
            let _gate = gate.read();
            before_call_to_kms();
            let _node = node.read();
            before_call_to_kms();
        });
        assert!(
            message.ends_with("a call to the KMS comes under Node 7"),
            "{message}"
        );
    }

    #[test]
    fn another_thread_holds_what_it_likes() {
        let (gate, node) = (RwLock::<_, rank::Gate>::new(()), node(7));
        let _node = node.read();
        std::thread::scope(|scope| {
            scope.spawn(|| drop((gate.write(), node.read())));
        });
    }
}
