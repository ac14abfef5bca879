//! What only the inside of the engine shows: its clock, its caches, its rows.

use super::keys::material_key;
use super::{CHECKPOINT_RECORDS, Call, Engine, NewKey, OpenError, Placement, Principal, Trail};
use crate::audit::AuditError;
use crate::clock::Clock;
use crate::rows::KeyRow;
use crate::store::{StoreError, Table};
use kms_api::proto::KeyState;
use kms_api::{Code, KmsError};
use prost::Message;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use uuid::Uuid;

struct TestClock(AtomicI64);

impl Clock for TestClock {
    fn now_ms(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    fn boot_ms(&self) -> u64 {
        self.now_ms().unsigned_abs()
    }

    fn is_test(&self) -> bool {
        true
    }
}

fn clock() -> Arc<TestClock> {
    Arc::new(TestClock(AtomicI64::new(1_000_000_000_000)))
}

pub(super) fn engine(home: &Path) -> Engine {
    let placement = Placement {
        region: "r".to_owned(),
        account: "1".to_owned(),
    };
    Engine::init(home, &placement, &crate::SystemClock).unwrap();
    reopened(home)
}

pub(super) fn reopened(home: &Path) -> Engine {
    Engine::open(home, clock()).unwrap()
}

pub(super) fn call(operation: &'static str) -> Call {
    let principal = Principal {
        uid: 1,
        gid: 1,
        pid: 1,
        exe: String::new(),
    };
    Call::new(principal, operation).unwrap()
}

/// One call, as an adapter makes it.
pub(super) fn run<T>(
    engine: &Engine,
    operation: &'static str,
    f: impl FnOnce(&Call, &mut Trail) -> Result<T, KmsError>,
) -> Result<T, KmsError> {
    let call = call(operation);
    engine.run(&call, |trail| f(&call, trail))
}

pub(super) fn create(engine: &Engine) -> Uuid {
    let row = run(engine, "CreateKey", |call, trail| {
        engine.create_key(call, trail, &NewKey::default())
    });
    Uuid::from_slice(&row.unwrap().key_id).unwrap()
}

pub(super) fn row(engine: &Engine, id: Uuid) -> KeyRow {
    engine.lock_of(id).unwrap().read().clone()
}

#[test]
fn a_clock_that_can_be_shifted_marks_the_keystore_for_ever() {
    let home = tempfile::tempdir().unwrap();
    let clock = clock();
    drop(engine(home.path()));
    let engine = Engine::open(home.path(), clock.clone()).unwrap();
    let id = create(&engine);
    let due = run(&engine, "ScheduleKeyDeletion", |call, trail| {
        engine.schedule_key_deletion(call, trail, &id.to_string(), 7)
    });
    let week_ms = 7 * 24 * 3600 * 1000;
    assert_eq!(due.unwrap(), clock.now_ms() + week_ms);
    clock.0.fetch_add(week_ms + 1, Ordering::Relaxed);
    drop(engine);
    let engine = Engine::open(home.path(), Arc::new(crate::SystemClock)).unwrap();
    assert_eq!(row(&engine, id).state(), KeyState::PendingDeletion);
    assert!(engine.manifest.lock().test_clock);
}

#[test]
fn material_is_cached_while_enabled_and_never_written_in_the_clear() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let id = create(&engine);
    let version = Uuid::from_slice(&row(&engine, id).primary_version).unwrap();
    let material = *engine.material(id, version).unwrap().expose();
    assert_eq!(engine.materials.lock().len(), 1);
    run(&engine, "DisableKey", |call, trail| {
        engine.disable_key(call, trail, &id.to_string())
    })
    .unwrap();
    assert_eq!(engine.materials.lock().len(), 0);
    engine.close();
    drop(engine);

    let mut slot_key = std::fs::read(home.path().join("slot-1")).unwrap();
    let slot_key = slot_key.split_off(slot_key.len() - 32);
    let (mut clear, mut slots) = (0, 0);
    let files = home.path().read_dir().unwrap();
    for entry in files.chain(home.path().join("db").read_dir().unwrap()) {
        let content = std::fs::read(entry.unwrap().path()).unwrap_or_default();
        let holds = |needle: &[u8]| content.windows(32).any(|window| window == needle);
        clear += usize::from(holds(&material));
        slots += usize::from(holds(&slot_key));
    }
    assert_eq!((clear, slots), (0, 1), "the slot's key lies in the slot alone");
}

