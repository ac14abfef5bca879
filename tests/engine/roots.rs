//! Roots: records that were put back as they once were, removed or added, each of which opens under its key and in its place,
//! are told from those that were last written.

use crate::support::{DIR, FILE, Fixture, content, eventually, noise};
use cmkfs::engine::{
    CheckOptions, Domain, Error, Fault, Ino, OpenError, Opening, SetAttr, SetXattr, Verification, Verify,
    Volume,
};
use rocksdb::{DB, IteratorMode, Options as DatabaseOptions};
use std::collections::BTreeMap;
use std::sync::Arc;

const META: &str = "meta";
const CONTENT: &str = "content";
const FAMILIES: [&str; 2] = [META, CONTENT];
const TENANT: Domain = Domain(1);

/// Every row, by family and key.
type Rows = BTreeMap<(&'static str, Vec<u8>), Vec<u8>>;

/// A volume between two states: a file, a directory and a domain that were changed from the first to the second.
struct Attacked {
    fixture: Fixture,
    dir: Ino,
    file: Ino,
    tenant: Ino,
    before: Rows,
    after: Rows,
    /// The seal file of the second state.
    seal: Vec<u8>,
}

fn database(fixture: &Fixture) -> DB {
    DB::open_cf(&DatabaseOptions::default(), fixture.dir().join(META), FAMILIES).unwrap()
}

fn rows(fixture: &Fixture) -> Rows {
    let db = database(fixture);
    let mut rows = Rows::new();
    for family in FAMILIES {
        for row in db.iterator_cf(db.cf_handle(family).unwrap(), IteratorMode::Start) {
            let (key, value) = row.unwrap();
            rows.insert((family, key.into()), value.into());
        }
    }
    rows
}

impl Attacked {
    fn new() -> Self {
        let fixture = Fixture::new();
        let volume = fixture.open();
        let dir = volume.make(Ino::ROOT, b"dir", &DIR).unwrap().ino;
        let file = volume.make(dir, b"file", &FILE).unwrap().ino;
        volume.write(file, 0, &noise(1, 300_000)).unwrap();
        let set = |volume: &Volume, value: &[u8]| {
            volume
                .setxattr(file, b"user.note", value, SetXattr::Any, false)
                .unwrap();
        };
        set(&volume, b"one");
        volume.make(dir, b"goes", &FILE).unwrap();
        let plain = volume.make(Ino::ROOT, b"tenant", &DIR).unwrap().ino;
        volume.forget(plain, 1);
        volume
            .set_key(Ino::ROOT, b"tenant", "acs:kms:local:1:key/tenant")
            .unwrap();
        let tenant = volume.lookup(Ino::ROOT, b"tenant").unwrap().ino;
        let held = volume.make(tenant, b"held", &FILE).unwrap().ino;
        volume.write(held, 0, &noise(3, 5000)).unwrap();
        volume.close().unwrap();
        drop(volume);
        let before = rows(&fixture);

        let volume = fixture.open();
        volume.write(file, 0, &noise(2, 4096)).unwrap();
        volume.write(file, 1 << 20, &noise(2, 300_000)).unwrap();
        set(&volume, b"two");
        let private = SetAttr {
            perm: Some(0o600),
            ..SetAttr::default()
        };
        volume.setattr(dir, &private).unwrap();
        volume.unlink(dir, b"goes").unwrap();
        volume.make(dir, b"comes", &FILE).unwrap();
        volume.make(tenant, b"another", &FILE).unwrap();
        volume.setattr(held, &private).unwrap();
        volume.close().unwrap();
        drop(volume);
        let after = rows(&fixture);
        let seal = std::fs::read(fixture.dir().join("seal")).unwrap();
        let attacked = Self {
            fixture,
            dir,
            file,
            tenant,
            before,
            after,
            seal,
        };
        assert_eq!(attacked.problems(), []);
        attacked
    }

    /// Puts rows of the first state in the place of those of the second, if `chosen`: what was made since goes, what is gone is
    /// back. True if that changed anything.
    fn put_back(&self, chosen: impl Fn(&'static str, &[u8]) -> bool) -> bool {
        let db = database(&self.fixture);
        let mut count = 0;
        let keys = self.before.keys().chain(self.after.keys());
        for (family, key) in keys.filter(|(family, key)| chosen(family, key)) {
            let at = (*family, key.clone());
            if self.before.get(&at) == self.after.get(&at) {
                continue;
            }
            count += 1;
            let column = db.cf_handle(family).unwrap();
            match self.before.get(&at) {
                Some(value) => db.put_cf(column, key, value).unwrap(),
                None => db.delete_cf(column, key).unwrap(),
            }
        }
        db.flush_wal(true).unwrap();
        count > 0
    }

    /// Takes the attack back.
    fn restore(&self) {
        let db = database(&self.fixture);
        for (family, key) in self.before.keys() {
            db.delete_cf(db.cf_handle(family).unwrap(), key).unwrap();
        }
        for ((family, key), value) in &self.after {
            db.put_cf(db.cf_handle(family).unwrap(), key, value).unwrap();
        }
        db.flush_wal(true).unwrap();
        std::fs::write(self.fixture.dir().join("seal"), &self.seal).unwrap();
    }

    fn open(&self, verify: Verify) -> Result<Arc<Volume>, OpenError> {
        let mut options = self.fixture.options;
        options.verify = verify;
        let kms: Arc<dyn cmkfs::engine::KeyService> = self.fixture.kms.clone();
        Volume::open(&self.fixture.dir(), options, kms, self.fixture.clock.clone())
    }

    /// What a check finds of roots, by inode.
    fn problems(&self) -> Vec<Option<Ino>> {
        let report = self.fixture.try_check(CheckOptions::default()).unwrap();
        let roots = report
            .problems
            .iter()
            .filter(|problem| problem.fault == Fault::Root);
        roots.map(|problem| problem.ino).collect()
    }
}

fn verification(volume: &Volume, domain: Domain) -> Verification {
    let domains = volume.domains();
    let found = domains.iter().find(|status| status.domain == domain).unwrap();
    found.verification.unwrap()
}

fn is_over(volume: &Volume, domain: Domain) -> bool {
    !matches!(
        verification(volume, domain),
        Verification::Waiting | Verification::Running { .. }
    )
}

/// The kind of a row, and the inode that it is of.
fn kind(key: &[u8]) -> (u8, Ino) {
    let number = |at: usize| {
        key.get(at..at + 8)
            .map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
    };
    (key[2], Ino(number(3).unwrap_or_default()))
}

#[test]
fn whatever_rows_are_put_back_the_scan_tells_and_a_full_one_keeps_the_volume_shut() {
    let attacked = Attacked::new();
    let (dir, file) = (attacked.dir, attacked.file);
    type Chosen<'c> = Box<dyn Fn(&'static str, &[u8]) -> bool + 'c>;
    let of = |wanted: u8, ino: Ino| -> Chosen<'_> {
        Box::new(move |family, key| family == META && kind(key) == (wanted, ino))
    };
    let all_of = |ino: Ino| -> Chosen<'_> {
        Box::new(move |family, key| match family {
            META => b"ICBXD".contains(&key[2]) && kind(key).1 == ino,
            _ => key[2..10] == ino.0.to_be_bytes(),
        })
    };
    // What is put back, the domain that notices, and the inode that a check names, if it can tell.
    let attacks: [(&str, Chosen<'_>, Domain, Option<Ino>); 9] = [
        ("a directory's record", of(b'I', dir), Domain::FIRST, None),
        ("a file's record", of(b'I', file), Domain::FIRST, None),
        ("a directory's entries", of(b'D', dir), Domain::FIRST, Some(dir)),
        ("a file's chunks", of(b'C', file), Domain::FIRST, Some(file)),
        ("a file's bitmap", of(b'B', file), Domain::FIRST, Some(file)),
        ("a file's attributes", of(b'X', file), Domain::FIRST, Some(file)),
        ("a whole file", all_of(file), Domain::FIRST, None),
        ("a whole directory", all_of(dir), Domain::FIRST, None),
        (
            "the counts of a key domain",
            Box::new(|family, key| family == META && key[2] == b'U'),
            Domain::FIRST,
            None,
        ),
    ];
    for (what, chosen, domain, named) in attacks {
        assert!(attacked.put_back(chosen), "{what}: nothing to put back");
        assert_eq!(
            attacked.open(Verify::Full).err(),
            Some(OpenError::NotAsWritten(domain)),
            "{what}"
        );
        assert!(
            attacked.problems().contains(&named),
            "{what}: {:?}",
            attacked.problems()
        );
        let volume = attacked.open(Verify::Lazy).unwrap();
        eventually(|| is_over(&volume, domain));
        let found = verification(&volume, domain);
        assert!(matches!(found, Verification::Differs { .. }), "{what}: {found:?}");
        let refused = volume.make(Ino::ROOT, b"new", &FILE).err();
        assert_eq!(refused, Some(Error::Posix(libc::EROFS)), "{what}");
        // What lies in the page cache is a change, too.
        let erofs = Err(Error::Posix(libc::EROFS));
        assert_eq!(volume.write_back(file, 0, &noise(9, 4096)), erofs, "{what}");
        assert_eq!(volume.open_file(file, Opening::ToWrite), erofs, "{what}");
        drop(volume);
        attacked.restore();
        assert_eq!(attacked.problems(), [], "{what}");
    }
    // And what was last written is taken for that.
    let volume = attacked.open(Verify::Full).unwrap();
    assert!(matches!(
        verification(&volume, TENANT),
        Verification::Matches { .. }
    ));
    assert_eq!(content(&volume, file).unwrap()[..4096], noise(2, 4096));
}

