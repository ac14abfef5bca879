//! A host that has no room left for slots, and space that is given back to it.

use crate::support::{Answer, FILE, Fixture, content, eventually, files_below, noise};
use cmkfs::engine::{CacheObserver, Error, Fallocate, Ino, KeyState, SetAttr, Volume};
use rustix::mount::{MountFlags, UnmountFlags};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

/// A volume whose slot files lie on a filesystem of their own, with room for 1 MiB.
struct Cramped {
    fixture: Fixture,
    data: PathBuf,
}

impl Cramped {
    fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount a small tmpfs: run them as root"
        );
        let fixture = Fixture::new();
        let data = fixture.dir().join("data");
        rustix::mount::mount("none", &data, "tmpfs", MountFlags::empty(), Some(c"size=1m")).unwrap();
        Self { fixture, data }
    }

    fn free_blocks(&self) -> u64 {
        rustix::fs::statvfs(&self.data).unwrap().f_bfree
    }

    fn fill(&self) -> PathBuf {
        let path = self.data.join("fill");
        let mut length = 1 << 20;
        while length >= 4096 {
            let more = [noise(1, length), std::fs::read(&path).unwrap_or_default()].concat();
            if std::fs::write(&path, more).is_err() {
                length /= 2;
            }
        }
        path
    }
}

impl Drop for Cramped {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.data, UnmountFlags::DETACH).unwrap();
    }
}

fn is_full<T>(result: &Result<T, Error>) -> bool {
    result
        .as_ref()
        .err()
        .is_some_and(|error| error.errno() == libc::ENOSPC)
}

#[test]
fn what_the_kernel_wrote_back_is_taken_in_whole_or_refused() {
    let cramped = Cramped::new();
    let volume = cramped.fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let bytes = noise(1, 3 << 20);
    assert!(is_full(&volume.write_back(ino, 0, &bytes)));
    // A program is told how far it came.
    let other = volume.make(Ino::ROOT, b"other", &FILE).unwrap().ino;
    volume
        .setattr(
            ino,
            &SetAttr {
                size: Some(0),
                ..SetAttr::default()
            },
        )
        .unwrap();
    eventually(|| {
        cramped.fixture.clock.advance(std::time::Duration::from_secs(10));
        cramped.free_blocks() == 256
    });
    let count = volume.write(other, 0, &bytes).unwrap();
    assert!(count > 0 && count < bytes.len());
    volume.fsync(other).unwrap();
    assert!(content(&volume, other).unwrap() == bytes[..count]);
}

#[test]
fn a_write_that_fails_half_way_leaves_each_block_in_one_of_its_versions() {
    let cramped = Cramped::new();
    let volume = cramped.fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let (old, new) = (noise(1, 62_000), noise(2, 128 << 10));
    volume.write(ino, 0, &old).unwrap();
    let fill = cramped.fill();
    assert!(is_full(&volume.write(ino, 0, &new)));
    volume.fsync(ino).unwrap();
    let check = |volume: &Volume| {
        let got = content(volume, ino).unwrap();
        assert!(got.len() >= old.len());
        for (number, got) in got.chunks(4096).enumerate() {
            let of = |bytes: &[u8]| bytes[number * 4096..].starts_with(got);
            assert!(of(&new) || of(&old), "block {number}");
        }
        let size = got.len() as u64;
        (size, got)
    };
    let (size, got) = check(&volume);
    // Nothing of the new bytes lies hidden behind the end.
    let longer = SetAttr {
        size: Some(size + 100_000),
        ..SetAttr::default()
    };
    volume.setattr(ino, &longer).unwrap();
    let extended = content(&volume, ino).unwrap();
    assert!(extended[..got.len()] == got && extended[got.len()..].iter().all(|byte| *byte == 0));
    std::fs::remove_file(fill).unwrap();
    volume.close().unwrap();
    drop(volume);
    let volume = cramped.fixture.open();
    assert!(content(&volume, ino).unwrap() == extended);
}

#[test]
fn a_short_write_counts_no_block_behind_one_that_was_refused() {
    let cramped = Cramped::new();
    let volume = cramped.fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let block = |number: u64| number * 4096;
    let old = noise(1, 50 * 4096);
    // Chunk 1: blocks 32 to 40 are published, block 41 is not, and is the last.
    volume.write(ino, 0, &old[..41 * 4096]).unwrap();
    volume.fsync(ino).unwrap();
    volume
        .write(ino, block(41), &old[41 * 4096..42 * 4096 - 96])
        .unwrap();
    let fill = cramped.fill();
    let new = noise(2, 20 * 4096);
    let count = volume.write(ino, block(31), &new).unwrap();
    let got = content(&volume, ino).unwrap();
    let from = 31 * 4096;
    assert!(count < new.len() && got[from..from + count] == new[..count]);
    std::fs::remove_file(fill).unwrap();
    volume.close().unwrap();
}

