//! What dies is dead at every step, and what lives survives every step.

use super::sessions::{Owner, Session};
use super::tests::{create, row, run};
use super::{Action, Engine, NewKeystore, OpenError, Placement, Release, Request};
use crate::clock::Clock;
use crate::epoch::EpochKeys;
use crate::ratchet::Step;
use crate::rows::KeyRow;
use crate::slot::{FileRootSlot, Keeper, Passphrase, RootSlot, SlotError, open_root};
use crate::store::{Store, Table};
use kms_api::proto::KeyState;
use kms_api::session::{KeyPair, Role};
use kms_api::{Code, KmsError};
use parking_lot::Mutex;
use prost::Message;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tempfile::TempDir;
use uuid::Uuid;
use zeroize::Zeroizing;

pub(super) const HOUR_MS: u64 = 60 * 60 * 1000;
pub(super) const WEEK_MS: u64 = 7 * 24 * HOUR_MS;
/// Steps up to this one leave the old epoch.
const LAST_BEFORE: Step = Step::RowsChecked;

/// A host's clocks, each of which can be set.
pub(super) struct HostClock(Mutex<(i64, u64, String)>);

impl HostClock {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new((1_800_000_000_000, 77_000, "boot".to_owned()))))
    }

    /// Time passes.
    pub(super) fn pass(&self, ms: u64) {
        let mut clock = self.0.lock();
        clock.0 = clock.0.saturating_add_unsigned(ms);
        clock.1 += ms;
    }

    /// Somebody sets the wall clock.
    pub(super) fn set(&self, by_ms: i64) {
        self.0.lock().0 += by_ms;
    }

    /// The host is off for a while, then boots.
    fn reboot(&self, off_ms: u64) {
        let mut clock = self.0.lock();
        *clock = (
            clock.0.saturating_add_unsigned(off_ms),
            5_000,
            clock.2.clone() + "+",
        );
    }
}

impl Clock for HostClock {
    fn now_ms(&self) -> i64 {
        self.0.lock().0
    }

    fn boot_ms(&self) -> u64 {
        self.0.lock().1
    }

    fn boot_id(&self) -> String {
        self.0.lock().2.clone()
    }
}

/// A keystore, open, and what its user knows of it.
pub(super) struct Bed {
    directory: TempDir,
    pub(super) engine: Option<Engine>,
    pub(super) clock: Arc<HostClock>,
    pub(super) blobs: BTreeMap<Uuid, Vec<u8>>,
}

impl Bed {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = HostClock::new();
        let placement = Placement {
            region: "r".to_owned(),
            account: "1".to_owned(),
        };
        Engine::init(&directory.path().join("home"), &placement, &*clock).unwrap();
        let mut bed = Self {
            directory,
            engine: None,
            clock,
            blobs: BTreeMap::new(),
        };
        bed.open();
        bed
    }

    pub(super) fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    fn open(&mut self) {
        self.engine = Some(Engine::open(&self.home(), self.clock.clone()).unwrap());
    }

    /// As after kill -9.
    pub(super) fn reopen(&mut self) {
        self.engine = None;
        self.open();
    }

    pub(super) fn engine(&self) -> &Engine {
        self.engine.as_ref().unwrap()
    }

    /// A key, and a blob under it.
    fn key(&mut self) -> Uuid {
        let id = create(self.engine());
        self.blobs.insert(id, encrypt(self.engine(), id));
        id
    }

    fn keys(&mut self, count: usize) -> Vec<Uuid> {
        (0..count).map(|_| self.key()).collect()
    }

    /// Schedules keys, and lets their window pass.
    fn doom(&self, ids: &[Uuid]) {
        for &id in ids {
            schedule(self.engine(), id).unwrap();
        }
        self.clock.pass(WEEK_MS);
    }

    /// Every key of the user's but `dead` decrypts what it encrypted, in `engine`.
    pub(super) fn check(&self, engine: &Engine, dead: &[Uuid], what: &str) {
        let opened = decrypt_all(engine, self.blobs.values());
        for (id, opened) in self.blobs.keys().zip(opened) {
            if dead.contains(id) {
                let error = opened.unwrap_err();
                let code = match row(engine, *id).state() {
                    KeyState::PendingDeletion => Code::PendingDeletion,
                    KeyState::Destroyed => Code::KeyNotFound,
                    state => panic!("{what}: {state:?}"),
                };
                assert_eq!(error.code, code, "{what}");
            } else {
                assert_eq!(opened.unwrap(), id.as_bytes(), "{what}");
            }
        }
    }
}

pub(super) fn encrypt(engine: &Engine, id: Uuid) -> Vec<u8> {
    let (name, context) = (id.to_string(), BTreeMap::new());
    let request = Request {
        action: Action::Encrypt(&name, id.as_bytes()),
        context: &context,
    };
    let sealed = run(engine, "Encrypt", |_, trail| {
        engine.perform(trail, &[request], Release::Clear)
    });
    sealed
        .unwrap()
        .remove(0)
        .map_err(|error| error.message)
        .unwrap()
        .blob
}

