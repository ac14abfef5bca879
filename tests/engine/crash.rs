//! What is there after a process was killed, and which volumes do not open.

use crate::support::{FILE, Fixture, content, copy_dir, eventually, files_below, noise};
use crate::tree;
use cmkfs::engine::{CheckOptions, Error, Fault, Ino, OpenError, SetAttr, Verify};
use std::time::Duration;

/// Opens a copy of the volume as it lies on disk now, while it is open: what a kill -9 would leave.
fn opened_copy(fixture: &Fixture) -> std::sync::Arc<cmkfs::engine::Volume> {
    let copy = fixture.scratch.path().join("copy");
    if copy.exists() {
        std::fs::remove_dir_all(&copy).unwrap();
    }
    copy_dir(&fixture.dir(), &copy);
    fixture.try_open_at(&copy).unwrap()
}

#[test]
fn what_was_synced_is_there_whole_without_a_close() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    tree::make(&volume);
    volume.fsync(Ino::ROOT).unwrap();
    assert_eq!(tree::check(&opened_copy(&fixture)), 0);
}

#[test]
fn an_overwrite_that_was_not_synced_leaves_the_old_block_or_the_new_one() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let (old, new) = (noise(1, 400_000), noise(2, 400_000));
    volume.write(ino, 0, &old).unwrap();
    volume.fsync(ino).unwrap();
    for (at, length) in [(0, 4096), (131_072, 131_072), (270_000, 30_000)] {
        volume.write(ino, at as u64, &new[at..at + length]).unwrap();
        let copy = opened_copy(&fixture);
        let got = content(&copy, ino).unwrap();
        for ((got, old), new) in got.chunks(4096).zip(old.chunks(4096)).zip(new.chunks(4096)) {
            assert!(
                got.iter()
                    .zip(old.iter().zip(new))
                    .all(|(got, (old, new))| got == old || got == new)
            );
        }
    }
}

#[test]
fn space_that_a_crash_left_unnamed_is_given_back_by_the_next_mount() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let kept = volume.make(Ino::ROOT, b"kept", &FILE).unwrap().ino;
    volume.write(kept, 0, &noise(1, 300_000)).unwrap();
    let emptied = volume.make(Ino::ROOT, b"emptied", &FILE).unwrap().ino;
    volume.fsync(kept).unwrap();
    // Written, and not named by any commit: behind what is, in a file that has nothing yet, in one that is not born.
    let image = fixture.scratch.path().join("image");
    copy_dir(&fixture.dir(), &image);
    volume.write(kept, 1 << 20, &noise(2, 300_000)).unwrap();
    volume.write(emptied, 0, &noise(3, 300_000)).unwrap();
    let unborn = volume.make(Ino::ROOT, b"unborn", &FILE).unwrap().ino;
    volume.write(unborn, 0, &noise(4, 300_000)).unwrap();
    let data = image.join("data");
    std::fs::remove_dir_all(&data).unwrap();
    copy_dir(&fixture.dir().join("data"), &data);
    volume.close().unwrap();
    drop(volume);

    let problems = |fixture: &Fixture| {
        let report = fixture.try_check(CheckOptions::default()).unwrap();
        let faults = report
            .problems
            .into_iter()
            .map(|problem| (problem.fault, problem.ino.unwrap()));
        faults.collect::<Vec<_>>()
    };
    std::fs::remove_dir_all(fixture.dir()).unwrap();
    std::fs::rename(&image, fixture.dir()).unwrap();
    let leaked: Vec<_> = problems(&fixture);
    assert_eq!(leaked.len(), 3, "{leaked:?}");
    assert!(leaked.iter().all(|(fault, _)| *fault == Fault::LeakedSpace));
    let volume = fixture.open();
    eventually(|| !volume.status().is_unswept);
    assert_eq!(content(&volume, kept).unwrap(), noise(1, 300_000));
    volume.close().unwrap();
    drop(volume);
    assert_eq!(problems(&fixture), []);
    assert!(!fixture.dir().join("unclean").exists());
}

#[test]
fn what_chunks_name_is_swept_by_no_mount_whatever_else_is_lost() {
    for kind in [b'B', b'I'] {
        let mut fixture = Fixture::new();
        // What is verified would be told before, and nothing swept.
        fixture.options.verify = Verify::Off;
        let volume = fixture.open();
        let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
        volume.write(ino, 0, &noise(1, 300_000)).unwrap();
        volume.close().unwrap();
        drop(volume);
        let slots = files_below(&fixture.dir().join("data")).pop().unwrap();
        let before = std::fs::read(&slots).unwrap();
        // As after a crash, and a record is gone.
        std::fs::write(fixture.dir().join("unclean"), b"").unwrap();
        {
            let options = rocksdb::Options::default();
            let db = rocksdb::DB::open_cf(&options, fixture.dir().join("meta"), ["meta", "content"]).unwrap();
            let key = [&[0, 0, kind][..], &ino.0.to_be_bytes()].concat();
            let end = [&key[..], &[0xff; 9]].concat();
            db.delete_range_cf(db.cf_handle("meta").unwrap(), key, end)
                .unwrap();
        }
        let volume = fixture.open();
        eventually(|| !volume.status().is_unswept);
        volume.close().unwrap();
        assert!(std::fs::read(&slots).unwrap() == before);
    }
}

