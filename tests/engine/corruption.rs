//! Storage that holds what was not written: an error, or the right data; never wrong data, never a panic.

use crate::support::{FILE, Fixture, content, copy_dir, files_below, flip, noise};
use crate::tree;
use cmkfs::engine::{Error, Ino, Volume};
use std::path::{Path, PathBuf};

/// Positions damaged in each file, beside its first and last byte.
const POSITIONS: u64 = 12;

/// A closed volume with the tree in it.
fn closed_tree() -> Fixture {
    let fixture = Fixture::new();
    let volume = fixture.open();
    tree::make(&volume);
    volume.close().unwrap();
    drop(volume);
    fixture
}

/// Opens `dir` and compares everything. `None` if it does not open, else the number of errors.
fn errors_in(fixture: &Fixture, dir: &Path) -> Option<usize> {
    let volume = fixture.try_open_at(dir).ok()?;
    Some(tree::check(&volume))
}

#[test]
fn one_bit_flipped_anywhere_gives_an_error_or_the_right_data() {
    let fixture = closed_tree();
    assert_eq!(errors_in(&fixture, &fixture.dir()), Some(0));
    let pristine = fixture.scratch.path().join("pristine");
    copy_dir(&fixture.dir(), &pristine);
    let (mut flips, mut noticed) = (0, 0);
    for file in files_below(&pristine) {
        let length = std::fs::metadata(&file).unwrap().len();
        let random = noise(length, 8 * POSITIONS as usize);
        let random = random
            .chunks_exact(8)
            .map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap()));
        let mut positions: Vec<_> = [0, length.saturating_sub(1)].into_iter().chain(random).collect();
        positions.retain_mut(|at| {
            *at = at.checked_rem(length).unwrap_or(0);
            length > 0
        });
        positions.sort_unstable();
        positions.dedup();
        for at in positions {
            let damaged = fixture.scratch.path().join("damaged");
            copy_dir(&pristine, &damaged);
            flip(&damaged.join(file.strip_prefix(&pristine).unwrap()), at);
            flips += 1;
            noticed += usize::from(errors_in(&fixture, &damaged) != Some(0));
            std::fs::remove_dir_all(&damaged).unwrap();
        }
    }
    // Not every byte of a database file is read; the slots alone make a good part of those that are.
    assert!(noticed * 4 > flips, "{noticed} of {flips} flips were noticed");
}

/// A volume with two files of equal size in slots, closed, and its two slot files.
fn two_large_files() -> (Fixture, [Ino; 2], [PathBuf; 2]) {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let inodes = [b"one", b"two"].map(|name| {
        let ino = volume.make(Ino::ROOT, name, &FILE).unwrap().ino;
        volume.write(ino, 0, &noise(ino.0, 300_000)).unwrap();
        ino
    });
    volume.close().unwrap();
    drop(volume);
    let data = fixture.dir().join("data");
    let slots = inodes.map(|ino| {
        let named = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap() == format!("{:016x}", ino.0);
        files_below(&data).into_iter().find(named).unwrap()
    });
    (fixture, inodes, slots)
}

fn is_corrupt(volume: &Volume, ino: Ino) -> bool {
    matches!(content(volume, ino), Err(Error::Corrupt { .. }))
}

#[test]
fn slots_swapped_within_a_file_are_refused() {
    let (fixture, [one, two], slots) = two_large_files();
    let mut bytes = std::fs::read(&slots[0]).unwrap();
    let (first, rest) = bytes.split_at_mut(4096);
    first.swap_with_slice(&mut rest[..4096]);
    std::fs::write(&slots[0], bytes).unwrap();
    let volume = fixture.open();
    assert!(is_corrupt(&volume, one));
    assert_eq!(content(&volume, two).unwrap(), noise(two.0, 300_000));
}

#[test]
fn slot_files_swapped_between_inodes_are_refused() {
    let (fixture, [one, two], slots) = two_large_files();
    let aside = fixture.scratch.path().join("aside");
    std::fs::rename(&slots[0], &aside).unwrap();
    std::fs::rename(&slots[1], &slots[0]).unwrap();
    std::fs::rename(&aside, &slots[1]).unwrap();
    let volume = fixture.open();
    assert!(is_corrupt(&volume, one) && is_corrupt(&volume, two));
}

#[test]
fn a_zeroed_slot_is_no_hole() {
    let (fixture, [one, _], slots) = two_large_files();
    let mut bytes = std::fs::read(&slots[0]).unwrap();
    bytes[8192..12288].fill(0);
    std::fs::write(&slots[0], bytes).unwrap();
    let volume = fixture.open();
    assert_eq!(volume.read(one, 0, &mut [0; 8192]), Ok(8192));
    assert!(matches!(
        volume.read(one, 8192, &mut [0; 4096]),
        Err(Error::Corrupt { .. })
    ));
}

#[test]
fn a_slot_file_cut_short_or_missing_is_refused() {
    let (fixture, [one, two], slots) = two_large_files();
    std::fs::File::options()
        .write(true)
        .open(&slots[0])
        .unwrap()
        .set_len(100_000)
        .unwrap();
    std::fs::remove_file(&slots[1]).unwrap();
    let volume = fixture.open();
    assert!(is_corrupt(&volume, one) && is_corrupt(&volume, two));
}

#[test]
fn an_older_version_of_a_slot_is_refused() {
    let (fixture, [one, _], slots) = two_large_files();
    let old = std::fs::read(&slots[0]).unwrap();
    let volume = fixture.open();
    volume.write(one, 4096, &noise(99, 4096)).unwrap();
    volume.close().unwrap();
    drop(volume);
    let mut bytes = std::fs::read(&slots[0]).unwrap();
    assert_ne!(
        old[4096..8192],
        bytes[4096..8192],
        "the overwritten block was drained to its slot"
    );
    bytes[4096..8192].copy_from_slice(&old[4096..8192]);
    std::fs::write(&slots[0], bytes).unwrap();
    let volume = fixture.open();
    assert!(matches!(
        volume.read(one, 4096, &mut [0; 4096]),
        Err(Error::Corrupt { .. })
    ));
    assert_eq!(volume.read(one, 0, &mut [0; 4096]), Ok(4096));
}

#[test]
fn a_copy_stops_before_what_is_damaged_and_tells_how_far_it_came() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let from = volume.make(Ino::ROOT, b"from", &FILE).unwrap().ino;
    let to = volume.make(Ino::ROOT, b"to", &FILE).unwrap().ino;
    let bytes = noise(1, 3 << 20);
    volume.write(from, 0, &bytes).unwrap();
    volume.fsync(from).unwrap();
    let slots = files_below(&fixture.dir().join("data"));
    assert_eq!(slots.len(), 1);
    flip(&slots[0], 3 << 19);
    assert_eq!(volume.copy_range(from, 0, to, 0, 3 << 20), Ok(1 << 20));
    assert!(content(&volume, to).unwrap() == bytes[..1 << 20]);
    let rest = volume.copy_range(from, 1 << 20, to, 1 << 20, 2 << 20);
    assert!(matches!(rest, Err(Error::Corrupt { .. })));
}