pub(super) fn decrypt(engine: &Engine, blob: &[u8]) -> Result<Vec<u8>, KmsError> {
    decrypt_all(engine, std::iter::once(&blob.to_vec())).remove(0)
}

fn decrypt_all<'a>(
    engine: &Engine,
    blobs: impl Iterator<Item = &'a Vec<u8>>,
) -> Vec<Result<Vec<u8>, KmsError>> {
    let context = BTreeMap::new();
    let requests: Vec<_> = blobs
        .map(|blob| Request {
            action: Action::Decrypt(blob),
            context: &context,
        })
        .collect();
    let mut opened = Vec::new();
    for batch in requests.chunks(256) {
        let outcomes = run(engine, "Decrypt", |_, trail| {
            engine.perform(trail, batch, Release::Clear)
        });
        match outcomes {
            Ok(outcomes) => {
                let plain = outcomes.into_iter().map(|one| Ok(one?.plaintext.to_vec()));
                opened.extend(plain);
            }
            Err(error) => opened.extend(batch.iter().map(|_| Err(error.clone()))),
        }
    }
    opened
}

pub(super) fn schedule(engine: &Engine, id: Uuid) -> Result<i64, KmsError> {
    run(engine, "ScheduleKeyDeletion", |call, trail| {
        engine.schedule_key_deletion(call, trail, &id.to_string(), 7)
    })
}

pub(super) fn cancel(engine: &Engine, id: Uuid) -> Result<(), KmsError> {
    run(engine, "CancelKeyDeletion", |call, trail| {
        engine.cancel_key_deletion(call, trail, &id.to_string())
    })
}

fn confirm(engine: &Engine) {
    run(engine, "ConfirmClock", |call, trail| {
        engine.confirm_clock(call, trail)
    })
    .unwrap();
}

pub(super) fn state(engine: &Engine, id: Uuid) -> KeyState {
    row(engine, id).state()
}

pub(super) fn records_of(home: &Path, operation: &str) -> usize {
    let log = std::fs::read(home.join("audit.log")).unwrap();
    let name = operation.as_bytes();
    log.windows(name.len()).filter(|window| *window == name).count()
}

/// Copies a home, but for its reserve, which has no content.
pub(super) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_name() != "reserve" {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in directory.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn holds(path: &Path, needle: &[u8]) -> bool {
    let content = std::fs::read(path).unwrap();
    content.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn a_hundred_of_a_thousand_keys_die_in_one_ratchet() {
    let mut bed = Bed::new();
    let keys = bed.keys(1000);
    let doomed: Vec<_> = keys.iter().step_by(10).copied().collect();
    for (number, id) in keys.iter().enumerate().step_by(7) {
        run(bed.engine(), "CreateAlias", |call, trail| {
            let alias = format!("alias/number-{number}");
            bed.engine().create_alias(call, trail, &alias, &id.to_string())
        })
        .unwrap();
    }
    bed.doom(&doomed);
    let before = bed.engine().position();
    let begun = Instant::now();
    let destroyed = bed.engine().destroy_due().unwrap();
    println!("1000 keys, 100 destroyed in {:?}", begun.elapsed());
    let mut sorted = doomed.clone();
    sorted.sort_unstable();
    assert_eq!(destroyed, sorted);
    let after = bed.engine().position();
    assert_eq!(after.epoch, before.epoch + 1, "one ratchet for all");
    assert!(after.state_seq > before.state_seq);
    for _ in 0..2 {
        bed.check(bed.engine(), &doomed, "thousand");
        assert_eq!(bed.engine().alias_target("alias/number-7"), Some(keys[7]));
        assert_eq!(bed.engine().alias_target("alias/number-70"), Some(keys[70]));
        assert_eq!(bed.engine().store.scan(Table::Material).unwrap().len(), 900);
        assert_eq!(bed.engine().home.slots().unwrap(), [2]);
        assert_eq!(bed.engine().home.roots().unwrap(), [2]);
        bed.reopen();
    }
    // A row that moved is found under its new name, and by no other.
    for name in ["alias/number-7", "alias/number-70"] {
        run(bed.engine(), "DeleteAlias", |call, trail| {
            bed.engine().delete_alias(call, trail, name)
        })
        .unwrap();
    }
    bed.reopen();
    assert_eq!(bed.engine().alias_target("alias/number-7"), None);
    assert_eq!(bed.engine().alias_target("alias/number-14"), Some(keys[14]));
    assert_eq!(records_of(&bed.home(), "BeginKeyDestruction"), 1);
    assert_eq!(records_of(&bed.home(), "DestroyKeyMaterial"), 1);
}

#[test]
fn what_is_destroyed_stays_as_a_tombstone_and_nothing_else_is_answered_of_it() {
    let mut bed = Bed::new();
    let ids = bed.keys(2);
    bed.doom(&ids[..1]);
    let engine = bed.engine();
    engine.destroy_due().unwrap();
    let tombstone = row(engine, ids[0]);
    assert_eq!(tombstone.state(), KeyState::Destroyed);
    assert_eq!(tombstone.destroyed_ms, Some(bed.clock.now_ms()));
    assert_eq!((tombstone.delete_ms, tombstone.delete_observed_ms), (None, None));
    let name = ids[0].to_string();
    let refused: [Result<(), KmsError>; 7] = [
        decrypt(engine, &bed.blobs[&ids[0]]).map(drop),
        schedule(engine, ids[0]).map(drop),
        cancel(engine, ids[0]),
        run(engine, "EnableKey", |call, trail| {
            engine.enable_key(call, trail, &name)
        }),
        run(engine, "DisableKey", |call, trail| {
            engine.disable_key(call, trail, &name)
        }),
        run(engine, "CreateAlias", |call, trail| {
            engine.create_alias(call, trail, "alias/new", &name)
        }),
        run(engine, "UpdateAlias", |call, trail| {
            engine.update_alias(call, trail, "alias/new", &name)
        }),
    ];
    for (number, refused) in refused.into_iter().enumerate() {
        let error = refused.unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str()),
            (Code::KeyNotFound, "the key was destroyed"),
            "{number}"
        );
    }
    assert!(engine.destroy_due().unwrap().is_empty());
    assert_eq!(engine.position().epoch, 2);
}

