//! A host that is filled to its last block, by the volume itself or by others.

use crate::support::{FILE, Fixture, content, copy_dir, eventually, noise};
use cmkfs::engine::{Error, Ino, Volume};
use rustix::mount::UnmountFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

const HOST_BYTES: u64 = 128 << 20;

/// A volume on a small ext4 of its own.
struct SmallHost {
    fixture: Fixture,
}

impl SmallHost {
    fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount a small ext4: run them as root"
        );
        let fixture = Fixture::prepared(|dir| {
            let image = dir.with_extension("image");
            File::create(&image).unwrap().set_len(HOST_BYTES).unwrap();
            run(Command::new("mkfs.ext4")
                .args(["-q", "-F", "-m", "0"])
                .arg(&image));
            run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(dir));
            std::fs::remove_dir(dir.join("lost+found")).unwrap();
        });
        Self { fixture }
    }

    fn filling(&self) -> PathBuf {
        self.fixture.dir().join("filling")
    }

    /// Somebody else takes all but `left` bytes.
    fn fill(&self, left: u64) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(self.filling())
            .unwrap();
        let mut piece = vec![1; 1 << 20];
        while !piece.is_empty() {
            let is_left = left > 0 && self.free() <= left + piece.len() as u64;
            if is_left || file.write_all(&piece).is_err() {
                piece.truncate(piece.len() / 2);
            }
        }
        // What ext4 promised without a block for it.
        let _full = file.sync_all();
    }

    fn free(&self) -> u64 {
        let host = rustix::fs::statvfs(self.fixture.dir()).unwrap();
        host.f_bavail * host.f_frsize
    }

    /// Lets the background do what is due, until `holds`.
    fn in_time(&self, mut holds: impl FnMut() -> bool) {
        eventually(|| {
            self.fixture.clock.advance(Duration::from_secs(10));
            holds()
        });
    }
}

