//! What the state of the CMK does to an open volume.

use crate::support::{Answer, DIR, FILE, FakeKms, Fixture, content, eventually, noise};
use cmkfs::engine::{CacheObserver, Error, Ino, KeyError, KeyState, OpenError, Volume};
use std::sync::{Arc, Mutex};

/// Remembers what it was told to purge.
#[derive(Default)]
struct Purges(Mutex<Vec<Vec<Ino>>>);

impl CacheObserver for Purges {
    fn purge(&self, inodes: &[Ino]) {
        self.0.lock().unwrap().push(inodes.to_vec());
    }
}

fn state_becomes(volume: &Volume, state: KeyState) {
    eventually(|| volume.status().key_state == state);
}

#[test]
fn a_kms_that_was_started_anew_is_told_as_well_that_the_volume_is_dark() {
    let fixture = Fixture::new();
    let _volume = fixture.open();
    let epoch = fixture.kms.set(Answer::Disabled);
    eventually(|| fixture.kms.acknowledged() == epoch);
    fixture.kms.restart();
    eventually(|| fixture.kms.acknowledged() == epoch);
}

#[test]
fn a_disabled_key_darkens_the_volume_and_an_enabled_one_brings_everything_back() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let purges = Arc::new(Purges::default());
    volume.set_observer(purges.clone());
    let file = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let bytes = noise(7, 300_000);
    volume.write(file, 0, &bytes).unwrap();

    let epoch = fixture.kms.set(Answer::Disabled);
    assert!(fixture.kms.acknowledged() < epoch);
    eventually(|| fixture.kms.acknowledged() == epoch);
    // What was acknowledged is so already.
    assert_eq!(volume.status().key_state, KeyState::Revoked);
    assert_eq!(purges.0.lock().unwrap().len(), 2);
    assert!(
        purges
            .0
            .lock()
            .unwrap()
            .iter()
            .all(|told| told.contains(&file) && told.contains(&Ino::ROOT))
    );
    assert_eq!(volume.getattr(file), Err(Error::KeyRevoked));
    assert_eq!(volume.lookup(Ino::ROOT, b"file"), Err(Error::KeyRevoked));
    assert_eq!(volume.read(file, 0, &mut [0; 10]), Err(Error::KeyRevoked));
    assert_eq!(volume.write(file, 0, b"late"), Err(Error::KeyRevoked));
    assert_eq!(volume.make(Ino::ROOT, b"other", &FILE), Err(Error::KeyRevoked));
    assert_eq!(volume.fsync(file), Err(Error::KeyRevoked));
    assert_eq!(volume.status().cached_deks, 0);

    fixture.kms.set(Answer::Enabled);
    state_becomes(&volume, KeyState::Live);
    assert_eq!(content(&volume, file).unwrap(), bytes);
    assert_eq!(volume.lookup(Ino::ROOT, b"file").unwrap().ino, file);
    volume.close().unwrap();
}

/// Closing may take long, and whoever revokes meanwhile is waiting for this.
#[test]
fn a_volume_that_is_revoked_while_it_is_closed_goes_dark_says_so_and_has_stored_everything() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let file = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    volume.write(file, 0, &noise(8, 300_000)).unwrap();
    fixture.kms.at_position(|kms| {
        kms.set(Answer::Disabled);
        eventually(|| kms.is_refusing());
    });
    volume.close().unwrap();
    assert_eq!(fixture.kms.acknowledged(), 1);
    assert_eq!(volume.status().key_state, KeyState::Revoked);
    drop(volume);
    fixture.kms.set(Answer::Enabled);
    let volume = fixture.open();
    assert_eq!(content(&volume, file).unwrap(), noise(8, 300_000));
}

/// Keys are fetched ahead as soon as that is possible, not at one moment alone, at which the KMS may be away.
#[test]
fn a_kms_that_was_away_when_keys_were_to_be_fetched_ahead_is_asked_again() {
    let mut fixture = Fixture::new();
    fixture.options.dek_prefetch = 64;
    let volume = fixture.open();
    let make = |number: u32| volume.make(Ino::ROOT, number.to_string().as_bytes(), &FILE);
    for number in 0..20 {
        make(number).unwrap();
    }
    fixture.kms.set(Answer::Unreachable);
    for number in 20..50 {
        make(number).unwrap();
    }
    fixture.kms.set(Answer::Enabled);
    let calls = fixture.kms.calls();
    make(50).unwrap();
    eventually(|| fixture.kms.calls() > calls);
}

/// What comes when the time to drain is over is refused, and no later fsync claims that it was stored.
#[test]
fn what_comes_too_late_is_lost_and_said_to_be() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let file = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    fixture.kms.set(Answer::Disabled);
    state_becomes(&volume, KeyState::Revoked);
    assert_eq!(volume.write_back(file, 0, b"late"), Err(Error::KeyRevoked));
    fixture.kms.set(Answer::Enabled);
    state_becomes(&volume, KeyState::Live);
    assert_eq!(volume.fsync(file), Err(Error::Poisoned));
}

#[test]
fn a_volume_revoked_by_hand_stays_dark_until_that_is_taken_back() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let file = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    volume.write(file, 0, b"content").unwrap();
    // The KMS is not asked.
    fixture.kms.set(Answer::Unreachable);
    volume.revoke_by_hand(true);
    assert_eq!(volume.read(file, 0, &mut [0; 7]), Err(Error::KeyRevoked));
    fixture.kms.set(Answer::Enabled);
    let before = fixture.kms.renewals();
    eventually(|| fixture.kms.renewals() >= before + 2);
    assert_eq!(volume.status().key_state, KeyState::Revoked);
    volume.revoke_by_hand(false);
    state_becomes(&volume, KeyState::Live);
    assert_eq!(content(&volume, file).unwrap(), b"content");
}

