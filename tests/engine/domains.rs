//! Key domains: subtrees under keys of their own.

use crate::support::{Answer, DIR, FILE, Fixture, content, eventually, files_below, list, noise};
use cmkfs::engine::{
    CacheObserver, CheckOptions, Cookie, Dependants, Domain, Error, Ino, KeyState, RenameFlags, SetXattr,
    Taken, Volume,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const ARN: &str = "acs:kms:local:1:key/tenant";
const ONE: Domain = Domain(1);
const TWO: Domain = Domain(2);
/// Content that needs a slot file.
const LARGE: usize = 300_000;

fn state_of(volume: &Volume, domain: Domain) -> Option<KeyState> {
    let domains = volume.domains();
    let found = domains.iter().find(|status| status.domain == domain);
    found.map(|status| status.key_state)
}

fn state_becomes(volume: &Volume, domain: Domain, state: KeyState) {
    eventually(|| state_of(volume, domain) == Some(state));
}

/// Makes an empty directory in the root, and puts it under a key of its own. The domain's root.
fn tenant(volume: &Volume, name: &[u8]) -> Ino {
    let plain = volume.make(Ino::ROOT, name, &DIR).unwrap().ino;
    volume.forget(plain, 1);
    let domain = volume.set_key(Ino::ROOT, name, ARN).unwrap();
    let root = volume.lookup(Ino::ROOT, name).unwrap().ino;
    assert_eq!(root, domain.root());
    root
}

fn write_new(volume: &Volume, dir: Ino, name: &[u8], bytes: &[u8]) -> Ino {
    let ino = volume.make(dir, name, &FILE).unwrap().ino;
    assert_eq!(volume.write(ino, 0, bytes).unwrap(), bytes.len());
    ino
}

fn names(volume: &Volume, dir: Ino) -> Vec<Vec<u8>> {
    let listed = list(volume, dir).unwrap();
    listed.into_iter().map(|(name, _)| name).collect()
}

/// Bytes of slot files of a domain.
fn slot_files(fixture: &Fixture, domain: Domain) -> usize {
    let is_of = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        u64::from_str_radix(name, 16).is_ok_and(|ino| Ino(ino).domain() == domain)
    };
    files_below(&fixture.dir().join("data"))
        .iter()
        .filter(|path| is_of(path))
        .count()
}

fn check(fixture: &Fixture) -> cmkfs::engine::Report {
    let how = CheckOptions {
        scrub: true,
        ..CheckOptions::default()
    };
    let report = fixture.try_check(how).unwrap();
    assert_eq!(report.problems, []);
    report
}

#[test]
fn a_domain_keeps_its_content_over_a_remount() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let root = tenant(&volume, b"tenant");
    let bytes = noise(1, LARGE);
    let file = write_new(&volume, root, b"file", &bytes);
    assert_eq!(file.domain(), ONE);
    let inner = volume.make(root, b"inner", &DIR).unwrap().ino;
    let small = write_new(&volume, inner, b"small", b"small");
    let outside = write_new(&volume, Ino::ROOT, b"outside", b"outside");
    assert_eq!(outside.domain(), Domain::FIRST);
    // The directory that was there before is gone when the kernel has let go of it.
    eventually(|| volume.domains()[0].inodes == 2);
    let statuses = volume.domains();
    assert_eq!(statuses.len(), 2);
    assert_eq!(statuses[1].path.as_deref(), Some(b"/tenant".as_slice()));
    assert_eq!(statuses[1].inodes, 4);
    volume.close().unwrap();
    drop(volume);

    let report = check(&fixture);
    assert!(report.domains.iter().all(|domain| domain.is_checked));
    assert_eq!(report.counts.inodes, 6);
    let volume = fixture.open();
    assert_eq!(volume.lookup(Ino::ROOT, b"tenant").unwrap().ino, root);
    assert_eq!(content(&volume, file).unwrap(), bytes);
    assert_eq!(content(&volume, small).unwrap(), b"small");
    // Another file gets a number that was never given out.
    assert!(write_new(&volume, root, b"more", b"more").0 > small.0);
    volume.close().unwrap();
}

