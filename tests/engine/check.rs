//! Checking and repairing: whatever row or file is taken away, added or damaged is found, told by its path, and repaired
//! if that needs no guess.

use crate::support::{Answer, DIR, FILE, Fixture, content, flip, list, noise};
use crate::tree;
use cmkfs::engine::{CheckOptions, Fault, Ino, KeyError, OpenError, Problem, Report, SetXattr};
use rocksdb::{DB, IteratorMode, Options};
use std::path::PathBuf;

const META: &str = "meta";
const CONTENT: &str = "content";

fn check(fixture: &Fixture, scrub: bool, repair: bool) -> Report {
    let options = CheckOptions {
        scrub,
        repair,
        ..CheckOptions::default()
    };
    fixture.try_check(options).unwrap()
}

fn faults(report: &Report) -> Vec<Fault> {
    let mut faults: Vec<_> = report.problems.iter().map(|problem| problem.fault).collect();
    faults.sort_unstable_by_key(|fault| fault.name());
    faults.dedup();
    faults
}

/// What a volume holds that [`volume`] made.
struct Made {
    fixture: Fixture,
    dir: Ino,
    small: Ino,
    large: Ino,
}

impl Made {
    /// `/dir/small`, inline, with an attribute and a second name `/also`; `/dir/large`, in slots with one block inline.
    fn new() -> Self {
        let fixture = Fixture::new();
        let volume = fixture.open();
        let dir = volume.make(Ino::ROOT, b"dir", &DIR).unwrap().ino;
        let small = volume.make(dir, b"small", &FILE).unwrap().ino;
        volume.write(small, 0, &noise(1, 9000)).unwrap();
        volume
            .setxattr(small, b"user.note", b"note", SetXattr::Any, false)
            .unwrap();
        volume.link(small, Ino::ROOT, b"also").unwrap();
        let large = volume.make(dir, b"large", &FILE).unwrap().ino;
        volume.write(large, 0, &noise(2, 400_000)).unwrap();
        volume.fsync(large).unwrap();
        volume.close().unwrap();
        drop(volume);
        let made = Self {
            fixture,
            dir,
            small,
            large,
        };
        assert_eq!(check(&made.fixture, true, false).problems, []);
        made
    }

    fn slot_file(&self, ino: Ino) -> PathBuf {
        let shard = self.fixture.dir().join(format!("data/{:02x}", ino.0 % 256));
        shard.join(format!("{:016x}", ino.0))
    }

    /// Changes the database behind the engine's back.
    fn with_database(&self, change: impl FnOnce(&DB)) {
        let options = Options::default();
        let db = DB::open_cf(&options, self.fixture.dir().join("meta"), [META, CONTENT]).unwrap();
        change(&db);
        db.flush_wal(true).unwrap();
    }

    /// Removes the first row of a kind that belongs to an inode.
    fn remove(&self, kind: u8, ino: Ino) {
        self.with_database(|db| {
            db.delete_cf(db.cf_handle(META).unwrap(), row(db, kind, ino))
                .unwrap()
        });
    }

    /// Has the roots say what is there.
    fn accept_records(&self) {
        let options = CheckOptions {
            repair: true,
            accept_records: true,
            ..CheckOptions::default()
        };
        let report = self.fixture.try_check(options).unwrap();
        let is_left = |problem: &&Problem| problem.fault == Fault::Root && !problem.is_repaired;
        assert_eq!(report.problems.iter().filter(is_left).count(), 0);
    }

