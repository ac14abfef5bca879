//! Daemons that are killed under load.

use crate::world::{World, eventually, noise};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Writes files and syncs every one until it fails or `stop`; how many were synced.
fn load(dir: &Path, stop: &AtomicBool, synced: &AtomicU64) {
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let write = || {
            let mut file = File::create(dir.join(format!("file {number}")))?;
            file.write_all(&bytes_of(number))?;
            file.sync_all()?;
            File::open(dir)?.sync_all()
        };
        if write().is_err() {
            return;
        }
        synced.store(number + 1, Ordering::SeqCst);
    }
}

/// Small files, and every seventh large.
fn bytes_of(number: u64) -> Vec<u8> {
    noise(
        number,
        if number.is_multiple_of(7) {
            200_000
        } else {
            1000 + number as usize
        },
    )
}

fn check(dir: &Path, synced: u64) {
    for number in 0..synced {
        assert!(
            fs::read(dir.join(format!("file {number}"))).unwrap() == bytes_of(number),
            "file {number}"
        );
    }
    // What was not synced may be anything but unreadable.
    for entry in fs::read_dir(dir).unwrap() {
        fs::read(entry.unwrap().path()).unwrap();
    }
}

#[test]
fn what_was_synced_survives_the_mounts_death() {
    let mut world = World::new();
    let mut dirs: Vec<(PathBuf, u64)> = Vec::new();
    for round in 0..5 {
        let dir = world.at(&format!("round {round}"));
        fs::create_dir(&dir).unwrap();
        let (stop, synced) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| load(&dir, &stop, &synced));
            eventually("some files are synced", || {
                synced.load(Ordering::SeqCst) >= 40 + round * 13
            });
            world.end_mount(libc::SIGKILL);
            stop.store(true, Ordering::SeqCst);
        });
        world.mount(&[]);
        dirs.push((dir, synced.into_inner()));
        for (dir, synced) in &dirs {
            check(dir, *synced);
        }
    }
    world.unmount();
}

#[test]
fn the_mount_goes_on_when_kmsd_was_killed_and_started_again() {
    let mut world = World::new();
    let dir = world.at("dir");
    fs::create_dir(&dir).unwrap();
    let (stop, synced) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| load(&dir, &stop, &synced));
        for round in 1..4 {
            eventually("some files are synced", || {
                synced.load(Ordering::SeqCst) >= round * 50
            });
            world.stop_kmsd(libc::SIGKILL);
            world.start_kmsd();
        }
        // More than were prefetched: the new kmsd has issued keys.
        let reached = synced.load(Ordering::SeqCst);
        eventually("many more files are synced", || {
            synced.load(Ordering::SeqCst) >= reached + 600
        });
        stop.store(true, Ordering::SeqCst);
    });
    world.unmount();
    world.mount(&[]);
    check(&dir, synced.into_inner());
    world.unmount();
}

#[test]
fn both_daemons_killed_at_once_lose_nothing_that_was_synced() {
    let mut world = World::new();
    let dir = world.at("dir");
    fs::create_dir(&dir).unwrap();
    let (stop, synced) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| load(&dir, &stop, &synced));
        eventually("some files are synced", || synced.load(Ordering::SeqCst) >= 100);
        world.stop_kmsd(libc::SIGKILL);
        world.end_mount(libc::SIGKILL);
        stop.store(true, Ordering::SeqCst);
    });
    world.start_kmsd();
    world.mount(&[]);
    check(&dir, synced.into_inner());
    world.unmount();
}