#[test]
fn a_new_domain_s_root_has_the_attributes_of_the_directory_it_replaces() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let mut dir = DIR;
    dir.perm = 0o3751;
    (dir.uid, dir.gid) = (17, 18);
    let old = volume.make(Ino::ROOT, b"tenant", &dir).unwrap().ino;
    for (name, value) in [(b"user.one".as_slice(), b"1".as_slice()), (b"user.two", b"2")] {
        volume.setxattr(old, name, value, SetXattr::Any, false).unwrap();
    }
    volume.set_key(Ino::ROOT, b"tenant", ARN).unwrap();
    let made = volume.lookup(Ino::ROOT, b"tenant").unwrap();
    assert_eq!((made.perm, made.uid, made.gid, made.nlink), (0o3751, 17, 18, 2));
    assert_eq!(volume.getxattr(made.ino, b"user.two").unwrap(), b"2");
    assert_eq!(volume.listxattr(made.ino).unwrap().len(), 2);
    // Who has the old one sees a directory that was removed.
    assert_eq!(
        volume.make(old, b"late", &FILE).err(),
        Some(Error::Posix(libc::ENOENT))
    );
    volume.forget(old, 1);
    volume.close().unwrap();
    drop(volume);
    check(&fixture);
}

#[test]
fn what_cannot_begin_a_domain_is_refused_and_stays_as_it_is() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let root = tenant(&volume, b"tenant");
    volume.make(root, b"below", &DIR).unwrap();
    let full = volume.make(Ino::ROOT, b"full", &DIR).unwrap().ino;
    volume.make(full, b"entry", &FILE).unwrap();
    volume.make(Ino::ROOT, b"file", &FILE).unwrap();
    volume.make(Ino::ROOT, b"plain", &DIR).unwrap();
    let refused = |parent, name: &[u8]| volume.set_key(parent, name, ARN).unwrap_err();
    assert_eq!(refused(root, b"below"), Error::Posix(libc::EINVAL));
    assert_eq!(refused(Ino::ROOT, b"tenant"), Error::Posix(libc::EEXIST));
    assert_eq!(refused(Ino::ROOT, b"full"), Error::Posix(libc::ENOTEMPTY));
    assert_eq!(refused(Ino::ROOT, b"file"), Error::Posix(libc::ENOTDIR));
    assert_eq!(refused(Ino::ROOT, b"none"), Error::Posix(libc::ENOENT));
    let given_up = fixture.kms.domain(TWO);
    assert!(!given_up.has_ended());
    given_up.set(Answer::Disabled);
    assert_eq!(refused(Ino::ROOT, b"plain"), Error::KeyRevoked);
    // Nobody would say for it that it is dark.
    assert!(given_up.has_ended());
    assert_eq!(
        volume.lookup(Ino::ROOT, b"plain").unwrap().ino.domain(),
        Domain::FIRST
    );
    assert_eq!(volume.domains().len(), 2);
    assert_eq!(
        volume.remove_erased(Ino::ROOT, b"tenant"),
        Err(Error::Posix(libc::EBUSY))
    );
    assert_eq!(
        volume.remove_erased(Ino::ROOT, b"plain"),
        Err(Error::Posix(libc::EINVAL))
    );
    // A number that was not used is given out to the next.
    fixture.kms.domain(TWO).set(Answer::Enabled);
    assert_eq!(volume.set_key(Ino::ROOT, b"plain", ARN).unwrap(), TWO);
}

/// What it was told to purge.
#[derive(Default)]
struct Purges(Mutex<Vec<Ino>>);

impl CacheObserver for Purges {
    fn purge(&self, inodes: &[Ino]) {
        self.0.lock().unwrap().extend(inodes);
    }
}