#[test]
fn one_domain_s_records_put_back_are_told_of_that_domain_and_all_of_them_of_the_first() {
    let attacked = Attacked::new();
    let of_tenant = |key: &[u8]| key[..2] == TENANT.0.to_be_bytes();
    // Its root says what there was to be.
    assert!(attacked.put_back(|family, key| family == META && of_tenant(key) && key[2] != b'R'));
    assert_eq!(
        attacked.open(Verify::Full).err(),
        Some(OpenError::NotAsWritten(TENANT))
    );
    let volume = attacked.open(Verify::Lazy).unwrap();
    eventually(|| is_over(&volume, TENANT) && is_over(&volume, Domain::FIRST));
    assert!(matches!(
        verification(&volume, TENANT),
        Verification::Differs { .. }
    ));
    assert!(matches!(
        verification(&volume, Domain::FIRST),
        Verification::Matches { .. }
    ));
    let refused = volume.make(attacked.tenant, b"new", &FILE).err();
    assert_eq!(refused, Some(Error::Posix(libc::EROFS)));
    volume.make(Ino::ROOT, b"new", &FILE).unwrap();
    drop(volume);
    attacked.restore();
    // All of it, its root too: that is in the sum of the first.
    assert!(attacked.put_back(|_, key| of_tenant(key)));
    assert_eq!(
        attacked.open(Verify::Full).err(),
        Some(OpenError::NotAsWritten(Domain::FIRST))
    );
    // By itself it is in order; the first, which knows better, speaks for all.
    let volume = attacked.open(Verify::Lazy).unwrap();
    eventually(|| is_over(&volume, TENANT) && is_over(&volume, Domain::FIRST));
    let refused = volume.make(attacked.tenant, b"new", &FILE).err();
    assert_eq!(refused, Some(Error::Posix(libc::EROFS)));
}