/// What kill -9 leaves at each step, as a copy that is taken there: twenty times.
#[test]
fn a_crash_at_any_step_loses_no_survivor_and_brings_no_dead_key_back() {
    const ROUNDS: usize = 20;
    let mut bed = Bed::new();
    let mut dead = Vec::new();
    bed.keys(3);
    for round in 0..ROUNDS {
        let doomed = bed.keys(1 + round % 3);
        bed.key();
        bed.doom(&doomed);
        dead.extend(&doomed);
        let epoch = bed.engine().position().epoch;
        let copies = tempfile::tempdir().unwrap();
        let mut steps = Vec::new();
        let destroyed = bed.engine().destroy_due_observed(&mut |step| {
            steps.push(step);
            copy(&bed.home(), &copies.path().join(format!("{step:?}")));
            Ok(())
        });
        assert_eq!(destroyed.unwrap().len(), doomed.len());
        assert_eq!(steps, Step::ALL);
        bed.check(bed.engine(), &dead, "not interrupted");
        for step in steps {
            let what = format!("round {round}, {step:?}");
            let home = copies.path().join(format!("{step:?}"));
            let engine = Engine::open(&home, bed.clock.clone()).unwrap();
            let is_before = step <= LAST_BEFORE;
            let selected = if is_before { epoch } else { epoch + 1 };
            assert_eq!(engine.position().epoch, selected, "{what}");
            assert_eq!(engine.home.slots().unwrap(), [selected], "{what}: one slot");
            assert_eq!(engine.home.roots().unwrap(), [selected], "{what}: one root");
            assert!(engine.home.staged_slots().unwrap().is_empty(), "{what}");
            let epochs = engine
                .store
                .epochs_with(Table::Manifest, crate::rows::MANIFEST_KEY);
            assert_eq!(
                epochs.unwrap().into_iter().collect::<Vec<_>>(),
                [selected],
                "{what}"
            );
            bed.check(&engine, &dead, &what);
            for &id in &doomed {
                let expected = if is_before {
                    KeyState::PendingDeletion
                } else {
                    KeyState::Destroyed
                };
                assert_eq!(state(&engine, id), expected, "{what}");
            }
            // It goes on from there: by destroying them again, or not.
            if is_before && round % 2 == 1 {
                cancel(&engine, doomed[0]).unwrap();
                assert!(decrypt(&engine, &bed.blobs[&doomed[0]]).is_ok(), "{what}");
            } else {
                let again = engine.destroy_due().unwrap().len();
                assert_eq!(again, if is_before { doomed.len() } else { 0 }, "{what}");
                assert_eq!(engine.position().epoch, epoch + 1, "{what}");
                bed.check(&engine, &dead, &what);
            }
            drop(engine);
            // And it was all stored.
            Engine::open(&home, bed.clock.clone()).unwrap();
        }
    }
}