#[test]
fn a_revoked_domain_is_dark_and_its_siblings_are_not() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let (one, two) = (tenant(&volume, b"one"), tenant(&volume, b"two"));
    let bytes = noise(2, LARGE);
    let dark = write_new(&volume, one, b"file", &bytes);
    let sibling = write_new(&volume, two, b"file", &bytes);
    let outside = write_new(&volume, Ino::ROOT, b"file", &bytes);
    let purges = Arc::new(Purges::default());
    volume.set_observer(purges.clone());

    let kms = fixture.kms.domain(ONE);
    let epoch = kms.set(Answer::Disabled);
    eventually(|| kms.acknowledged() == epoch);
    // What was acknowledged is so already.
    assert_eq!(state_of(&volume, ONE), Some(KeyState::Revoked));
    {
        let purged = purges.0.lock().unwrap();
        assert!(purged.contains(&dark) && purged.contains(&one));
        assert!(purged.iter().all(|ino| ino.domain() == ONE), "{purged:?}");
    }
    let gone = Some(Error::KeyRevoked);
    assert_eq!(volume.read(dark, 0, &mut [0; 9]).err(), gone);
    assert_eq!(volume.getattr(dark).err(), gone);
    assert_eq!(volume.getattr(one).err(), gone);
    assert_eq!(volume.lookup(one, b"file").err(), gone);
    assert_eq!(volume.lookup(Ino::ROOT, b"one").err(), gone);
    assert_eq!(list(&volume, one).err(), gone);
    assert_eq!(volume.write(dark, 0, b"late").err(), gone);
    assert_eq!(volume.write_back(dark, 0, b"late").err(), gone);
    assert_eq!(volume.make(one, b"more", &FILE).err(), gone);
    assert_eq!(volume.fsync(dark).err(), gone);
    assert_eq!(volume.rmdir(Ino::ROOT, b"one").err(), gone);
    let to = (Ino::ROOT, b"other".as_slice());
    let moved = volume.rename(Ino::ROOT, b"one", to.0, to.1, RenameFlags::default());
    assert_eq!(moved.err(), gone);

    // The others go on, and what was there of it is listed.
    assert_eq!(content(&volume, sibling).unwrap(), bytes);
    assert_eq!(content(&volume, outside).unwrap(), bytes);
    write_new(&volume, two, b"more", &bytes);
    volume.fsync(sibling).unwrap();
    assert_eq!(names(&volume, Ino::ROOT), [b"file".as_slice(), b"one", b"two"]);
    let mut with_attributes = Vec::new();
    volume
        .readdirplus(Ino::ROOT, Cookie::START, &mut |entry, attr| {
            if entry.name != b"." && entry.name != b".." {
                with_attributes.push((entry.name.to_vec(), attr.is_some()));
            }
            Taken::Yes
        })
        .unwrap();
    with_attributes.sort();
    let expected: [(&[u8], bool); 3] = [(b"file", true), (b"one", false), (b"two", true)];
    assert_eq!(with_attributes, expected.map(|(name, is)| (name.to_vec(), is)));

    kms.set(Answer::Enabled);
    state_becomes(&volume, ONE, KeyState::Live);
    assert_eq!(content(&volume, dark).unwrap(), bytes);
    assert_eq!(volume.lookup(one, b"file").unwrap().ino, dark);
    // What came too late is said to be lost.
    assert_eq!(volume.fsync(dark), Err(Error::Poisoned));
    volume.close().unwrap();
}

#[test]
fn the_first_domain_takes_every_other_with_it_and_all_come_back() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let file = write_new(&volume, one, b"file", &noise(3, LARGE));
    let purges = Arc::new(Purges::default());
    volume.set_observer(purges.clone());
    let epoch = fixture.kms.set(Answer::Disabled);
    eventually(|| fixture.kms.acknowledged() == epoch);
    assert_eq!(volume.read(file, 0, &mut [0; 9]), Err(Error::KeyRevoked));
    assert_eq!(volume.getattr(Ino::ROOT), Err(Error::KeyRevoked));
    assert_eq!(state_of(&volume, ONE), Some(KeyState::Revoked));
    assert_eq!(volume.status().cached_deks, 0);
    assert!(purges.0.lock().unwrap().contains(&file));
    // It does not come back alone.
    let renewals = fixture.kms.domain(ONE).renewals();
    eventually(|| fixture.kms.domain(ONE).renewals() >= renewals + 3);
    assert_eq!(state_of(&volume, ONE), Some(KeyState::Revoked));
    fixture.kms.set(Answer::Enabled);
    state_becomes(&volume, ONE, KeyState::Live);
    assert_eq!(content(&volume, file).unwrap(), noise(3, LARGE));
    // By hand it is the same, without the KMS.
    volume.revoke_by_hand(true);
    assert_eq!(volume.read(file, 0, &mut [0; 9]), Err(Error::KeyRevoked));
    assert_eq!(volume.status().cached_deks, 0);
    volume.revoke_by_hand(false);
    state_becomes(&volume, ONE, KeyState::Live);
    assert_eq!(content(&volume, file).unwrap(), noise(3, LARGE));
    volume.close().unwrap();
}

