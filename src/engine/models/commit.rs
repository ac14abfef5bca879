//! The committer over a log in memory, which may fail: commits are ordered, none is lost or doubled; what a sync answered
//! for is durable; after a failure of the log nobody succeeds any more; and a log without room is none.

use super::{explore, key_of, together};
use crate::engine::batch::Batch;
use crate::engine::commit::{Committer, Seq, Written};
use crate::engine::error::Error;
use crate::engine::format::root::RootRecord;
use crate::engine::format::rowkey::{self, Family};
use crate::engine::format::rowsum::RowSum;
use crate::engine::format::seal::Seal;
use crate::engine::format::superblock::Version;
use crate::engine::keys::DomainKeys;
use crate::engine::space::{Limits, Space};
use crate::engine::store::{Change, Disk, Store};
use crate::engine::types::{Domain, Ino};
use shuttle::rand::{Rng, thread_rng};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

const THREADS: u8 = 3;
const COMMITS: u8 = 2;
const FIRST_FREE_INO: u64 = 2;

struct World {
    store: Arc<Store>,
    committer: Committer,
    keys: DomainKeys,
    /// Numbers that were given out.
    reserved: Mutex<Vec<Range<u64>>>,
    /// Commits that were answered for: whose they are, with their numbers.
    answered: Mutex<Vec<(Vec<u8>, Seq)>>,
}

impl World {
    fn new(disk: Disk) -> Arc<Self> {
        let store = Arc::new(Store::with(Path::new("commit"), disk));
        let root = RootRecord {
            ino_limit: FIRST_FREE_INO,
            sum: Some(RowSum::default()),
            ..RootRecord::default()
        };
        let last = Written {
            root,
            row: Vec::new(),
            usage: BTreeMap::new(),
            roots: BTreeMap::new(),
        };
        // A host without a single free block, and without ballast.
        let host = Path::new("/proc");
        let space = Arc::new(Space::new(host, Limits::of(host).unwrap()));
        Arc::new(Self {
            committer: Committer::new(Arc::clone(&store), space, last),
            store,
            keys: DomainKeys::new(&key_of(&[1; 32]), [2; 16], Version::LATEST, Domain::FIRST).unwrap(),
            reserved: Mutex::default(),
            answered: Mutex::default(),
        })
    }

    /// Whether the log failed, which the committer knows.
    fn is_poisoned(&self) -> bool {
        self.committer.check().is_err()
    }

    /// Commits one row of its own, which the root's sum covers.
    fn commit(&self, ino: Ino) -> Result<Seq, Error> {
        let was_poisoned = self.is_poisoned();
        let mut batch = Batch::default();
        let name = rowkey::orphan(ino);
        let row = self.keys.seal_row(Family::Meta, &name, &[]).unwrap();
        batch.note_replaced(&self.keys, &name, None, Seal::of_row(&row).as_ref());
        batch.put(Family::Meta, name.clone(), row);
        batch.count_inodes(Domain::FIRST, 1);
        let outcome = self.committer.commit(&self.keys, batch);
        if let Ok(seq) = outcome {
            assert!(!was_poisoned, "a commit succeeds after the log failed");
            assert!(self.committer.committed() >= seq);
            self.answered.lock().unwrap().push((name, seq));
        }
        outcome
    }

    fn sync_to(&self, seq: Seq) -> Result<(), Error> {
        let was_poisoned = self.is_poisoned();
        let outcome = self.committer.sync_to(seq);
        if outcome.is_ok() {
            assert!(!was_poisoned, "a sync succeeds after the log failed");
            self.check_durable(seq);
        }
        self.check_durable(self.committer.durable());
        outcome
    }

    /// Each commit is one batch of the log.
    fn check_durable(&self, seq: Seq) {
        let synced = self.store.disk().synced as u64;
        assert!(
            seq.0 <= synced,
            "{seq:?} is said to be durable, {synced} batches are"
        );
    }

    fn reserve(&self, count: u64) {
        if let Ok(first) = self.committer.reserve_inodes(&self.keys, Domain::FIRST, count) {
            let disk = self.store.disk();
            let durable = self.root_of(disk.log.get(disk.synced - 1).unwrap());
            assert!(durable.ino_limit >= first + count, "a reservation is not durable");
            self.reserved.lock().unwrap().push(first..first + count);
        }
    }

    fn root_of(&self, batch: &[Change]) -> RootRecord {
        let key = rowkey::root(Domain::FIRST);
        let mut roots = batch.iter().filter_map(|change| match change {
            Change::Put(Family::Meta, found, value) if *found == key => Some(value),
            _ => None,
        });
        let (root, none) = (roots.next().unwrap(), roots.next());
        assert!(none.is_none(), "a batch has two roots");
        RootRecord::decode(&self.keys.open_row(Family::Meta, &key, root).unwrap()).unwrap()
    }

