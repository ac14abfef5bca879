//! Volumes that each format version wrote: every later version opens them, and goes on in their format.
//!
//! With `CMKFS_WRITE_GOLDEN` set to a directory that is not there, the test of the latest version writes such a volume instead. Its
//! key is in tests/engine/support.rs, so it protects nothing.

use crate::support::{FILE, Fixture, content, copy_dir, eventually, noise};
use crate::tree;
use cmkfs::engine::{CheckOptions, CreateParams, Fault, Ino, KeyService, Superblock, Verification, Volume};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn verification(volume: &Volume) -> Verification {
    volume.domains()[0].verification.unwrap()
}

fn check(fixture: &Fixture, dir: &Path) {
    let kms: Arc<dyn KeyService> = fixture.kms.clone();
    let how = CheckOptions {
        scrub: true,
        ..CheckOptions::default()
    };
    let report = Volume::check(dir, how, kms, fixture.clock.clone(), &mut |_| ());
    // A checkout fills the holes of slot files with zeros.
    let mut problems = report.unwrap().problems;
    problems.retain(|problem| problem.fault != Fault::LeakedSpace);
    assert_eq!(problems, []);
}

/// Reads and changes a volume of a version; how its verification ends.
fn use_golden(version: u32) -> Verification {
    let fixture = Fixture::new();
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/volume-{version}"));
    let copy = fixture.scratch.path().join("golden");
    copy_dir(&golden, &copy);
    assert_eq!(Superblock::read(&copy).unwrap().version(), version);
    check(&fixture, &copy);
    let volume = fixture.try_open_at(&copy).unwrap();
    assert_eq!(tree::check(&volume), 0);
    assert_eq!(volume.status().inodes, 13);
    let ino = volume.make(Ino::ROOT, b"new", &FILE).unwrap().ino;
    volume.write(ino, 0, &noise(1, 300_000)).unwrap();
    volume.close().unwrap();
    drop(volume);
    check(&fixture, &copy);
    let volume = fixture.try_open_at(&copy).unwrap();
    assert_eq!(content(&volume, ino).unwrap(), noise(1, 300_000));
    volume.unlink(Ino::ROOT, b"new").unwrap();
    assert_eq!(tree::check(&volume), 0);
    let is_over = |found| !matches!(found, Verification::Waiting | Verification::Running { .. });
    eventually(|| is_over(verification(&volume)));
    verification(&volume)
}

#[test]
fn version_1_is_read_and_written_for_ever() {
    assert_eq!(use_golden(1), Verification::Unsupported);
}

#[test]
fn version_2_is_read_and_written_for_ever() {
    if let Some(dir) = std::env::var_os("CMKFS_WRITE_GOLDEN").map(PathBuf::from) {
        let fixture = Fixture::new();
        let params = CreateParams {
            cmk_arn: "acs:kms:local:1:key/golden".to_owned(),
            uid: 0,
            gid: 0,
        };
        Volume::create(&dir, &params, &*fixture.kms, *b"golden volume v2").unwrap();
        let volume = fixture.try_open_at(&dir).unwrap();
        tree::make(&volume);
        volume.close().unwrap();
        return;
    }
    let found = use_golden(2);
    assert!(matches!(found, Verification::Matches { .. }), "{found:?}");
}