#[test]
fn what_was_written_before_either_key_was_revoked_is_stored() {
    for kind in [Domain::FIRST, ONE] {
        let fixture = Fixture::new();
        let volume = fixture.open();
        let one = tenant(&volume, b"one");
        let mut files = Vec::new();
        for number in 0..20_u64 {
            let bytes = noise(number, 1000 * (number as usize + 1) * 10);
            files.push((
                write_new(&volume, one, number.to_string().as_bytes(), &bytes),
                bytes,
            ));
        }
        let kms = match kind {
            Domain::FIRST => fixture.kms.clone(),
            other => fixture.kms.domain(other),
        };
        let epoch = kms.set(Answer::Disabled);
        eventually(|| kms.acknowledged() == epoch);
        // A crash: nothing is in memory alone.
        drop(volume);
        kms.set(Answer::Enabled);
        let volume = fixture.open();
        for (file, bytes) in files {
            assert!(content(&volume, file).unwrap() == bytes, "{kind:?}");
        }
        volume.close().unwrap();
        drop(volume);
        fixture.assert_consistent();
    }
}

#[test]
fn nothing_leads_from_one_domain_to_another_but_its_root_s_name() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let two = tenant(&volume, b"two");
    let inside = write_new(&volume, one, b"inside", b"inside");
    let outside = write_new(&volume, Ino::ROOT, b"outside", b"outside");
    let across = Err(Error::Posix(libc::EXDEV));
    let busy = Err(Error::Posix(libc::EBUSY));
    let rename =
        |from: Ino, name: &[u8], to: Ino, new: &[u8], flags| volume.rename(from, name, to, new, flags);
    let plain = RenameFlags::default();
    let exchange = RenameFlags {
        exchange: true,
        ..plain
    };
    assert_eq!(rename(one, b"inside", Ino::ROOT, b"out", plain), across);
    assert_eq!(rename(Ino::ROOT, b"outside", one, b"in", plain), across);
    assert_eq!(rename(one, b"inside", two, b"in", plain), across);
    assert_eq!(volume.link(inside, Ino::ROOT, b"link").map(|_| ()), across);
    assert_eq!(volume.link(outside, one, b"link").map(|_| ()), across);
    assert_eq!(volume.copy_range(inside, 0, outside, 0, 6).map(|_| ()), across);
    volume.make(Ino::ROOT, b"plain", &DIR).unwrap();
    assert_eq!(rename(Ino::ROOT, b"plain", Ino::ROOT, b"one", plain), busy);
    assert_eq!(rename(Ino::ROOT, b"one", Ino::ROOT, b"two", plain), busy);
    assert_eq!(rename(Ino::ROOT, b"one", Ino::ROOT, b"plain", exchange), busy);
    assert_eq!(rename(Ino::ROOT, b"plain", Ino::ROOT, b"one", exchange), busy);
    assert_eq!(volume.unlink(Ino::ROOT, b"one"), Err(Error::Posix(libc::EISDIR)));
    assert_eq!(
        volume.rmdir(Ino::ROOT, b"one"),
        Err(Error::Posix(libc::ENOTEMPTY))
    );
    rename(Ino::ROOT, b"one", Ino::ROOT, b"one", plain).unwrap();
    assert_eq!(volume.lookup(one, b"..").unwrap().ino, Ino::ROOT);

    // The root is renamed and moved as any directory.
    let deeper = volume.lookup(Ino::ROOT, b"plain").unwrap().ino;
    rename(Ino::ROOT, b"one", Ino::ROOT, b"renamed", plain).unwrap();
    rename(Ino::ROOT, b"renamed", deeper, b"moved", plain).unwrap();
    assert_eq!(volume.lookup(one, b"..").unwrap().ino, deeper);
    assert_eq!(
        volume.domains()[1].path.as_deref(),
        Some(b"/plain/moved".as_slice())
    );
    assert_eq!(names(&volume, one), [b"inside".as_slice()]);
    volume.close().unwrap();
    drop(volume);
    check(&fixture);
    let volume = fixture.open();
    assert_eq!(
        volume.domains()[1].path.as_deref(),
        Some(b"/plain/moved".as_slice())
    );
    assert_eq!(content(&volume, inside).unwrap(), b"inside");
    volume.close().unwrap();
}