/// A failure of the host's at each step, twenty times, in a daemon that goes on.
#[test]
fn a_failure_at_any_step_loses_no_survivor_and_is_made_good() {
    const ROUNDS: usize = 20;
    let mut bed = Bed::new();
    let mut dead = Vec::new();
    bed.keys(2);
    for step in Step::ALL {
        for round in 0..ROUNDS {
            let what = format!("round {round}, {step:?}");
            let doomed = bed.keys(2);
            bed.doom(&doomed);
            dead.extend(&doomed);
            let failed = bed.engine().destroy_due_observed(&mut |reached| {
                if reached == step {
                    return Err(io::Error::other("injected"));
                }
                Ok(())
            });
            assert_eq!(failed.unwrap_err().code, Code::InternalFailure, "{what}");
            if step == Step::SlotRenamed {
                // Nobody knows which slot the disk selects: nothing is served until a start has looked.
                for blob in bed.blobs.values() {
                    assert_eq!(
                        decrypt(bed.engine(), blob).unwrap_err().code,
                        Code::InternalFailure
                    );
                }
                assert!(bed.engine().store.reopen().is_err());
                bed.reopen();
                bed.check(bed.engine(), &dead, &what);
                assert_eq!(state(bed.engine(), doomed[0]), KeyState::Destroyed);
                continue;
            }
            bed.check(bed.engine(), &dead, &what);
            for &id in &doomed {
                assert_eq!(
                    state(bed.engine(), id),
                    KeyState::PendingDeletion,
                    "{what}: not yet"
                );
            }
            let cancelled = cancel(bed.engine(), doomed[0]);
            if step <= LAST_BEFORE {
                cancelled.unwrap();
                dead.retain(|id| *id != doomed[0]);
            } else {
                assert_eq!(cancelled.unwrap_err().code, Code::StateModifiedFailed, "{what}");
                assert_eq!(
                    schedule(bed.engine(), doomed[0]).unwrap_err().code,
                    Code::PendingDeletion,
                    "{what}"
                );
            }
            if round % 2 == 0 {
                let destroyed = bed.engine().destroy_due().unwrap();
                assert!(destroyed.contains(&doomed[1]), "{what}");
            } else {
                bed.reopen();
                bed.engine().destroy_due().unwrap();
            }
            assert_eq!(state(bed.engine(), doomed[1]), KeyState::Destroyed, "{what}");
            bed.check(bed.engine(), &dead, &what);
            assert_eq!(bed.engine().home.slots().unwrap().len(), 1, "{what}");
            assert!(bed.engine().home.staged_slots().unwrap().is_empty(), "{what}");
        }
    }
}

#[test]
fn rows_that_an_attempt_left_do_not_count_in_the_next_one() {
    let mut bed = Bed::new();
    let ids = bed.keys(3);
    bed.doom(&ids[..1]);
    // A copy that was killed behind the writing of the survivors, and whose start could not discard them.
    let left = bed.directory.path().join("left");
    let stopped = bed.engine().destroy_due_observed(&mut |step| {
        if step == Step::RowsWritten {
            copy(&bed.home(), &left);
            return Err(io::Error::other("injected"));
        }
        Ok(())
    });
    assert!(stopped.is_err());
    for name in ["slot-2.staged", "root-2"] {
        assert!(
            left.join(name).exists() && !bed.home().join(name).exists(),
            "{name}"
        );
        std::fs::copy(left.join(name), bed.home().join(name)).unwrap();
    }
    assert_eq!(bed.engine().destroy_due().unwrap(), ids[..1]);
    bed.check(bed.engine(), &ids[..1], "second attempt");
    bed.reopen();
    bed.check(bed.engine(), &ids[..1], "reopened");
}

/// Everything that ever lay in the home, the present root, and all but the content of the old slot.
#[test]
fn without_the_old_slot_no_file_that_ever_was_gives_a_dead_key_back_and_with_it_they_do() {
    let mut bed = Bed::new();
    let ids = bed.keys(8);
    let victim = ids[3];
    let version = Uuid::from_slice(&row(bed.engine(), victim).primary_version).unwrap();
    let material = *bed.engine().material(victim, version).unwrap().expose();
    let slot = FileRootSlot::open(&bed.home().join("slot-1"), 1).unwrap();
    let old_kek = *slot.kek().unwrap().expose();
    let old_root = *open_root(&bed.home().join("root-1"), &slot).unwrap().expose();
    let copies = tempfile::tempdir().unwrap();
    copy(&bed.home(), &copies.path().join("before"));
    bed.doom(&[victim]);
    bed.engine()
        .destroy_due_observed(&mut |step| {
            copy(&bed.home(), &copies.path().join(format!("{step:?}")));
            Ok(())
        })
        .unwrap();
    bed.engine().close();
    bed.engine = None;
    copy(&bed.home(), &copies.path().join("after"));

    let new_slot = FileRootSlot::open(&bed.home().join("slot-2"), 2).unwrap();
    let new_root = open_root(&bed.home().join("root-2"), &new_slot).unwrap();
    let (mut searched, mut with_slot, mut foreign_rows) = (0, 0, 0);
    for path in files(copies.path()) {
        let is_slot = path.file_name().unwrap() == "slot-1";
        searched += 1;
        assert!(!holds(&path, &material), "{}", path.display());
        assert!(!holds(&path, &old_root), "{}", path.display());
        if holds(&path, &old_kek) {
            assert!(is_slot, "{}", path.display());
            with_slot += 1;
        }
    }
    assert!(searched > 100 && with_slot >= 8, "{searched} {with_slot}");
    for at in copies.path().read_dir().unwrap() {
        let at = at.unwrap().path();
        // The sealed root of the old epoch does not open under what the present slot has.
        if at.join("root-1").exists() {
            let wrong =
                FileRootSlot::create(&at.join("wrong"), slot.keystore_id(), 1, &new_slot.kek().unwrap());
            let error = open_root(&at.join("root-1"), &wrong.unwrap()).err().unwrap();
            assert!(matches!(error, SlotError::Mismatch(_)));
        }
        // Nor do its rows under the present root, and that epoch's rows have nothing of the dead key.
        for epoch in [1, 2] {
            let keys = EpochKeys::derive(&new_root, slot.keystore_id(), epoch).unwrap();
            let store = Store::open(&at.join("db"), keys, false).unwrap();
            match store.scan(Table::Material) {
                Ok(rows) => {
                    assert!(rows.iter().all(|(key, _)| !key.starts_with(victim.as_bytes())));
                    assert!(epoch == 2 || rows.is_empty());
                }
                Err(_) => foreign_rows += 1,
            }
        }
    }
    assert!(
        foreign_rows >= 8,
        "the old rows were there to be tried: {foreign_rows}"
    );

    // The positive control: the same files, and the old slot's content.
    let engine = Engine::open(&copies.path().join("before"), bed.clock.clone()).unwrap();
    assert_eq!(decrypt(&engine, &bed.blobs[&victim]).unwrap(), victim.as_bytes());
    drop(engine);
    let dropped = copies.path().join("SlotGone");
    std::fs::copy(copies.path().join("before/slot-1"), dropped.join("slot-1")).unwrap();
    std::fs::remove_file(dropped.join("slot-2")).unwrap();
    let root = open_root(
        &copies.path().join("before/root-1"),
        &FileRootSlot::open(&dropped.join("slot-1"), 1).unwrap(),
    );
    let keys = EpochKeys::derive(&root.unwrap(), slot.keystore_id(), 1).unwrap();
    let store = Store::open(&dropped.join("db"), keys, false).unwrap();
    let rows = store.scan(Table::Material).unwrap();
    assert!(rows.iter().any(|(_, plain)| plain.as_slice() == material));
}