#[test]
fn many_rounds_of_overwriting_draining_and_crashing_lose_nothing_that_was_synced() {
    let fixture = Fixture::new();
    let mut expected = noise(0, 600_000);
    let ino = {
        let volume = fixture.open();
        let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
        volume.write(ino, 0, &expected).unwrap();
        volume.fsync(ino).unwrap();
        ino
    };
    for round in 1..40_u64 {
        let volume = fixture.open();
        assert!(content(&volume, ino).unwrap() == expected, "round {round}");
        for (index, at) in noise(round, 6).chunks(2).enumerate() {
            let at = usize::from(u16::from_be_bytes([at[0], at[1]])) * 8;
            let bytes = noise(round * 10 + index as u64, 4096 * (1 + index * 16));
            let end = (at + bytes.len()).min(expected.len());
            volume.write(ino, at as u64, &bytes[..end - at]).unwrap();
            expected[at..end].copy_from_slice(&bytes[..end - at]);
        }
        volume.fsync(ino).unwrap();
        // Lets the background drain before every other crash.
        if round % 2 == 0 {
            let before = volume.status().commit_seq;
            fixture.clock.advance(Duration::from_secs(10));
            eventually(|| volume.status().commit_seq > before);
        }
    }
}

#[test]
fn an_orphan_is_reclaimed_by_the_next_mount() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    volume.write(ino, 0, &noise(1, 300_000)).unwrap();
    volume.unlink(Ino::ROOT, b"file").unwrap();
    // It has no name, but the kernel still knows it.
    volume
        .setattr(
            ino,
            &SetAttr {
                perm: Some(0o600),
                ..SetAttr::default()
            },
        )
        .unwrap();
    assert_eq!(content(&volume, ino).unwrap(), noise(1, 300_000));
    volume.fsync(ino).unwrap();
    drop(volume);
    let data = fixture.dir().join("data");
    assert_eq!(files_below(&data).len(), 1);
    let volume = fixture.open();
    eventually(|| {
        fixture.clock.advance(Duration::from_secs(10));
        volume.status().inodes == 1 && files_below(&data).is_empty()
    });
    assert_eq!(volume.status().blocks, 0);
}

#[test]
fn an_orphan_goes_when_the_kernel_forgets_it() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let ino = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    volume.write(ino, 0, &noise(1, 300_000)).unwrap();
    volume.unlink(Ino::ROOT, b"file").unwrap();
    assert_eq!(volume.status().inodes, 2);
    volume.forget(ino, 1);
    eventually(|| volume.getattr(ino) == Err(Error::Posix(libc::ESTALE)));
    assert_eq!(volume.status().inodes, 1);
}

#[test]
fn a_volume_opens_once_at_a_time() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    assert_eq!(fixture.try_open().err(), Some(OpenError::AlreadyMounted));
    drop(volume);
    fixture.open();
}

#[test]
fn what_is_no_volume_or_too_new_a_one_is_told_apart() {
    let fixture = Fixture::new();
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(
        fixture.try_open_at(empty.path()).err(),
        Some(OpenError::NotAVolume)
    );
    let superblock = fixture.dir().join("superblock");
    let mut bytes = std::fs::read(&superblock).unwrap();
    bytes[8..12].copy_from_slice(&7_u32.to_be_bytes());
    std::fs::write(&superblock, &bytes).unwrap();
    assert_eq!(
        fixture.try_open().err(),
        Some(OpenError::FutureFormat { found: 7, known: 2 })
    );
    bytes.truncate(20);
    bytes[8..12].copy_from_slice(&1_u32.to_be_bytes());
    std::fs::write(&superblock, &bytes).unwrap();
    assert!(matches!(fixture.try_open().err(), Some(OpenError::Damaged(_))));
}

#[test]
fn a_log_that_was_damaged_after_it_was_synced_is_not_taken_for_a_crash() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    for number in 0..50 {
        let ino = volume
            .make(Ino::ROOT, format!("file {number}").as_bytes(), &FILE)
            .unwrap()
            .ino;
        volume.write(ino, 0, &noise(number, 2000)).unwrap();
    }
    // A sync, which the seal file follows.
    let seal = std::fs::read(fixture.dir().join("seal")).unwrap();
    fixture.clock.advance(Duration::from_secs(10));
    eventually(|| std::fs::read(fixture.dir().join("seal")).unwrap() != seal);
    drop(volume);
    let log = files_below(&fixture.dir().join("meta"));
    let log = log
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let log = log
        .max_by_key(|path| std::fs::metadata(path).unwrap().len())
        .unwrap();
    let length = std::fs::metadata(log).unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(log)
        .unwrap()
        .set_len(length / 2)
        .unwrap();
    assert!(matches!(fixture.try_open().err(), Some(OpenError::Damaged(_))));
}