impl Drop for SmallHost {
    fn drop(&mut self) {
        rustix::mount::unmount(self.fixture.dir(), UnmountFlags::DETACH).unwrap();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn is_full<T>(result: &Result<T, Error>) -> bool {
    result
        .as_ref()
        .err()
        .is_some_and(|error| error.errno() == libc::ENOSPC)
}

/// What is in a volume, as far as it was acknowledged.
#[derive(Default)]
struct Kept {
    files: BTreeMap<String, (Ino, Vec<u8>)>,
    made: u64,
}

impl Kept {
    /// Makes a file, stored; false if there is no room for it.
    fn add(&mut self, volume: &Volume, length: usize) -> bool {
        self.made += 1;
        let (name, bytes) = (format!("file {}", self.made), noise(self.made, length));
        let made = volume.make(Ino::ROOT, name.as_bytes(), &FILE);
        if is_full(&made) {
            return false;
        }
        let ino = made.unwrap().ino;
        let stored = volume.write_back(ino, 0, &bytes).and_then(|()| volume.fsync(ino));
        volume.forget(ino, 1);
        if is_full(&stored) {
            let removed = volume.unlink(Ino::ROOT, name.as_bytes());
            assert!(removed.is_ok() || is_full(&removed));
            return false;
        }
        stored.unwrap();
        self.files.insert(name, (ino, bytes));
        true
    }

    fn fill(&mut self, volume: &Volume, lengths: &[usize]) {
        let mut lengths = lengths.iter().cycle();
        while self.add(volume, *lengths.next().unwrap()) {}
    }

    fn remove_every_other(&mut self, volume: &Volume) {
        let names: Vec<_> = self.files.keys().step_by(2).cloned().collect();
        for name in names {
            volume.unlink(Ino::ROOT, name.as_bytes()).unwrap();
            self.files.remove(&name);
        }
    }

    fn check(&self, volume: &Volume) {
        for (ino, bytes) in self.files.values() {
            assert!(content(volume, *ino).unwrap() == *bytes);
        }
    }

    /// Everything is there, nothing more is, and all of it is sound.
    fn check_closed(&self, host: &SmallHost, volume: Arc<Volume>) {
        volume.close().unwrap();
        drop(volume);
        self.check(&host.fixture.open());
        host.fixture.assert_consistent();
    }
}

const LARGE: usize = 3 << 20;
const SMALL: usize = 3000;
const MIXED: [usize; 5] = [SMALL, 20_000, SMALL, 300_000, LARGE];

#[test]
fn a_volume_that_filled_its_host_is_read_emptied_and_filled_again() {
    for lengths in [&[LARGE][..], &MIXED, &[SMALL, 20_000]] {
        let host = SmallHost::new();
        let volume = host.fixture.open();
        let mut kept = Kept::default();
        kept.fill(&volume, lengths);
        let first = kept.files.values().map(|(_, bytes)| bytes.len()).sum::<usize>();
        assert!(first as u64 > HOST_BYTES / 2, "{first}");
        kept.check(&volume);
        // What is there can be written again.
        let (name, (ino, mut bytes)) = kept.files.pop_first().unwrap();
        bytes[..2000].fill(7);
        volume.write_back(ino, 0, &bytes[..2000]).unwrap();
        volume.fsync(ino).unwrap();
        kept.files.insert(name, (ino, bytes));
        kept.remove_every_other(&volume);
        host.in_time(|| volume.statfs().unwrap().blocks_available * 4096 > first as u64 / 3);
        kept.fill(&volume, lengths);
        let second = kept.files.values().map(|(_, bytes)| bytes.len()).sum::<usize>();
        assert!(second > first / 5 * 4, "{first} {second}");
        kept.check_closed(&host, volume);
    }
}

#[test]
fn a_host_filled_by_others_to_its_last_block_costs_nothing_that_is_there() {
    for lengths in [&MIXED[..], &[SMALL, 20_000]] {
        let host = SmallHost::new();
        let volume = host.fixture.open();
        let mut kept = Kept::default();
        while kept.files.values().map(|(_, bytes)| bytes.len()).sum::<usize>() < 70 << 20 {
            assert!(lengths.iter().all(|length| kept.add(&volume, *length)));
        }
        host.fill(0);
        kept.fill(&volume, &[SMALL]);
        // Changes that need no room of their own find the ballast's.
        for _ in 0..100 {
            let (_, (ino, bytes)) = kept.files.iter_mut().next().unwrap();
            let next = bytes[0].wrapping_add(1);
            bytes[..100].fill(next);
            let changed = volume
                .write_back(*ino, 0, &bytes[..100])
                .and_then(|()| volume.fsync(*ino));
            assert!(changed.is_ok() || is_full(&changed), "{changed:?}");
            *bytes = content(&volume, *ino).unwrap();
        }
        kept.check(&volume);
        kept.remove_every_other(&volume);
        host.in_time(|| kept.add(&volume, LARGE));
        std::fs::remove_file(host.filling()).unwrap();
        host.in_time(|| volume.statfs().unwrap().blocks_available * 4096 > 20 << 20);
        assert!(!volume.status().failed);
        for _ in 0..5 {
            // A compaction that goes on has copies of its own for as long.
            host.in_time(|| kept.add(&volume, LARGE));
        }
        kept.check_closed(&host, volume);
    }
}

#[test]
fn what_was_synced_on_a_full_host_survives_a_crash() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    let mut kept = Kept::default();
    assert!((0..100).all(|_| kept.add(&volume, SMALL) && kept.add(&volume, 300_000)));
    host.fill(0);
    kept.fill(&volume, &[SMALL]);
    kept.remove_every_other(&volume);
    volume.fsync(Ino::ROOT).unwrap();
    // As long as the host is full, and the clock stands still, nothing changes but what RocksDB does for itself.
    let meta = host.fixture.dir().join("meta");
    let files = || {
        let files = crate::support::files_below(&meta).into_iter();
        let sizes = files.map(|file| std::fs::metadata(&file).map(|file| file.len()).ok());
        sizes.zip(crate::support::files_below(&meta)).collect::<Vec<_>>()
    };
    let mut copies = 0;
    let copy = loop {
        let before = files();
        let copy = host.fixture.scratch.path().join(format!("copy {copies}"));
        let copied = std::panic::catch_unwind(|| copy_dir(&host.fixture.dir(), &copy));
        copies += 1;
        if copied.is_ok() && files() == before {
            break copy;
        }
    };
    std::fs::remove_file(host.filling()).unwrap();
    let copied = host.fixture.try_open_at(&copy).unwrap();
    kept.check(&copied);
    let there = crate::support::list(&copied, Ino::ROOT).unwrap();
    assert!(
        there
            .iter()
            .all(|(name, _)| kept.files.contains_key(std::str::from_utf8(name).unwrap()))
    );
    kept.check_closed(&host, volume);
}

#[test]
fn a_volume_opens_on_a_full_host() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    let mut kept = Kept::default();
    assert!((0..200).all(|_| kept.add(&volume, SMALL) && kept.add(&volume, 100_000)));
    host.fill(0);
    // A crash: what is in the log has to be recovered without room.
    drop(volume);
    let volume = host.fixture.open();
    kept.check(&volume);
    kept.remove_every_other(&volume);
    kept.check(&volume);
    std::fs::remove_file(host.filling()).unwrap();
    host.in_time(|| kept.files.len() == 200 && volume.statfs().unwrap().blocks_available > 0);
    assert!(kept.add(&volume, LARGE));
    kept.check_closed(&host, volume);
}

#[test]
fn a_compaction_without_room_ends_no_volume() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    let mut kept = Kept::default();
    assert!((0..1000).all(|_| kept.add(&volume, 10_000)));
    for left in [6 << 20, 2 << 20, 0] {
        host.fill(left);
        // Memtables fill, are stored, and compacted.
        for round in 0..30 {
            let names: Vec<_> = kept.files.keys().cloned().collect();
            for name in names.iter().skip(round).step_by(40) {
                let (ino, bytes) = kept.files.get_mut(name).unwrap();
                let written = volume
                    .write_back(*ino, 0, &noise(round as u64, 5000))
                    .and_then(|()| volume.fsync(*ino));
                assert!(written.is_ok() || is_full(&written), "{written:?}");
                *bytes = content(&volume, *ino).unwrap();
            }
        }
        kept.check(&volume);
    }
    assert!(!volume.status().failed);
    kept.remove_every_other(&volume);
    std::fs::remove_file(host.filling()).unwrap();
    host.in_time(|| volume.statfs().unwrap().blocks_available * 4096 > 25 << 20);
    assert!(kept.add(&volume, LARGE));
    kept.check_closed(&host, volume);
}