/// The rows of a dead epoch do not stay in the database's files, sealed as they are.
#[test]
fn the_rows_of_the_old_epoch_leave_the_database_s_files() {
    let mut bed = Bed::new();
    let ids = bed.keys(4);
    bed.doom(&ids[..1]);
    // In files of tables, in the log, and rows of the dead and of the living alike.
    bed.reopen();
    let late = bed.key();
    let rows: Vec<_> = [ids[0], ids[1], late]
        .iter()
        .map(|id| bed.engine().store.raw(Table::Keys, id.as_bytes()))
        .collect();
    let lie_in = |bed: &Bed| {
        let files = files(&bed.home().join("db"));
        let found = |value: &Vec<u8>| files.iter().any(|path| holds(path, value));
        rows.iter().filter(|value| found(value)).count()
    };
    assert_eq!(lie_in(&bed), 3);
    assert_eq!(bed.engine().destroy_due().unwrap().len(), 1);
    assert_eq!(lie_in(&bed), 0);
}

#[test]
fn a_window_must_pass_in_both_clocks() {
    let mut bed = Bed::new();
    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    bed.clock.pass(WEEK_MS - 1);
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    assert_eq!(state(bed.engine(), id), KeyState::PendingDeletion);
    bed.clock.pass(1);
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);

    // A host that was off for a month has observed nothing of it.
    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    bed.engine().close();
    bed.clock.reboot(30 * 24 * HOUR_MS);
    bed.reopen();
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    bed.clock.pass(WEEK_MS - HOUR_MS);
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    bed.clock.pass(HOUR_MS);
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);
}

#[test]
fn time_between_two_runs_counts_within_a_boot_and_time_that_was_not_stored_does_not_over_one() {
    let mut bed = Bed::new();
    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    bed.engine().close();
    bed.engine = None;
    bed.clock.pass(WEEK_MS);
    bed.open();
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);

    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    bed.clock.pass(WEEK_MS - HOUR_MS);
    bed.engine().destroy_due().unwrap();
    // Within ten minutes of it, nothing is stored again; then the power fails.
    bed.clock.pass(HOUR_MS / 12);
    bed.engine().destroy_due().unwrap();
    bed.engine = None;
    bed.clock.reboot(0);
    bed.open();
    bed.clock.pass(HOUR_MS - 1);
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    bed.clock.pass(1);
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);
}

/// The daemon ran for long before it was asked for anything, and dies right after.
#[test]
fn a_window_is_not_longer_for_what_was_observed_before_it() {
    let mut bed = Bed::new();
    let id = bed.key();
    bed.clock.pass(50 * WEEK_MS);
    schedule(bed.engine(), id).unwrap();
    bed.engine = None;
    bed.clock.reboot(HOUR_MS);
    bed.open();
    bed.clock.pass(WEEK_MS - 1);
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    bed.clock.pass(1);
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);
}

#[test]
fn a_clock_that_was_set_suspends_destruction_until_it_is_confirmed() {
    let mut bed = Bed::new();
    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    bed.clock.pass(WEEK_MS);
    bed.clock.set(2 * HOUR_MS as i64);
    for _ in 0..2 {
        assert!(bed.engine().destroy_due().unwrap().is_empty());
        assert!(bed.engine().info().is_suspended);
        assert_eq!(records_of(&bed.home(), "SuspendKeyDestruction"), 1, "said once");
        bed.reopen();
    }
    confirm(bed.engine());
    assert!(!bed.engine().info().is_suspended);
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);
    bed.reopen();
    assert!(!bed.engine().info().is_suspended);
}

