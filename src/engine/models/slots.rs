//! One file whose chunks are overwritten, punched, published, drained and settled by several threads, over real slot files:
//! at any moment the power may go, and whichever of the batches that are not yet durable it leaves, each block is one of its
//! versions since its last sync. So no slot that a record names which may survive is handed out or written again.

use super::{Kms, explore, together};
use crate::engine::clock::SystemClock;
use crate::engine::format::chunk::{BLOCK, CHUNK, CHUNK_BLOCKS};
use crate::engine::keyservice::KeyService;
use crate::engine::open::{Writing, open_core};
use crate::engine::store::{Disk, Store};
use crate::engine::types::{Domain, Fallocate, FileKind, Ino, NewNode};
use crate::engine::upkeep::Background;
use crate::engine::volume::{CreateParams, Options, Volume};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::yield_now;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const META: &str = "meta";
const ROUNDS: usize = 3;
/// Points at which the power may go.
const MOMENTS: usize = 150;

/// A version of some blocks: all bytes of each are the same.
#[derive(Clone)]
struct Version {
    blocks: Range<usize>,
    byte: u8,
}

/// What one thread did to its own blocks.
#[derive(Default, Clone)]
struct History {
    begun: Vec<Version>,
    /// How many of them are durable.
    synced: usize,
}

impl History {
    /// What a block may be after a power cut.
    fn allowed(&self, block: usize) -> Vec<u8> {
        let of_block = |versions: &[Version]| -> Vec<u8> {
            let versions = versions.iter().filter(|version| version.blocks.contains(&block));
            versions.map(|version| version.byte).collect()
        };
        let (synced, later) = self.begun.split_at(self.synced);
        let mut allowed = of_block(later);
        allowed.push(of_block(synced).last().copied().unwrap_or(0));
        allowed
    }
}

/// What a power cut leaves, and what it may do so.
struct Cut {
    disk: Disk,
    slots: Vec<u8>,
    histories: Vec<History>,
}

struct World {
    dir: TempDir,
    volume: Volume,
    ino: Ino,
    /// One for each chunk.
    histories: [Mutex<History>; 2],
}

/// A volume in a scratch directory in memory.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn options() -> Options {
    Options {
        dek_prefetch: 1,
        ..Options::default()
    }
}

/// Opens the volume, without threads of its own.
fn open(dir: &Path) -> Volume {
    let kms = Arc::new(Kms::new()) as Arc<dyn KeyService>;
    let opened = open_core(dir, options(), kms, Arc::new(SystemClock), Writing::Allowed);
    Volume::with_background(opened.unwrap().core, Background::default())
}

fn slot_file(dir: &Path, ino: Ino) -> PathBuf {
    let shard = dir.join("data").join(format!("{:02x}", ino.0 % 256));
    shard.join(format!("{:016x}", ino.0))
}

impl World {
    fn new() -> Self {
        let dir = scratch();
        let params = CreateParams {
            cmk_arn: "acs:kms:local:1:key/test".to_owned(),
            uid: 0,
            gid: 0,
        };
        Volume::create(dir.path(), &params, &Kms::new(), [3; 16]).unwrap();
        let volume = open(dir.path());
        let node = NewNode {
            kind: FileKind::Regular,
            perm: 0o600,
            umask: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
        };
        let world = Self {
            ino: volume.make(Ino::ROOT, b"file", &node).unwrap().ino,
            volume,
            dir,
            histories: [Mutex::default(), Mutex::default()],
        };
        for chunk in 0..2 {
            world.write(chunk, 0..CHUNK_BLOCKS, 1);
        }
        world.sync(0);
        world.sync(1);
        world
    }

    fn note(&self, chunk: usize, blocks: Range<usize>, byte: u8) {
        let mut history = self.histories[chunk].lock().unwrap();
        history.begun.push(Version { blocks, byte });
    }

    fn write(&self, chunk: usize, blocks: Range<usize>, byte: u8) {
        let offset = (chunk * CHUNK + blocks.start * BLOCK) as u64;
        let data = vec![byte; blocks.len() * BLOCK];
        self.note(chunk, blocks, byte);
        assert_eq!(self.volume.write(self.ino, offset, &data), Ok(data.len()));
    }

