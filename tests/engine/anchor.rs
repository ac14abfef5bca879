//! The anchor: a volume that was put back as a whole, and a copy that was mounted elsewhere, are known by what the KMS remembers.

use crate::support::{Answer, FILE, Fixture, copy_dir, eventually, list, noise};
use cmkfs::engine::{Anchor, Error, Ino, KeyError, OpenError, Verification, Volume};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.kms.keep_anchors();
    fixture
}

fn copy(fixture: &Fixture, name: &str) -> PathBuf {
    let to = fixture.scratch.path().join(name);
    copy_dir(&fixture.dir(), &to);
    to
}

fn make(volume: &Volume, name: &[u8]) -> Ino {
    let ino = volume.make(Ino::ROOT, name, &FILE).unwrap().ino;
    volume.write(ino, 0, &noise(1, 5000)).unwrap();
    ino
}

fn names(volume: &Volume) -> Vec<Vec<u8>> {
    let listed = list(volume, Ino::ROOT).unwrap();
    listed.into_iter().map(|(name, _)| name).collect()
}

/// A session that makes a file.
fn session(fixture: &Fixture, dir: &Path, name: &[u8]) {
    let volume = fixture.try_open_at(dir).unwrap();
    make(&volume, name);
    volume.close().unwrap();
}

fn restore(fixture: &Fixture, dir: &Path) -> Result<Arc<Volume>, OpenError> {
    let mut options = fixture.options;
    options.accept_restore = true;
    let kms: Arc<dyn cmkfs::engine::KeyService> = fixture.kms.clone();
    Volume::open(dir, options, kms, fixture.clock.clone())
}

fn anchored(fixture: &Fixture) -> Option<Anchor> {
    *fixture.kms.anchor()
}

#[test]
fn an_older_volume_is_refused_with_the_number_of_operations_that_it_lacks() {
    let fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    let before = anchored(&fixture).unwrap();
    let old = copy(&fixture, "old");
    session(&fixture, &fixture.dir(), b"two");
    let after = anchored(&fixture).unwrap();
    assert!(after.commit_seq > before.commit_seq);
    let missing = after.commit_seq - before.commit_seq;
    assert_eq!(fixture.try_open_at(&old).err(), Some(OpenError::Older(missing)));
    // It is refused, and stays as it is; the true one goes on.
    assert_eq!(fixture.try_open_at(&old).err(), Some(OpenError::Older(missing)));
    session(&fixture, &fixture.dir(), b"three");
}

#[test]
fn a_volume_that_was_put_back_is_taken_in_on_purpose_and_the_other_is_refused_from_then_on() {
    let fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    let old = copy(&fixture, "old");
    session(&fixture, &fixture.dir(), b"two");
    let given_up = anchored(&fixture).unwrap();
    let volume = restore(&fixture, &old).unwrap();
    assert_eq!(names(&volume), [b"one".to_vec()]);
    volume.close().unwrap();
    drop(volume);
    // No number of the lost history is used again, though nothing was changed meanwhile.
    let volume = fixture.try_open_at(&old).unwrap();
    assert!(make(&volume, b"other").0 >= given_up.ino_limit);
    volume.close().unwrap();
    drop(volume);
    session(&fixture, &old, b"more");
    // By the numbers alone it is an older one.
    let refused = fixture.try_open().err();
    assert!(
        matches!(
            refused,
            Some(OpenError::Older(_) | OpenError::Forked | OpenError::Key(KeyError::RolledBack))
        ),
        "{refused:?}"
    );
    session(&fixture, &old, b"still");
}

#[test]
fn a_copy_that_goes_on_beside_is_found_at_its_first_anchor_and_takes_no_more_changes() {
    let fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    let second = copy(&fixture, "second");
    let (first, second) = (fixture.open(), fixture.try_open_at(&second).unwrap());
    make(&first, b"here");
    make(&second, b"there");
    first.close().unwrap();
    second.close().unwrap();
    drop((first, second));
    // Whoever came first is the volume.
    let dir = fixture.scratch.path().join("second");
    assert_eq!(fixture.try_open_at(&dir).err(), Some(OpenError::Forked));
    session(&fixture, &fixture.dir(), b"more");

    let third = copy(&fixture, "third");
    let (first, third) = (fixture.open(), fixture.try_open_at(&third).unwrap());
    make(&first, b"again");
    first.close().unwrap();
    make(&third, b"beside");
    let is_lost = |volume: &Volume| {
        fixture.clock.advance(Duration::from_secs(10));
        matches!(
            volume.domains()[0].verification,
            Some(Verification::Differs { .. })
        )
    };
    eventually(|| is_lost(&third));
    let refused = third.make(Ino::ROOT, b"new", &FILE).err();
    assert_eq!(refused, Some(Error::Posix(libc::EROFS)));
    assert!(names(&third).contains(&b"beside".to_vec()));
}

