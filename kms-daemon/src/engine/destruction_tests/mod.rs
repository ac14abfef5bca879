//! What dies is dead at every step, and what lives survives every step.

mod files;
mod steps;
mod time;

use super::sessions::{Facts, Mount, Owner, Session};
use super::tests::{create, row, run};
use super::{Action, Engine, NewKeystore, OpenError, Placement, Release, Request};
use crate::clock::Clock;
use crate::epoch::EpochKeys;
use crate::fence::{Life, Reach};
use crate::ratchet::Step;
use crate::rows::KeyRow;
use crate::slot::{FileRootSlot, Keeper, Passphrase, RootSlot, SlotError, open_root};
use crate::store::{Store, Table};
use kms_api::proto::KeyState;
use kms_api::session::{KeyPair, Role};
use kms_api::{Code, KmsError};
use parking_lot::Mutex;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
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
    let pending = row(engine, ids[0]);
    engine.destroy_due().unwrap();
    let tombstone = row(engine, ids[0]);
    assert_eq!(tombstone.state(), KeyState::Destroyed);
    assert_eq!(tombstone.destroyed_ms, Some(bed.clock.now_ms()));
    assert_eq!(tombstone.delete_observed_ms, None);
    assert_eq!(tombstone.delete_ms, pending.delete_ms);
    assert!(pending.scheduled_ms.is_some() && tombstone.scheduled_ms == pending.scheduled_ms);
    assert_eq!((pending.left_epoch, tombstone.left_epoch), (None, Some(1)));
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
    bed.doom(&ids);
    hold(bed.engine(), ids[0]);
    assert_eq!(bed.engine().destroy_due().unwrap(), [ids[1]]);
    assert_eq!(state(bed.engine(), ids[0]), KeyState::PendingDeletion);
    // Such a session ends with the daemon, having no row.
    bed.reopen();
    assert_eq!(bed.engine().destroy_due().unwrap(), [ids[0]]);
}

/// Has a process hold a key that has ended, and left a mount behind that cannot be reached.
fn hold(engine: &Engine, id: Uuid) {
    let session = open_session(engine, id, Arc::new(Ended));
    session.add_used(&BTreeSet::from([id]), |_| Ok(())).unwrap();
    session.set_mount(Mount {
        minor: None,
        reach: Some(Arc::new(Unreachable)),
    });
}

fn open_session(engine: &Engine, volume: Uuid, process: Arc<dyn Life>) -> Arc<Session> {
    let pair = KeyPair::generate().unwrap();
    let peer = KeyPair::generate().unwrap().public();
    let facts = Facts {
        owner: Owner { uid: 1, pid: 1 },
        started_ticks: 1,
        volume,
        domain: 0,
        drain_max_ms: 0,
    };
    let key = pair.agree(Role::Server, [1; 16], peer).unwrap();
    let session = Session::new(key, facts, process, 0);
    engine.sessions.insert(session, 0).unwrap()
}

struct Ended;

impl Life for Ended {
    fn has_exited(&self) -> bool {
        true
    }

    fn kill(&self) -> io::Result<()> {
        unreachable!("it has ended")
    }

    fn descriptor(&self) -> std::os::fd::BorrowedFd<'_> {
        unreachable!("nobody waits for it")
    }
}

struct Unreachable;

impl Reach for Unreachable {
    fn invalidate(&self) -> Result<(), String> {
        Ok(())
    }

    fn abort(&self) -> Result<(), String> {
        Err("there is no fusectl".to_owned())
    }

    fn is_gone(&self) -> bool {
        false
    }
}