/// What setting the clock cannot do, confirmed or not: shorten a window.
#[test]
fn a_clock_set_forward_by_a_week_destroys_nothing_even_if_it_is_confirmed() {
    let mut bed = Bed::new();
    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    bed.clock.set(WEEK_MS as i64);
    confirm(bed.engine());
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    assert_eq!(state(bed.engine(), id), KeyState::PendingDeletion);
    cancel(bed.engine(), id).unwrap();
    bed.check(bed.engine(), &[], "cancelled");
}

#[test]
fn a_key_that_was_scheduled_before_time_was_observed_waits_for_another_week() {
    let mut bed = Bed::new();
    let id = bed.key();
    schedule(bed.engine(), id).unwrap();
    let lock = bed.engine().lock_of(id).unwrap();
    lock.write().delete_observed_ms = None;
    bed.clock.pass(WEEK_MS);
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    let stored = bed
        .engine()
        .store
        .get(Table::Keys, id.as_bytes())
        .unwrap()
        .unwrap();
    let stored = KeyRow::decode(stored.as_slice()).unwrap();
    assert_eq!(
        stored.delete_observed_ms,
        Some(bed.engine().observed_ms() + WEEK_MS)
    );
    bed.clock.pass(WEEK_MS - 1);
    assert!(bed.engine().destroy_due().unwrap().is_empty());
    bed.clock.pass(1);
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);
}

#[test]
fn only_a_keystore_for_drills_lets_its_clock_be_shifted_and_keeps_the_shift() {
    let advance = |engine: &Engine, seconds| {
        run(engine, "AdvanceClock", |call, trail| {
            engine.advance_clock(call, trail, seconds)
        })
    };
    let bed = Bed::new();
    let refused = advance(bed.engine(), 1).unwrap_err();
    assert_eq!(refused.code, Code::NoPermission);
    assert!(!bed.engine().info().manifest.test_clock);

    let home = tempfile::tempdir().unwrap();
    let new = NewKeystore {
        placement: Placement {
            region: "r".to_owned(),
            account: "1".to_owned(),
        },
        keeper: Keeper::File,
        is_drill: true,
    };
    Engine::init_with(home.path(), &new, &*bed.clock).unwrap();
    let engine = Engine::open(home.path(), bed.clock.clone()).unwrap();
    let id = create(&engine);
    schedule(&engine, id).unwrap();
    for seconds in [0, 316_224_001, u64::MAX] {
        assert_eq!(
            advance(&engine, seconds).unwrap_err().code,
            Code::InvalidParameter
        );
    }
    let week = WEEK_MS / 1000;
    let before = bed.clock.now_ms();
    assert_eq!(
        advance(&engine, week - 1).unwrap(),
        before + WEEK_MS as i64 - 1000
    );
    assert!(engine.destroy_due().unwrap().is_empty());
    assert!(!engine.info().is_suspended, "a shift is no jump");
    drop(engine);
    let engine = Engine::open(home.path(), bed.clock.clone()).unwrap();
    assert!(engine.destroy_due().unwrap().is_empty());
    advance(&engine, 1).unwrap();
    assert_eq!(engine.destroy_due().unwrap(), [id]);
    assert!(engine.info().manifest.test_clock);
    assert_eq!(engine.position().epoch, 2, "and the mark goes with it");
}

/// tests/golden/v1, which has neither observed time nor anything else of a ratchet.
#[test]
fn a_keystore_that_version_1_wrote_leaves_a_key_behind() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("home");
    copy(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/home"),
        &home,
    );
    let clock = HostClock::new();
    let engine = Engine::open(&home, clock.clone()).unwrap();
    let enabled: Vec<_> = engine
        .key_ids()
        .into_iter()
        .filter(|&id| state(&engine, id) == KeyState::Enabled)
        .collect();
    let (dies, lives) = (enabled[0], enabled[1]);
    let (dying, living) = (encrypt(&engine, dies), encrypt(&engine, lives));
    schedule(&engine, dies).unwrap();
    clock.pass(WEEK_MS);
    assert!(engine.destroy_due().unwrap().contains(&dies));
    drop(engine);
    let engine = Engine::open(&home, clock).unwrap();
    assert_eq!(decrypt(&engine, &living).unwrap(), lives.as_bytes());
    assert_eq!(decrypt(&engine, &dying).unwrap_err().code, Code::KeyNotFound);
}

#[test]
fn a_key_that_a_session_holds_waits_and_holds_up_no_other() {
    let mut bed = Bed::new();
    let ids = bed.keys(2);
    let pair = KeyPair::generate().unwrap();
    let peer = KeyPair::generate().unwrap().public();
    let session = Session::new(
        pair.agree(Role::Server, [1; 16], peer).unwrap(),
        Owner { uid: 1, pid: 1 },
        0,
    );
    session.note_used([ids[0]].into_iter());
    bed.engine().sessions.insert(session, 0).unwrap();
    bed.doom(&ids);
    assert_eq!(bed.engine().destroy_due().unwrap(), [ids[1]]);
    assert_eq!(state(bed.engine(), ids[0]), KeyState::PendingDeletion);
    let held = bed.engine().fence_holders(&[ids[0]]).unwrap_err();
    assert_eq!(held.code, Code::RevocationIncomplete);
    // Sessions end with the daemon.
    bed.reopen();
    assert_eq!(bed.engine().destroy_due().unwrap(), [ids[0]]);
}