#[test]
fn each_state_of_the_key_has_its_own_error() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let cases = [
        (Answer::Disabled, KeyState::Revoked, Error::KeyRevoked),
        (Answer::Destroyed, KeyState::Erased, Error::KeyErased),
        (Answer::Denied, KeyState::Denied, Error::KeyDenied),
    ];
    for (answer, state, error) in cases {
        fixture.kms.set(answer);
        state_becomes(&volume, state);
        assert_eq!(volume.check_key(Ino::ROOT), Err(error));
    }
}

#[test]
fn an_unreachable_kms_is_tolerated_for_the_length_of_its_lease() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    fixture.kms.set(Answer::Unreachable);
    fixture.clock.advance(FakeKms::LEASE / 2);
    let before = fixture.kms.renewals();
    // Of two that begin from now on, the first has been dealt with.
    eventually(|| fixture.kms.renewals() >= before + 2);
    assert_eq!(volume.check_key(Ino::ROOT), Ok(()));
    fixture.clock.advance(FakeKms::LEASE);
    state_becomes(&volume, KeyState::Unreachable);
    assert_eq!(volume.check_key(Ino::ROOT), Err(Error::KeyUnavailable));
    fixture.kms.set(Answer::Enabled);
    state_becomes(&volume, KeyState::Live);
}

#[test]
fn a_panic_of_the_thread_that_watches_the_key_darkens_the_volume() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let purges = Arc::new(Purges::default());
    volume.set_observer(purges.clone());
    fixture.kms.set(Answer::Panic);
    state_becomes(&volume, KeyState::Unreachable);
    assert_eq!(volume.check_key(Ino::ROOT), Err(Error::KeyUnavailable));
    eventually(|| !purges.0.lock().unwrap().is_empty());
    fixture.kms.set(Answer::Enabled);
    state_becomes(&volume, KeyState::Live);
    volume.close().unwrap();
}

#[test]
fn a_volume_does_not_open_without_its_key() {
    let fixture = Fixture::new();
    for (answer, error) in [
        (Answer::Disabled, KeyError::Revoked),
        (Answer::Destroyed, KeyError::Destroyed),
        (Answer::NoMaterial, KeyError::Erased),
    ] {
        fixture.kms.set(answer);
        assert_eq!(fixture.try_open().err(), Some(OpenError::Key(error)));
    }
    fixture.kms.set(Answer::Enabled);
    let other = Fixture {
        kms: Arc::new(FakeKms::new(2)),
        ..fixture
    };
    assert_eq!(other.try_open().err(), Some(OpenError::Key(KeyError::BadBlob)));
}

#[test]
fn ten_thousand_creates_make_at_most_a_hundred_calls() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let before = fixture.kms.calls();
    for number in 0..100 {
        let dir = volume
            .make(Ino::ROOT, format!("dir {number}").as_bytes(), &DIR)
            .unwrap()
            .ino;
        for number in 0..100 {
            let file = volume
                .make(dir, format!("file {number}").as_bytes(), &FILE)
                .unwrap()
                .ino;
            volume.write(file, 0, b"some content").unwrap();
        }
    }
    let calls = fixture.kms.calls() - before;
    assert!(calls <= 100, "{calls} calls");
    volume.close().unwrap();
}

#[test]
fn what_the_page_cache_held_changes_content_but_no_times() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let file = volume.make(Ino::ROOT, b"file", &FILE).unwrap();
    fixture.clock.advance(std::time::Duration::from_secs(100));
    volume.write_back(file.ino, 0, b"content").unwrap();
    let attr = volume.getattr(file.ino).unwrap();
    assert_eq!((attr.size, attr.mtime, attr.ctime), (7, file.mtime, file.ctime));
    volume.write(file.ino, 0, b"C").unwrap();
    assert_eq!(
        volume.getattr(file.ino).unwrap().mtime.secs,
        file.mtime.secs + 100
    );
}

#[test]
fn files_read_one_after_the_other_share_calls() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    for number in 0..2000 {
        let file = volume
            .make(Ino::ROOT, format!("file {number}").as_bytes(), &FILE)
            .unwrap()
            .ino;
        volume.write(file, 0, b"some content").unwrap();
    }
    volume.close().unwrap();
    drop(volume);
    let volume = fixture.open();
    let before = fixture.kms.calls();
    for number in 0..2000 {
        let file = volume
            .lookup(Ino::ROOT, format!("file {number}").as_bytes())
            .unwrap()
            .ino;
        assert_eq!(content(&volume, file).unwrap(), b"some content");
    }
    let calls = fixture.kms.calls() - before;
    assert!(calls <= 50, "{calls} calls");
}

#[test]
fn whatever_was_taken_in_before_the_dark_is_there_after_it() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let file = volume.make(Ino::ROOT, b"file", &FILE).unwrap().ino;
    let block = |number: u64| noise(number, 4096);
    let mut taken = 0;
    for _ in 0..30 {
        let first = taken;
        taken = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut next = first;
                while volume.write_back(file, next * 4096, &block(next)).is_ok() {
                    next += 1;
                }
                next
            });
            fixture.kms.set(Answer::Disabled);
            state_becomes(&volume, KeyState::Revoked);
            writer.join().unwrap()
        });
        fixture.kms.set(Answer::Enabled);
        state_becomes(&volume, KeyState::Live);
        assert_eq!(volume.getattr(file).unwrap().size, taken * 4096);
    }
    let bytes = content(&volume, file).unwrap();
    for (number, got) in bytes.chunks(4096).enumerate() {
        assert!(got == block(number as u64), "block {number}");
    }
}