#[test]
fn a_domain_ends_with_its_empty_root_and_leaves_nothing() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let file = write_new(&volume, one, b"file", &noise(4, LARGE));
    volume.fsync(file).unwrap();
    volume.unlink(one, b"file").unwrap();
    volume.rmdir(Ino::ROOT, b"one").unwrap();
    // It is open still.
    assert_eq!(content(&volume, file).unwrap().len(), LARGE);
    assert_eq!(volume.domains().len(), 1);
    eventually(|| {
        fixture
            .kms
            .domain(ONE)
            .reported()
            .is_some_and(|told| told.is_removed)
    });
    assert_eq!(tenant(&volume, b"one").domain(), TWO);
    // A crash: the next mount finds what is left of it.
    drop(volume);
    let volume = fixture.open();
    eventually(|| slot_files(&fixture, ONE) == 0);
    assert_eq!(volume.getattr(file), Err(Error::Posix(libc::ESTALE)));
    volume.close().unwrap();
    drop(volume);
    let report = check(&fixture);
    assert_eq!((report.counts.inodes, report.domains.len()), (2, 2));
}

#[test]
fn a_domain_whose_key_is_destroyed_gives_its_space_back_and_is_erased() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let two = tenant(&volume, b"two");
    for number in 0..30_u64 {
        let size = if number % 2 == 0 { LARGE } else { 5000 };
        write_new(&volume, one, number.to_string().as_bytes(), &noise(number, size));
    }
    let sibling = write_new(&volume, two, b"file", &noise(5, LARGE));
    let file = write_new(&volume, one, b"file", &noise(6, LARGE));
    volume.fsync(file).unwrap();
    let before = volume.status();
    assert!(slot_files(&fixture, ONE) > 0);

    fixture.kms.domain(ONE).set(Answer::Destroyed);
    eventually(|| slot_files(&fixture, ONE) == 0 && volume.domains()[1].inodes == 0);
    assert_eq!(volume.getattr(file), Err(Error::KeyErased));
    assert_eq!(volume.lookup(Ino::ROOT, b"one"), Err(Error::KeyErased));
    assert_eq!(state_of(&volume, ONE), Some(KeyState::Erased));
    let after = volume.status();
    assert_eq!(before.inodes - after.inodes, 32);
    assert!(before.blocks - after.blocks >= 73);
    assert_eq!(content(&volume, sibling).unwrap(), noise(5, LARGE));
    assert_eq!(names(&volume, Ino::ROOT), [b"one".as_slice(), b"two"]);
    eventually(|| {
        fixture
            .kms
            .domain(ONE)
            .reported()
            .is_some_and(|told| told.is_removed)
    });
    volume.close().unwrap();
    drop(volume);

    let report = check(&fixture);
    let erased = &report.domains[1];
    assert_eq!(
        (erased.status.key_state, erased.is_checked),
        (KeyState::Erased, false)
    );
    assert!(erased.status.is_erased);
    // No key of that name brings it back.
    fixture.kms.domain(ONE).set(Answer::Enabled);
    let volume = fixture.open();
    assert_eq!(volume.lookup(Ino::ROOT, b"one"), Err(Error::KeyErased));
    assert_eq!(volume.rmdir(Ino::ROOT, b"one"), Err(Error::KeyErased));
    // Its name goes, or another domain comes in its place.
    assert_eq!(volume.set_key(Ino::ROOT, b"one", ARN).unwrap(), Domain(3));
    let third = volume.lookup(Ino::ROOT, b"one").unwrap();
    assert_eq!((third.ino, third.perm), (Domain(3).root(), 0o700));
    fixture.kms.domain(Domain(3)).set(Answer::Destroyed);
    state_becomes(&volume, Domain(3), KeyState::Erased);
    eventually(|| volume.remove_erased(Ino::ROOT, b"one") == Ok(()));
    assert_eq!(names(&volume, Ino::ROOT), [b"two".as_slice()]);
    assert_eq!(volume.getattr(Ino::ROOT).unwrap().nlink, 3);
    assert_eq!(volume.domains().len(), 2);
    volume.close().unwrap();
    drop(volume);
    check(&fixture);
}