#[test]
fn nothing_is_destroyed_without_a_log() {
    let mut bed = Bed::new();
    let id = bed.key();
    bed.doom(&[id]);
    let (log, aside) = (bed.home().join("audit.log"), bed.home().join("aside"));
    std::fs::rename(&log, &aside).unwrap();
    assert_eq!(
        bed.engine().destroy_due().unwrap_err().code,
        Code::ServiceUnavailable
    );
    assert_eq!(bed.engine().position().epoch, 1);
    std::fs::rename(&aside, &log).unwrap();
    assert_eq!(bed.engine().destroy_due().unwrap(), [id]);
}

/// Calls go on while the keystore moves: reads always, changes when it has.
#[test]
fn survivors_serve_while_the_keystore_moves() {
    let mut bed = Bed::new();
    bed.keys(4);
    let lived = bed.blobs.clone();
    let done = AtomicBool::new(false);
    let mut dead = Vec::new();
    let mut made = Vec::new();
    for _ in 0..10 {
        let doomed = bed.keys(2);
        bed.doom(&doomed);
        dead.extend(doomed);
        done.store(false, Ordering::Relaxed);
        let engine = bed.engine();
        std::thread::scope(|scope| {
            let readers: Vec<_> = lived
                .values()
                .map(|blob| {
                    let done = &done;
                    scope.spawn(move || {
                        let mut count = 0;
                        while !done.load(Ordering::Relaxed) || count == 0 {
                            decrypt(engine, blob).unwrap();
                            count += 1;
                        }
                    })
                })
                .collect();
            let writer = scope.spawn(|| {
                let mut made = Vec::new();
                while !done.load(Ordering::Relaxed) || made.is_empty() {
                    let id = create(engine);
                    let alias = format!("alias/{id}");
                    run(engine, "CreateAlias", |call, trail| {
                        engine.create_alias(call, trail, &alias, &id.to_string())
                    })
                    .unwrap();
                    made.push((id, encrypt(engine, id)));
                    run(engine, "DeleteAlias", |call, trail| {
                        engine.delete_alias(call, trail, &alias)
                    })
                    .unwrap();
                }
                made
            });
            assert_eq!(engine.destroy_due().unwrap().len(), 2);
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().unwrap();
            }
            made.extend(writer.join().unwrap());
        });
    }
    bed.blobs.extend(made);
    for _ in 0..2 {
        bed.check(bed.engine(), &dead, "concurrent");
        assert!(bed.engine().aliases.read().is_empty());
        bed.reopen();
    }
}

#[test]
fn a_slot_a_database_or_both_put_back_as_they_were_stop_the_start() {
    let mut bed = Bed::new();
    let id = bed.key();
    let old = bed.directory.path().join("old");
    bed.engine().close();
    copy(&bed.home(), &old);
    bed.doom(&[id]);
    bed.engine().destroy_due().unwrap();
    bed.engine().close();
    bed.engine = None;
    let attempt = |put_back: &[&str], taken: &[&str]| {
        let home = tempfile::tempdir().unwrap();
        let home = home.path().join("home");
        copy(&bed.home(), &home);
        for name in put_back {
            if home.join(name).is_dir() {
                std::fs::remove_dir_all(home.join(name)).unwrap();
                copy(&old.join(name), &home.join(name));
            } else {
                std::fs::copy(old.join(name), home.join(name)).unwrap();
            }
        }
        for name in taken {
            std::fs::remove_file(home.join(name)).unwrap();
        }
        Engine::open(&home, bed.clock.clone()).map(drop)
    };
    attempt(&[], &[]).unwrap();
    let present = ["slot-2", "root-2"];
    type Expected = fn(&OpenError) -> bool;
    let cases: [(&str, &[&str], &[&str], Expected); 5] = [
        ("database", &["db"], &[], |error| {
            matches!(
                error,
                OpenError::OtherEpoch {
                    slot: 2,
                    store: 1,
                    older: "db/"
                }
            )
        }),
        ("slot", &["slot-1"], &["slot-2"], |error| {
            matches!(error, OpenError::Slot(SlotError::NoRoot { epoch: 1, .. }))
        }),
        ("slot and root", &["slot-1", "root-1"], &present, |error| {
            matches!(
                error,
                OpenError::OtherEpoch {
                    slot: 1,
                    store: 2,
                    older: "the slot"
                }
            )
        }),
        (
            "slot, root and database",
            &["slot-1", "root-1", "db"],
            &present,
            |error| matches!(error, OpenError::RolledBack { .. }),
        ),
        ("log", &["audit.log"], &[], |error| {
            matches!(error, OpenError::Audit(_))
        }),
    ];
    for (what, put_back, taken, expected) in cases {
        let error = attempt(put_back, taken).unwrap_err();
        assert!(expected(&error), "{what}: {error}");
        assert_eq!(error.to_string().lines().count(), 1, "{what}");
    }
    // An old slot beside the present one selects nothing, and is destroyed.
    attempt(&["slot-1", "root-1"], &[]).unwrap();
    // The limit: all of it together is a keystore that knows no better.
    attempt(&["slot-1", "root-1", "db", "audit.log"], &present).unwrap();
}