    fn punch(&self, chunk: usize) {
        self.note(chunk, 0..CHUNK_BLOCKS, 0);
        let (offset, length) = ((chunk * CHUNK) as u64, CHUNK as u64);
        self.volume
            .fallocate(self.ino, Fallocate::PunchHole, offset, length)
            .unwrap();
    }

    /// fsync(2), after which what the thread did before is durable.
    fn sync(&self, chunk: usize) {
        let begun = self.histories[chunk].lock().unwrap().begun.len();
        self.volume.fsync(self.ino).unwrap();
        self.histories[chunk].lock().unwrap().synced = begun;
    }

    /// What a program does.
    fn work(&self, chunk: usize) {
        for round in 0..ROUNDS {
            let byte = 2 + round as u8;
            match thread_rng().gen_range(0..4) {
                0 => self.write(chunk, 3..4, byte),
                1 if chunk == 1 => self.punch(chunk),
                _ => self.write(chunk, 0..CHUNK_BLOCKS, byte),
            }
            match thread_rng().gen_range(0..3) {
                0 => self.sync(chunk),
                1 => {
                    let access = self.volume.core.drain(Domain::FIRST).unwrap();
                    access.publish(&access.node(self.ino).unwrap()).unwrap();
                }
                _ => {}
            }
        }
    }

    /// What the background does.
    fn keep_up(&self) {
        let core = &self.volume.core;
        for _ in 0..2 {
            core.committer.sync_to(core.committer.committed()).unwrap();
            core.for_active(|access, node| {
                access.settle(node)?;
                access.drain_file(node)
            })
            .unwrap();
        }
    }

    /// What the disk holds, now.
    fn cut(&self) -> Cut {
        let histories = self.histories.iter();
        Cut {
            disk: self.volume.core.store.disk().clone(),
            slots: fs::read(slot_file(self.dir.path(), self.ino)).unwrap(),
            histories: histories.map(|history| history.lock().unwrap().clone()).collect(),
        }
    }
}

/// Opens each volume that the cut may leave, and looks at every block.
fn check(dir: &Path, ino: Ino, cut: &Cut) {
    for count in cut.disk.synced..=cut.disk.log.len() {
        fs::write(slot_file(dir, ino), &cut.slots).unwrap();
        drop(Store::with(&dir.join(META), cut.disk.cut(count)));
        let volume = open(dir);
        let mut content = vec![0; 2 * CHUNK];
        let read = volume.read(ino, 0, &mut content);
        assert_eq!(read, Ok(content.len()), "with {count} batches");
        for (number, block) in content.chunks_exact(BLOCK).enumerate() {
            let history = &cut.histories[number / CHUNK_BLOCKS];
            let allowed = history.allowed(number % CHUNK_BLOCKS);
            assert!(block.iter().all(|byte| *byte == block[0]));
            assert!(
                allowed.contains(&block[0]),
                "with {count} batches block {number} is {}, not of {allowed:?}",
                block[0]
            );
        }
    }
}

#[test]
fn a_power_cut_leaves_each_block_in_one_of_its_versions() {
    explore(400, || {
        let world = Arc::new(World::new());
        let cut = Arc::new(Mutex::new(None));
        let thread = |work: fn(&World)| -> Box<dyn FnOnce() + Send> {
            let world = Arc::clone(&world);
            Box::new(move || work(&world))
        };
        let power = {
            let (world, cut) = (Arc::clone(&world), Arc::clone(&cut));
            Box::new(move || {
                for _ in 0..thread_rng().gen_range(0..MOMENTS) {
                    yield_now();
                }
                *cut.lock().unwrap() = Some(world.cut());
            })
        };
        together([
            thread(|world| world.work(0)),
            thread(|world| world.work(1)),
            thread(World::keep_up),
            power,
        ]);
        let (ino, last) = (world.ino, world.cut());
        let dir = Arc::into_inner(world).unwrap().dir;
        for cut in [cut.lock().unwrap().take().unwrap(), last] {
            check(dir.path(), ino, &cut);
        }
    });
}