#[test]
fn an_allocation_that_finds_no_room_takes_none() {
    let cramped = Cramped::new();
    let volume = cramped.fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let free = cramped.free_blocks();
    let allocate = Fallocate::Allocate { keep_size: false };
    assert!(is_full(&volume.fallocate(ino, allocate, 0, 4 << 20)));
    assert_eq!(cramped.free_blocks(), free);
    assert_eq!(volume.getattr(ino).unwrap().size, 0);
    volume.fallocate(ino, allocate, 0, 512 << 10).unwrap();
}

#[test]
fn what_was_allocated_can_be_written_on_a_full_disk() {
    let cramped = Cramped::new();
    let volume = cramped.fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    // The second chunk has a run before the allocation, and one of its blocks on the host.
    volume.write(ino, 128 << 10, &noise(1, 4096)).unwrap();
    volume.fsync(ino).unwrap();
    volume
        .fallocate(ino, Fallocate::Allocate { keep_size: false }, 0, 256 << 10)
        .unwrap();
    cramped.fill();
    let bytes = noise(2, 256 << 10);
    assert_eq!(volume.write(ino, 0, &bytes), Ok(bytes.len()));
    volume.fsync(ino).unwrap();
    assert!(content(&volume, ino).unwrap() == bytes);
}

/// A large file, stored.
fn large_file(volume: &Volume) -> Ino {
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    volume.write(ino, 0, &noise(1, 3 << 20)).unwrap();
    volume.fsync(ino).unwrap();
    ino
}

fn truncate(volume: &Volume, ino: Ino) {
    volume
        .setattr(
            ino,
            &SetAttr {
                size: Some(0),
                ..SetAttr::default()
            },
        )
        .unwrap();
}

#[test]
fn a_file_that_was_emptied_before_the_mount_leaves_no_slot_file() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let ino = large_file(&volume);
    truncate(&volume, ino);
    volume.close().unwrap();
    drop(volume);
    let data = fixture.dir().join("data");
    assert_eq!(files_below(&data).len(), 1);
    let volume = fixture.open();
    volume.unlink(Ino::ROOT, b"file").unwrap();
    eventually(|| {
        fixture.clock.advance(std::time::Duration::from_secs(10));
        files_below(&data).is_empty()
    });
}

#[test]
fn space_that_was_freed_before_the_dark_is_given_back() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let ino = large_file(&volume);
    let slots = files_below(&fixture.dir().join("data")).remove(0);
    assert!(slots.metadata().unwrap().blocks() >= 3 << 11);
    truncate(&volume, ino);
    fixture.kms.set(Answer::Disabled);
    eventually(|| volume.status().key_state == KeyState::Revoked);
    eventually(|| slots.metadata().unwrap().blocks() == 0);
}

/// Writes back when it is told to purge, as the kernel does.
struct WritesBack {
    volume: Weak<Volume>,
    ino: Ino,
    outcome: Mutex<Option<Result<(), Error>>>,
}

impl CacheObserver for WritesBack {
    fn purge(&self, _: &[Ino]) {
        let mut outcome = self.outcome.lock().unwrap();
        if let (None, Some(volume)) = (&*outcome, self.volume.upgrade()) {
            *outcome = Some(volume.write_back(self.ino, 0, b"late"));
        }
    }
}

#[test]
fn what_is_written_back_when_the_volume_goes_dark_has_a_time() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let made = volume.make(Ino::ROOT, b"file", &FILE).unwrap();
    let kernel = Arc::new(WritesBack {
        volume: Arc::downgrade(&volume),
        ino: made.ino,
        outcome: Mutex::new(None),
    });
    volume.set_observer(kernel.clone());
    fixture.clock.advance(std::time::Duration::from_secs(5));
    fixture.kms.set(Answer::Disabled);
    eventually(|| volume.status().key_state == KeyState::Revoked);
    assert_eq!(*kernel.outcome.lock().unwrap(), Some(Ok(())));
    fixture.kms.set(Answer::Enabled);
    eventually(|| volume.status().key_state == KeyState::Live);
    assert_eq!(content(&volume, made.ino).unwrap(), b"late");
    let mtime = volume.getattr(made.ino).unwrap().mtime;
    assert_eq!(mtime.secs, made.mtime.secs + 5);
}