#[test]
fn an_anchor_whose_answer_was_lost_is_known_all_the_same() {
    let fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    let accepted = anchored(&fixture);
    let volume = fixture.open();
    make(&volume, b"two");
    volume.close().unwrap();
    drop(volume);
    // The seal file knows that it was told; whether it heard is what the KMS says.
    let proposed = anchored(&fixture);
    assert_ne!(accepted, proposed);
    *fixture.kms.anchor() = accepted;
    session(&fixture, &fixture.dir(), b"three");
    session(&fixture, &fixture.dir(), b"four");
    assert!(anchored(&fixture).unwrap().commit_seq > proposed.unwrap().commit_seq);
}

#[test]
fn a_kms_out_of_reach_is_told_later_and_a_crash_loses_nothing_of_it() {
    let fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    let before = anchored(&fixture);
    let volume = fixture.open();
    let ino = make(&volume, b"two");
    fixture.kms.set(Answer::Unreachable);
    volume.fsync(ino).unwrap();
    fixture.clock.advance(Duration::from_secs(5));
    let seq = volume.status().commit_seq;
    eventually(|| volume.status().durable_seq >= seq);
    assert_eq!(anchored(&fixture), before);
    fixture.kms.set(Answer::Enabled);
    make(&volume, b"three");
    eventually(|| {
        fixture.clock.advance(Duration::from_secs(5));
        anchored(&fixture) != before
    });
    // A crash: what was durable is there, and no less than the anchor.
    drop(volume);
    let volume = fixture.open();
    assert!(names(&volume).contains(&b"two".to_vec()));
}

#[test]
fn a_kms_that_forgot_the_anchor_is_refused_until_that_is_accepted() {
    let mut fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    // Whether the first was heard is known by the next session.
    session(&fixture, &fixture.dir(), b"another");
    *fixture.kms.anchor() = None;
    assert!(matches!(fixture.try_open().err(), Some(OpenError::Key(_))));
    fixture.options.accept_kms_restore = true;
    session(&fixture, &fixture.dir(), b"two");
    assert!(anchored(&fixture).is_some());
    fixture.options.accept_kms_restore = false;
    session(&fixture, &fixture.dir(), b"three");
}

#[test]
fn a_kms_that_knows_an_earlier_anchor_was_put_back_and_goes_on_from_there_when_accepted() {
    let mut fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    let backup = anchored(&fixture);
    for name in [b"two".as_slice(), b"three", b"four"] {
        session(&fixture, &fixture.dir(), name);
    }
    *fixture.kms.anchor() = backup;
    assert_eq!(
        fixture.try_open().err(),
        Some(OpenError::Key(KeyError::RolledBack))
    );
    fixture.options.accept_kms_restore = true;
    session(&fixture, &fixture.dir(), b"five");
    fixture.options.accept_kms_restore = false;
    session(&fixture, &fixture.dir(), b"six");
    assert!(anchored(&fixture).unwrap().commit_seq > backup.unwrap().commit_seq);
}

#[test]
fn what_a_backup_had_proposed_is_not_told_while_it_is_verified_before_it_is_taken_in() {
    let mut fixture = fixture();
    session(&fixture, &fixture.dir(), b"one");
    session(&fixture, &fixture.dir(), b"two");
    // Its seal file proposes an anchor, as after every unmount.
    let old = copy(&fixture, "old");
    session(&fixture, &fixture.dir(), b"three");
    fixture.options.verify = cmkfs::engine::Verify::Full;
    let volume = restore(&fixture, &old).unwrap();
    make(&volume, b"after");
    let before = anchored(&fixture);
    eventually(|| {
        fixture.clock.advance(Duration::from_secs(10));
        anchored(&fixture) != before
    });
    volume.close().unwrap();
    drop(volume);
    session(&fixture, &old, b"more");
}