    /// Checks, expects `found`, repairs, and expects what cannot be repaired to be left.
    fn expect(&self, found: &[Fault], left: &[Fault]) -> Report {
        let before = std::fs::read(self.fixture.dir().join("seal")).unwrap();
        let report = check(&self.fixture, false, false);
        assert_eq!(faults(&report), found);
        assert_eq!(std::fs::read(self.fixture.dir().join("seal")).unwrap(), before);
        let repaired = check(&self.fixture, false, true);
        assert_eq!(repaired.problems.len(), report.problems.len());
        let unrepaired = |problem: &&Problem| !problem.is_repaired;
        let mut kept: Vec<_> = repaired
            .problems
            .iter()
            .filter(unrepaired)
            .map(|problem| problem.fault)
            .collect();
        kept.sort_unstable_by_key(|fault| fault.name());
        kept.dedup();
        assert_eq!(kept, left);
        assert_eq!(faults(&check(&self.fixture, false, false)), left);
        if left.contains(&Fault::Root) {
            self.accept_records();
            let others: Vec<_> = left
                .iter()
                .copied()
                .filter(|fault| *fault != Fault::Root)
                .collect();
            assert_eq!(faults(&check(&self.fixture, false, false)), others);
        }
        report
    }
}

/// The key of the first row of a kind that belongs to an inode.
fn row(db: &DB, kind: u8, ino: Ino) -> Vec<u8> {
    let prefix = [&[0, 0, kind][..], &ino.0.to_be_bytes()].concat();
    let mut rows = db.iterator_cf(
        db.cf_handle(META).unwrap(),
        IteratorMode::From(&prefix, rocksdb::Direction::Forward),
    );
    let (key, _) = rows.next().unwrap().unwrap();
    assert!(key.starts_with(&prefix));
    key.into()
}

fn path_of(problem: &Problem) -> &str {
    std::str::from_utf8(problem.path.as_deref().unwrap()).unwrap()
}

#[test]
fn a_volume_that_was_closed_is_clean_and_so_is_one_that_was_not() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    tree::make(&volume);
    volume.close().unwrap();
    drop(volume);
    let report = check(&fixture, true, false);
    assert_eq!(report.problems, []);
    assert_eq!(
        (
            report.counts.inodes,
            report.counts.directories,
            report.counts.files
        ),
        (13, 2, 9)
    );
    assert_eq!(report.counts.scrubbed_blocks, report.counts.blocks);

    let volume = fixture.open();
    let ino = volume.make(Ino::ROOT, b"unlinked", &FILE).unwrap().ino;
    volume.write(ino, 0, &noise(1, 500_000)).unwrap();
    volume.fsync(ino).unwrap();
    volume.unlink(Ino::ROOT, b"unlinked").unwrap();
    volume.fsync(Ino::ROOT).unwrap();
    drop(volume);
    let report = check(&fixture, true, false);
    assert_eq!((report.problems.as_slice(), report.counts.orphans), (&[][..], 1));
    // It goes with the next repair as with the next mount.
    let report = check(&fixture, false, true);
    assert_eq!((report.problems.as_slice(), report.counts.orphans), (&[][..], 0));
}

#[test]
fn a_mounted_volume_is_not_checked() {
    let fixture = Fixture::new();
    let _volume = fixture.open();
    assert!(fixture.try_check(CheckOptions::default()).is_err());
}

#[test]
fn an_inode_without_a_name_gets_one_in_lost_and_found() {
    let made = Made::new();
    made.remove(b'D', Ino::ROOT);
    made.remove(b'D', Ino::ROOT);
    // With both names of the root gone, the directory has none, and the file one.
    let report = made.expect(&[Fault::Count, Fault::Lost, Fault::Root], &[Fault::Root]);
    let lost: Vec<_> = report
        .problems
        .iter()
        .filter(|problem| problem.fault == Fault::Lost)
        .collect();
    assert_eq!(
        lost.iter()
            .map(|problem| problem.ino.unwrap())
            .collect::<Vec<_>>(),
        [made.dir]
    );
    let volume = made.fixture.open();
    let found = volume.lookup(Ino::ROOT, b"lost+found").unwrap().ino;
    let name = format!("#{}", made.dir.0).into_bytes();
    assert_eq!(list(&volume, found).unwrap(), [(name, made.dir)]);
    assert_eq!(content(&volume, made.small).unwrap(), noise(1, 9000));
    assert_eq!(volume.getattr(made.small).unwrap().nlink, 1);
}