/// Every row passes its tag here: only the manifest knows better.
#[test]
fn a_row_put_back_or_taken_away_stops_the_start() {
    type Tampering = fn(&mut crate::store::Change<'_>, Uuid, &KeyRow) -> Result<(), StoreError>;
    let tamperings: [Tampering; 3] = [
        |batch, id, old| batch.put(Table::Keys, id.as_bytes(), &old.encode_to_vec()),
        |batch, id, _| batch.delete(Table::Keys, id.as_bytes()),
        |batch, id, old| {
            let version = Uuid::from_slice(&old.primary_version).unwrap();
            batch.put(Table::Material, &material_key(id, version), &[0; 32])
        },
    ];
    for tampering in tamperings {
        let home = tempfile::tempdir().unwrap();
        let engine = engine(home.path());
        let id = create(&engine);
        let enabled = row(&engine, id);
        run(&engine, "DisableKey", |call, trail| {
            engine.disable_key(call, trail, &id.to_string())
        })
        .unwrap();
        let mut batch = engine.store.begin();
        tampering(&mut batch, id, &enabled).unwrap();
        batch.commit(true).unwrap();
        drop(engine);
        let opened = Engine::open(home.path(), clock());
        assert!(matches!(opened, Err(OpenError::Store(StoreError::RowSet))));
    }
}

#[test]
fn a_panic_is_one_call_s_failure_and_is_recorded() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let before = engine.audit.durable().records;
    let outcome = run(&engine, "Decrypt", |_, _| -> Result<(), KmsError> {
        panic!("a fault")
    });
    assert_eq!(outcome.unwrap_err().code, Code::InternalFailure);
    assert_eq!(engine.audit.durable().records, before + 1);
    create(&engine);
}

#[test]
fn a_log_that_is_cut_behind_a_checkpoint_stops_the_start() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let log = home.path().join("audit.log");
    let early = log.metadata().unwrap().len();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..=CHECKPOINT_RECORDS / 16 {
                    run(&engine, "ListKeys", |_, _| Ok(())).unwrap();
                }
            });
        }
    });
    // No clean stop: the checkpoint that was written on the way has to do.
    drop(engine);
    let file = std::fs::OpenOptions::new().write(true).open(&log).unwrap();
    file.set_len(early).unwrap();
    let opened = Engine::open(home.path(), clock());
    assert!(matches!(opened, Err(OpenError::Audit(AuditError::Cut { .. }))));
}

/// Copies the files of a database.
fn copy_database(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_database_put_back_beside_its_log_stops_the_start() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let id = create(&engine);
    let (db, old) = (home.path().join("db"), home.path().join("old"));
    copy_database(&db, &old);
    run(&engine, "DisableKey", |call, trail| {
        engine.disable_key(call, trail, &id.to_string())
    })
    .unwrap();
    drop(engine);
    std::fs::remove_dir_all(&db).unwrap();
    std::fs::rename(&old, &db).unwrap();
    let opened = Engine::open(home.path(), clock());
    assert!(
        matches!(opened, Err(OpenError::RolledBack { missing: 1 })),
        "{:?}",
        opened.err()
    );
}

#[test]
fn a_change_that_is_logged_as_a_failure_is_logged_again_by_the_next_start() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let call = call("EnableKey");
    // What a sync that failed behind a write that did not leaves: a pending record, and a failure told to the caller.
    let pending = call.record(1, &Trail::default(), None).encode_to_vec();
    let mut change = engine.store.begin();
    change
        .put(Table::PendingAudit, call.request_id.as_bytes(), &pending)
        .unwrap();
    change.commit(true).unwrap();
    let failure = call.record(1, &Trail::default(), Some(Code::InternalFailure));
    engine.record(&failure).unwrap();
    let before = engine.audit.durable().records;
    drop(engine);
    let engine = Engine::open(home.path(), clock()).unwrap();
    assert_eq!(engine.audit.durable().records, before + 1);
    assert!(engine.store.scan(Table::PendingAudit).unwrap().is_empty());
}

#[test]
fn events_come_in_the_order_of_their_epochs_and_carry_their_own() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let keys: Vec<_> = (0..4).map(|_| create(&engine)).collect();
    let mut events = engine.watch();
    std::thread::scope(|scope| {
        for id in &keys {
            scope.spawn(|| {
                for operation in ["DisableKey", "EnableKey"].repeat(8) {
                    run(&engine, operation, |call, trail| match operation {
                        "DisableKey" => engine.disable_key(call, trail, &id.to_string()),
                        _ => engine.enable_key(call, trail, &id.to_string()),
                    })
                    .unwrap();
                }
            });
        }
    });
    let mut last = 0;
    while let Ok(event) = events.try_recv() {
        let own = u64::from(event.state == KeyState::Disabled);
        assert_eq!(event.revocation_epoch, last + own);
        last = event.revocation_epoch;
    }
    assert_eq!(last, 4 * 8);
}