/// A slot's name alone must not end the one that opens the rows.
#[test]
fn a_slot_of_a_later_epoch_that_opens_nothing_destroys_none() {
    let mut bed = Bed::new();
    bed.key();
    bed.engine = None;
    let slot = std::fs::read(bed.home().join("slot-1")).unwrap();
    for later in [slot.clone(), vec![], b"kmsdslot".to_vec()] {
        std::fs::write(bed.home().join("slot-9"), later).unwrap();
        assert!(Engine::open(&bed.home(), bed.clock.clone()).is_err());
        assert_eq!(std::fs::read(bed.home().join("slot-1")).unwrap(), slot);
    }
    let id = FileRootSlot::open(&bed.home().join("slot-1"), 1)
        .unwrap()
        .keystore_id();
    let kek = kms_crypto::SecretKey::generate().unwrap();
    std::fs::remove_file(bed.home().join("slot-9")).unwrap();
    FileRootSlot::create(&bed.home().join("slot-9"), id, 9, &kek).unwrap();
    assert!(Engine::open(&bed.home(), bed.clock.clone()).is_err());
    crate::slot::seal_root(&bed.home().join("root-9"), (id, 9), &kek, &kek).unwrap();
    let error = Engine::open(&bed.home(), bed.clock.clone()).err().unwrap();
    assert!(
        matches!(
            error,
            OpenError::OtherEpoch {
                slot: 9,
                store: 1,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(std::fs::read(bed.home().join("slot-1")).unwrap(), slot);
    std::fs::remove_file(bed.home().join("slot-9")).unwrap();
    bed.open();
    bed.check(bed.engine(), &[], "spared");
}

#[test]
fn a_passphrase_slot_ratchets_and_its_passphrase_opens_no_other_epoch() {
    let passphrase = |text: &str| {
        let passphrase = Passphrase::new(Zeroizing::new(text.as_bytes().to_vec()));
        Keeper::Passphrase(passphrase.unwrap())
    };
    let right = || passphrase("correct horse");
    let clock = HostClock::new();
    let directory = tempfile::tempdir().unwrap();
    let (home, old) = (directory.path().join("home"), directory.path().join("old"));
    let new = NewKeystore {
        placement: Placement {
            region: "r".to_owned(),
            account: "1".to_owned(),
        },
        keeper: right(),
        is_drill: false,
    };
    Engine::init_with(&home, &new, &*clock).unwrap();
    let wrong = Engine::open_with(&home, passphrase("correct horsf"), clock.clone());
    let error = wrong.err().unwrap();
    assert!(
        matches!(error, OpenError::Slot(SlotError::WrongPassphrase(_))),
        "{error}"
    );
    assert!(matches!(
        Engine::open(&home, clock.clone()),
        Err(OpenError::Slot(SlotError::NeedsPassphrase(_)))
    ));
    let engine = Engine::open_with(&home, right(), clock.clone()).unwrap();
    let (lives, dies) = (create(&engine), create(&engine));
    let (living, dying) = (encrypt(&engine, lives), encrypt(&engine, dies));
    engine.close();
    copy(&home, &old);
    schedule(&engine, dies).unwrap();
    clock.pass(WEEK_MS);
    assert_eq!(engine.destroy_due().unwrap(), [dies]);
    engine.close();
    drop(engine);
    let engine = Engine::open_with(&home, right(), clock.clone()).unwrap();
    assert_eq!(decrypt(&engine, &living).unwrap(), lives.as_bytes());
    assert_eq!(decrypt(&engine, &dying).unwrap_err().code, Code::KeyNotFound);
    assert_eq!(engine.home.slots().unwrap(), [2]);
    drop(engine);

    // The old slot's file and the passphrase do not open the present root, by whatever name.
    let mut stolen = std::fs::read(old.join("slot-1")).unwrap();
    stolen[26..34].copy_from_slice(&2_u64.to_be_bytes());
    let present = std::fs::read(home.join("slot-2")).unwrap();
    std::fs::write(home.join("slot-2"), &stolen).unwrap();
    assert!(Engine::open_with(&home, right(), clock.clone()).is_err());
    std::fs::write(home.join("slot-2"), &present).unwrap();
    let salt = 46..78;
    assert_ne!(present[salt.clone()], stolen[salt]);
    // But with the old database they open what has died since: erasure is none.
    let engine = Engine::open_with(&old, right(), clock).unwrap();
    assert_eq!(decrypt(&engine, &dying).unwrap(), dies.as_bytes());
}