#[test]
fn a_read_only_mount_of_a_full_host_takes_nothing_away() {
    let mut host = SmallHost::new();
    let volume = host.fixture.open();
    let mut kept = Kept::default();
    assert!((0..200).all(|_| kept.add(&volume, SMALL) && kept.add(&volume, 100_000)));
    // What RocksDB had allocated ahead is free again with it.
    drop(volume);
    host.fill(0);
    host.fixture.options.read_only = true;
    let volume = host.fixture.open();
    kept.check(&volume);
    assert!(host.fixture.dir().join("ballast").exists());
}

#[test]
fn overwrites_that_find_no_room_keep_nothing_from_being_removed() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    let mut kept = Kept::default();
    assert!((0..2000).all(|_| kept.add(&volume, 500)));
    let bytes = noise(7, 20 << 20);
    let large = volume.make(Ino::ROOT, b"large", &FILE).unwrap().ino;
    volume.write_back(large, 0, &bytes).unwrap();
    volume.fsync(large).unwrap();
    // A block of each chunk stays as it is: what is written over the others goes inline.
    let next = noise(8, 124 << 10);
    for chunk in 0..bytes.len() as u64 / (128 << 10) {
        volume.write_back(large, chunk << 17, &next).unwrap();
    }
    host.fill(0);
    for _ in 0..5 {
        assert!(is_full(&volume.fsync(large)));
        // The background tries as well.
        host.fixture.clock.advance(Duration::from_secs(10));
    }
    assert!(volume.status().pending_bytes > 18 << 20);
    kept.remove_every_other(&volume);
    kept.remove_every_other(&volume);
    volume.unlink(Ino::ROOT, b"large").unwrap();
    volume.fsync(Ino::ROOT).unwrap();
    volume.forget(large, 1);
    host.in_time(|| host.free() > 16 << 20);
    assert!(!volume.status().failed);
    kept.check_closed(&host, volume);
}

#[test]
fn a_volume_closes_on_a_full_host() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    let mut kept = Kept::default();
    assert!((0..200).all(|_| kept.add(&volume, SMALL) && kept.add(&volume, 100_000)));
    host.fill(0);
    kept.check_closed(&host, volume);
}

#[test]
fn what_statfs_calls_available_can_be_written() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    let available = || volume.statfs().unwrap().blocks_available * 4096;
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    // What is in memory alone counts as written.
    let before = available();
    let small: Vec<_> = (0..300).map(|number| format!("small {number}")).collect();
    for name in &small {
        let ino = volume.make(Ino::ROOT, name.as_bytes(), &FILE).unwrap().ino;
        volume.write_back(ino, 0, &noise(1, 30_000)).unwrap();
    }
    assert!(available() + (8 << 20) < before, "{before} {}", available());
    let promised = available();
    let piece = noise(2, 128 << 10);
    // Records of chunks, the log and the tables take a share that nobody knows before.
    for at in (0..promised - promised / 16).step_by(piece.len()) {
        volume.write_back(ino, at, &piece).unwrap();
        if at % (8 << 20) == 0 {
            volume.fsync(ino).unwrap();
        }
    }
    volume.fsync(ino).unwrap();
    let left = available();
    assert!(left < promised / 8, "{promised} {left}");
}

#[test]
fn what_is_inline_stays_there_on_a_host_that_is_low() {
    let host = SmallHost::new();
    let volume = host.fixture.open();
    // Beginnings that are inline, of files that have become large.
    let inodes: Vec<_> = (0..100)
        .map(|number| {
            let name = format!("file {number}");
            let ino = volume.make(Ino::ROOT, name.as_bytes(), &FILE).unwrap().ino;
            volume.write_back(ino, 0, &noise(number, 20_000)).unwrap();
            volume.write_back(ino, 1 << 20, &noise(number, 4096)).unwrap();
            volume.fsync(ino).unwrap();
            ino
        })
        .collect();
    let taken = || {
        let files = crate::support::files_below(&host.fixture.dir().join("data"));
        let blocks = |file: &PathBuf| std::fs::metadata(file).unwrap().blocks();
        files.iter().map(blocks).sum::<u64>()
    };
    let before = taken();
    host.fill(12 << 20);
    for _ in 0..3 {
        // A round of the background shows by what it made durable.
        volume.write_back(inodes[0], 1 << 20, &noise(9, 4096)).unwrap();
        let seq = volume.status().durable_seq;
        host.in_time(|| volume.status().durable_seq > seq);
    }
    assert_eq!(taken(), before);
    std::fs::remove_file(host.filling()).unwrap();
    host.in_time(|| taken() >= before + 100 * 32);
}