    /// What the log is to be once all threads have ended.
    fn check_log(&self) {
        let disk = self.store.disk();
        let mut inodes = 0;
        let mut found = Vec::new();
        let mut sum = RowSum::default();
        for (batch, seq) in disk.log.iter().zip(1_u64..) {
            let root = self.root_of(batch);
            assert_eq!(root.commit_seq, seq);
            assert!(root.durable_seq < seq);
            for change in batch {
                if let Change::Put(Family::Meta, key, value) = change
                    && *key != rowkey::root(Domain::FIRST)
                {
                    inodes += 1;
                    let seal = Seal::of_row(value);
                    self.keys.replace_in(&mut sum, key, None, seal.as_ref());
                    found.push((key.clone(), Seq(seq)));
                }
            }
            assert_eq!(root.inodes, inodes);
            assert_eq!(root.sum, Some(sum), "the root is not that of the rows");
        }
        let mut answered = self.answered.lock().unwrap().clone();
        answered.sort();
        found.sort();
        assert_eq!(
            found, answered,
            "a commit is lost, doubled or under another number"
        );

        let mut reserved = self.reserved.lock().unwrap().clone();
        reserved.sort_by_key(|range| range.start);
        assert!(
            reserved.windows(2).all(|pair| pair[0].end <= pair[1].start),
            "a number is given out twice"
        );
    }
}

/// Each thread commits, sees its own order, syncs, and two reserve numbers.
fn run(disk: Disk) -> Arc<World> {
    let world = World::new(disk);
    let thread = |number: u8| -> Box<dyn FnOnce() + Send> {
        let world = Arc::clone(&world);
        Box::new(move || {
            let mut last = Seq::default();
            for round in 0..COMMITS {
                if let Ok(seq) = world.commit(Ino(u64::from(number) * 256 + u64::from(round) + 1)) {
                    assert!(seq > last, "a thread's own commits change their order");
                    last = seq;
                }
                let synced = match number {
                    // What others committed meanwhile as well.
                    1 => world.sync_to(world.committer.committed()),
                    _ => world.sync_to(last),
                };
                if synced.is_ok() && number == 0 {
                    world.reserve(4);
                }
            }
            if number == 1 {
                world.reserve(4);
            }
        })
    };
    together((0..THREADS).map(thread));
    world
}

#[test]
fn commits_are_ordered_and_none_is_lost_and_a_sync_covers_what_it_answers_for() {
    explore(5000, || {
        let world = run(Disk::default());
        world.check_log();
        assert_eq!(
            world.answered.lock().unwrap().len(),
            usize::from(THREADS * COMMITS)
        );
        assert_eq!(world.reserved.lock().unwrap().len(), usize::from(COMMITS) + 1);
        assert!(!world.is_poisoned());
    });
}

#[test]
fn after_a_failed_append_or_sync_nobody_succeeds() {
    explore(5000, || {
        let mut disk = Disk::default();
        disk.good = Some(thread_rng().gen_range(0..9));
        let world = run(disk);
        world.check_log();
        let has_failed = world.store.disk().good.is_none();
        assert_eq!(world.is_poisoned(), has_failed);
        if has_failed {
            assert_eq!(world.commit(Ino(9 * 256 + 9)), Err(Error::Poisoned));
            assert_eq!(world.sync_to(Seq::default()), Err(Error::Poisoned));
        }
    });
}

#[test]
fn a_log_without_room_costs_no_commit_and_no_sync() {
    explore(5000, || {
        let mut disk = Disk::default();
        disk.room = Some(thread_rng().gen_range(0..9));
        disk.is_there = thread_rng().gen_range(0..2) == 0;
        let world = run(disk);
        world.check_log();
        assert!(!world.is_poisoned());
        assert_eq!(
            world.answered.lock().unwrap().len(),
            usize::from(THREADS * COMMITS)
        );
        assert_eq!(world.reserved.lock().unwrap().len(), usize::from(COMMITS) + 1);
    });
}

#[test]
fn a_log_that_has_no_room_and_fails_makes_nothing_durable() {
    explore(5000, || {
        let mut disk = Disk::default();
        disk.good = Some(thread_rng().gen_range(0..9));
        disk.room = Some(thread_rng().gen_range(0..9));
        let world = run(disk);
        world.check_log();
        let has_failed = world.store.disk().good.is_none();
        assert_eq!(world.is_poisoned(), has_failed);
    });
}

#[test]
fn what_a_large_batch_finds_no_room_for_keeps_no_other_from_being_committed() {
    explore(5000, || {
        // The host has no room at all; what is small is tried all the same.
        let world = World::new(Disk::default());
        let small = |number: u8| -> Box<dyn FnOnce() + Send> {
            let world = Arc::clone(&world);
            Box::new(move || {
                let seq = world.commit(Ino(u64::from(number) * 256)).unwrap();
                world.sync_to(seq).unwrap();
            })
        };
        let large = Arc::clone(&world);
        let large = move || {
            let mut batch = Batch::default();
            batch.put(Family::Content, vec![9], vec![1; 100 << 10]);
            let outcome = large.committer.commit(&large.keys, batch);
            assert_eq!(outcome, Err(Error::Posix(libc::ENOSPC)));
        };
        together([small(0), Box::new(large), small(1), small(2)]);
        world.check_log();
        assert_eq!(world.answered.lock().unwrap().len(), 3);
        assert!(!world.is_poisoned());
    });
}

#[test]
fn a_batch_that_is_there_though_its_append_failed_is_durable() {
    explore(5000, || {
        let mut disk = Disk::default();
        disk.room = Some(thread_rng().gen_range(0..9));
        disk.is_there = true;
        // Nothing can be written, and nothing synced, until it is opened once more.
        disk.shuts = true;
        let world = run(disk);
        world.check_log();
        assert!(!world.is_poisoned());
    });
}