#[test]
fn a_name_of_an_inode_that_is_gone_is_told_by_its_directory() {
    let made = Made::new();
    made.remove(b'I', made.small);
    // Its rows belong to nothing; its names cannot be taken from the directories without a guess.
    let report = made.expect(
        &[Fault::Counter, Fault::LeftOver, Fault::Name, Fault::Root],
        &[Fault::Name, Fault::Root],
    );
    let name = report
        .problems
        .iter()
        .filter(|problem| problem.fault == Fault::Name);
    let mut paths: Vec<_> = name.map(path_of).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["/", "/dir"]);
}

#[test]
fn counts_are_counted_again() {
    let made = Made::new();
    made.remove(b'X', made.small);
    let report = made.expect(&[Fault::Count, Fault::Root], &[Fault::Root]);
    assert!(["/also", "/dir/small"].contains(&path_of(&report.problems[0])));
    made.remove(b'B', made.large);
    made.expect(&[Fault::Bitmap, Fault::Root], &[Fault::Root]);
    // A chunk of the large file, its run and its blocks.
    made.remove(b'C', made.large);
    made.expect(
        &[Fault::Bitmap, Fault::Count, Fault::LeakedSpace, Fault::Root],
        &[Fault::Root],
    );
    assert_eq!(check(&made.fixture, true, false).problems, []);
}

#[test]
fn a_damaged_mark_of_an_unlinked_inode_keeps_nothing_from_being_opened_and_is_made_anew() {
    let made = Made::new();
    let volume = made.fixture.open();
    // Known to the kernel: it is not reclaimed before.
    volume.lookup(made.dir, b"small").unwrap();
    volume.unlink(Ino::ROOT, b"also").unwrap();
    volume.unlink(made.dir, b"small").unwrap();
    volume.fsync(made.dir).unwrap();
    // A crash: the inode is still there.
    drop(volume);
    made.with_database(|db| {
        let family = db.cf_handle(META).unwrap();
        let key = row(db, b'O', made.small);
        db.put_cf(family, key, noise(1, 28)).unwrap();
    });
    let volume = made.fixture.open();
    assert_eq!(content(&volume, made.large).unwrap(), noise(2, 400_000));
    volume.close().unwrap();
    drop(volume);
    made.expect(&[Fault::Lost, Fault::Root], &[Fault::Root]);
    assert_eq!(check(&made.fixture, true, false).counts.inodes, 3);
}

#[test]
fn what_was_below_a_directory_that_is_gone_is_found_again() {
    let made = Made::new();
    made.remove(b'I', made.dir);
    // The entries are of no directory; the file that has another name keeps it.
    made.expect(
        &[
            Fault::Count,
            Fault::Counter,
            Fault::Lost,
            Fault::Name,
            Fault::Root,
        ],
        &[Fault::Name, Fault::Root],
    );
    let volume = made.fixture.open();
    let found = volume.lookup(Ino::ROOT, b"lost+found").unwrap().ino;
    let name = format!("#{}", made.large.0).into_bytes();
    assert_eq!(list(&volume, found).unwrap(), [(name, made.large)]);
    assert_eq!(content(&volume, made.large).unwrap(), noise(2, 400_000));
}

#[test]
fn a_database_that_is_damaged_in_itself_is_told_and_nothing_is_repaired() {
    let made = Made::new();
    made.remove(b'X', made.small);
    let meta = made.fixture.dir().join("meta");
    let mut tables: Vec<_> = std::fs::read_dir(meta)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    tables.retain(|path| path.extension().is_some_and(|extension| extension == "sst"));
    tables.sort();
    for table in &tables {
        flip(table, 100);
    }
    let report = match made.fixture.try_check(CheckOptions {
        repair: true,
        ..CheckOptions::default()
    }) {
        Ok(report) => report,
        // Not even the root record could be read.
        Err(error) => return assert!(matches!(error, OpenError::Damaged(_)), "{error}"),
    };
    assert!(
        report
            .problems
            .iter()
            .any(|problem| problem.fault == Fault::Record)
    );
    assert!(report.problems.iter().all(|problem| !problem.is_repaired));
}