#[test]
fn rows_that_are_added_are_told() {
    let attacked = Attacked::new();
    let some = |wanted: u8| {
        let mut found = attacked.after.iter();
        let (key, value) = found
            .find(|((family, key), _)| *family == META && key[2] == wanted)
            .unwrap();
        (key.1.clone(), value.clone())
    };
    let (entry, value) = some(b'D');
    let last = entry.len() - 1;
    for at in [1, 2, last] {
        let mut key = entry.clone();
        key[at] ^= 0x40;
        let db = database(&attacked.fixture);
        db.put_cf(db.cf_handle(META).unwrap(), &key, &value).unwrap();
        db.flush_wal(true).unwrap();
        drop(db);
        // Of a domain that is not there nothing is ever looked at.
        match at {
            1 => drop(attacked.open(Verify::Full).unwrap()),
            _ => assert_eq!(
                attacked.open(Verify::Full).err(),
                Some(OpenError::NotAsWritten(Domain::FIRST)),
                "{key:?}"
            ),
        }
        let db = database(&attacked.fixture);
        db.delete_cf(db.cf_handle(META).unwrap(), &key).unwrap();
        db.flush_wal(true).unwrap();
    }
    attacked.open(Verify::Full).unwrap();
}

#[test]
fn what_is_accepted_is_what_there_is_from_then_on() {
    let attacked = Attacked::new();
    let file = attacked.file;
    assert!(attacked.put_back(|family, key| family == META && kind(key) == (b'X', file)));
    assert!(attacked.put_back(|family, key| family == META && kind(key) == (b'I', attacked.dir)));
    let accepted = CheckOptions {
        repair: true,
        accept_records: true,
        ..CheckOptions::default()
    };
    let report = attacked.fixture.try_check(accepted).unwrap();
    assert!(report.problems.iter().any(|problem| problem.fault == Fault::Root));
    assert!(
        report.problems.iter().all(|problem| problem.is_repaired),
        "{report:?}"
    );
    let volume = attacked.open(Verify::Full).unwrap();
    assert_eq!(volume.getxattr(file, b"user.note").unwrap(), b"one");
    volume.make(attacked.dir, b"new", &FILE).unwrap();
}

#[test]
fn a_running_volume_is_verified_while_it_changes() {
    let attacked = Attacked::new();
    let volume = attacked.open(Verify::Lazy).unwrap();
    let mut made = 0_u32;
    eventually(|| {
        made += 1;
        let name = made.to_string();
        let ino = volume.make(attacked.dir, name.as_bytes(), &FILE).unwrap().ino;
        volume.write(ino, 0, &noise(1, 9000)).unwrap();
        volume.fsync(ino).unwrap();
        is_over(&volume, Domain::FIRST) && is_over(&volume, TENANT) && made > 100
    });
    for domain in [Domain::FIRST, TENANT] {
        let found = verification(&volume, domain);
        assert!(matches!(found, Verification::Matches { .. }), "{found:?}");
    }
    // A crash, and the next mount finds what there is.
    drop(volume);
    attacked.open(Verify::Full).unwrap();
}