/// An unknown key, one without material, one that is only revoked, a KMS that is away: all of that may be mended.
#[test]
fn nothing_but_a_destroyed_key_has_anything_given_up() {
    for answer in [Answer::NoMaterial, Answer::Disabled, Answer::Denied] {
        let fixture = Fixture::new();
        let volume = fixture.open();
        let one = tenant(&volume, b"one");
        let file = write_new(&volume, one, b"file", &noise(7, LARGE));
        volume.fsync(file).unwrap();
        let kms = fixture.kms.domain(ONE);
        kms.set(answer);
        eventually(|| state_of(&volume, ONE) != Some(KeyState::Live));
        let renewals = kms.renewals();
        eventually(|| kms.renewals() >= renewals + 5);
        drop(volume);
        // Nor by a mount that never saw its key.
        let volume = fixture.open();
        assert!(volume.getattr(file).is_err());
        assert!(!volume.domains()[1].is_erased, "{answer:?}");
        let renewals = kms.renewals();
        eventually(|| kms.renewals() >= renewals + 5);
        kms.set(Answer::Enabled);
        state_becomes(&volume, ONE, KeyState::Live);
        assert_eq!(content(&volume, file).unwrap(), noise(7, LARGE));
        volume.close().unwrap();
    }
}

#[test]
fn a_domain_that_is_dark_when_the_volume_is_opened_comes_to_light_with_its_orphans() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let kept = write_new(&volume, one, b"kept", b"kept");
    volume.fsync(kept).unwrap();
    let gone = write_new(&volume, one, b"gone", &noise(8, LARGE));
    volume.fsync(gone).unwrap();
    volume.unlink(one, b"gone").unwrap();
    volume.fsync(one).unwrap();
    drop(volume);
    let kms = fixture.kms.domain(ONE);
    kms.set(Answer::Disabled);
    let report = check(&fixture);
    let dark = &report.domains[1];
    assert_eq!(
        (dark.status.key_state, dark.is_checked),
        (KeyState::Revoked, false)
    );
    assert!(!dark.status.is_erased);
    assert_eq!(dark.status.inodes, 3);
    let volume = fixture.open();
    assert_eq!(state_of(&volume, ONE), Some(KeyState::Revoked));
    assert_eq!(volume.getattr(kept), Err(Error::KeyRevoked));
    write_new(&volume, Ino::ROOT, b"outside", b"outside");
    assert_eq!(slot_files(&fixture, ONE), 1);
    kms.set(Answer::Enabled);
    state_becomes(&volume, ONE, KeyState::Live);
    assert_eq!(content(&volume, kept).unwrap(), b"kept");
    eventually(|| {
        fixture.clock.advance(Duration::from_secs(6));
        slot_files(&fixture, ONE) == 0
    });
    volume.close().unwrap();
    drop(volume);
    check(&fixture);
}

#[test]
fn a_failure_of_one_domain_s_kms_is_that_domain_s_alone() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let file = write_new(&volume, one, b"file", b"content");
    let kms = fixture.kms.domain(ONE);
    kms.set(Answer::Panic);
    state_becomes(&volume, ONE, KeyState::Unreachable);
    assert_eq!(volume.getattr(file), Err(Error::KeyUnavailable));
    assert_eq!(volume.status().key_state, KeyState::Live);
    kms.set(Answer::Enabled);
    state_becomes(&volume, ONE, KeyState::Live);
    assert!(content(&volume, file).is_ok() || volume.fsync(file) == Err(Error::Poisoned));
}

#[test]
fn the_kms_is_told_what_depends_on_each_key() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let one = tenant(&volume, b"one");
    let kms = fixture.kms.domain(ONE);
    let told = |inodes, bytes| {
        Some(Dependants {
            inodes,
            bytes,
            is_removed: false,
        })
    };
    eventually(|| kms.reported() == told(1, 0));
    let file = write_new(&volume, one, b"file", &noise(9, 4 * 4096));
    volume.fsync(file).unwrap();
    // Not each change.
    let renewals = kms.renewals();
    eventually(|| kms.renewals() >= renewals + 3);
    assert_eq!(kms.reported(), told(1, 0));
    fixture.clock.advance(Duration::from_secs(61));
    eventually(|| kms.reported() == told(2, 4 * 4096));
    assert!(fixture.kms.reported().is_some());
    volume.close().unwrap();
}

#[test]
fn a_domain_is_durable_when_it_is_made() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    for number in 0..10_u32 {
        let name = number.to_string().into_bytes();
        tenant(&volume, &name);
        // What a crash leaves.
        let copy = fixture.scratch.path().join(format!("copy {number}"));
        crate::support::copy_dir(&fixture.dir(), &copy);
        let copied = fixture.try_open_at(&copy).unwrap();
        let root = copied.lookup(Ino::ROOT, &name).unwrap().ino;
        assert_eq!(root, Domain(number as u16 + 1).root());
        write_new(&copied, root, b"file", b"content");
        copied.close().unwrap();
    }
    volume.close().unwrap();
}