#[test]
fn ciphertext_that_is_missing_is_told_and_what_belongs_to_nothing_goes() {
    let made = Made::new();
    made.with_database(|db| {
        let family = db.cf_handle(CONTENT).unwrap();
        let key = |ino: u64, block: u64| [&[0, 0][..], &ino.to_be_bytes(), &block.to_be_bytes()].concat();
        db.put_cf(family, key(9999, 0), noise(1, 4096)).unwrap();
        db.put_cf(family, key(made.small.0, 70), noise(1, 4096)).unwrap();
        db.put_cf(family, key(made.large.0, 3), noise(1, 4096)).unwrap();
    });
    assert_eq!(made.expect(&[Fault::LeftOver], &[]).problems.len(), 3);
    made.with_database(|db| {
        let key = [&[0, 0][..], &made.small.0.to_be_bytes(), &1_u64.to_be_bytes()].concat();
        db.delete_cf(db.cf_handle(CONTENT).unwrap(), key).unwrap();
    });
    made.expect(&[Fault::Missing], &[Fault::Missing]);
}

#[test]
fn a_damaged_record_is_told_and_nothing_is_concluded_from_it() {
    for (kind, of) in [(b'I', 0), (b'D', 1), (b'X', 0), (b'C', 2), (b'B', 2)] {
        let made = Made::new();
        let ino = [made.small, made.dir, made.large][of];
        made.with_database(|db| {
            let family = db.cf_handle(META).unwrap();
            let key = row(db, kind, ino);
            let mut value = db.get_cf(family, &key).unwrap().unwrap();
            *value.last_mut().unwrap() ^= 1;
            db.put_cf(family, key, value).unwrap();
        });
        // A bitmap is made anew from the chunks.
        let (found, left) = match kind {
            b'B' => ([Fault::Bitmap], vec![]),
            _ => ([Fault::Record], vec![Fault::Record]),
        };
        made.expect(&found, &left);
    }
}

#[test]
fn slot_files_are_whole_and_hold_nothing_else() {
    let made = Made::new();
    let slots = made.slot_file(made.large);
    let length = std::fs::metadata(&slots).unwrap().len();
    // What a crash between writing a run and committing it leaves.
    let file = std::fs::File::options().write(true).open(&slots).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(1, 8192), length + (1 << 20)).unwrap();
    made.expect(&[Fault::LeakedSpace], &[]);
    let stray = made.slot_file(Ino(7777));
    std::fs::write(&stray, noise(2, 4096)).unwrap();
    let foreign = made.fixture.dir().join("data/00/README");
    std::fs::write(&foreign, b"").unwrap();
    made.expect(&[Fault::Foreign, Fault::LeakedSpace], &[Fault::Foreign]);
    assert!(!stray.exists() && foreign.exists());
    std::fs::remove_file(foreign).unwrap();

    file.set_len(200_000).unwrap();
    let report = made.expect(&[Fault::Missing], &[Fault::Missing]);
    assert_eq!(path_of(&report.problems[0]), "/dir/large");
}

#[test]
fn scrubbing_tells_which_block_of_which_file_is_damaged() {
    let made = Made::new();
    let slots = made.slot_file(made.large);
    flip(&slots, 5 * 4096 + 17);
    flip(&slots, 40 * 4096 + 4095);
    assert_eq!(check(&made.fixture, false, false).problems, []);
    let report = check(&made.fixture, true, false);
    let told: Vec<_> = report
        .problems
        .iter()
        .map(|problem| {
            (
                problem.fault,
                path_of(problem),
                problem.detail.split(' ').nth(1).unwrap(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            (Fault::Block, "/dir/large", "5"),
            (Fault::Block, "/dir/large", "40")
        ]
    );
}

#[test]
fn a_key_that_is_disabled_lets_nothing_be_checked() {
    let made = Made::new();
    made.fixture.kms.set(Answer::Disabled);
    let refused = made.fixture.try_check(CheckOptions::default());
    assert_eq!(refused.unwrap_err(), OpenError::Key(KeyError::Revoked));
}
