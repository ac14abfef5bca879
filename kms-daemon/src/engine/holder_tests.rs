//! Sessions that end while something happens to them.

use super::sessions::{Facts, Mount, Owner, Session, SessionId};
use super::tests::{create, engine, run};
use super::{Call, Engine, Principal};
use crate::fence::{Life, Reach};
use crate::rows::HolderRow;
use crate::store::Table;
use kms_api::Code;
use kms_api::session::{KeyPair, Role};
use prost::Message;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use uuid::Uuid;

const OWNER: Owner = Owner { uid: 1, pid: 1 };
const MINOR: u32 = 4_000_000;

/// A process that ends when it is told to.
#[derive(Default)]
struct Mortal(AtomicBool);

impl Life for Mortal {
    fn has_exited(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn kill(&self) -> std::io::Result<()> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        unreachable!("nobody waits here")
    }
}

/// A mount that stays, and whose pages the kernel does not drop.
struct Stubborn;

impl Reach for Stubborn {
    fn invalidate(&self) -> Result<(), String> {
        Err("busy".to_owned())
    }

    fn abort(&self) -> Result<(), String> {
        Ok(())
    }

    fn is_gone(&self) -> bool {
        false
    }
}

fn facts() -> Facts {
    Facts {
        owner: OWNER,
        started_ticks: 1,
        volume: Uuid::nil(),
        domain: 0,
        drain_max_ms: 1,
    }
}

fn open(engine: &Engine, id: [u8; 16], process: Arc<Mortal>) -> Arc<Session> {
    open_as(engine, id, process, facts())
}

fn open_as(engine: &Engine, id: [u8; 16], process: Arc<Mortal>, facts: Facts) -> Arc<Session> {
    let client = KeyPair::generate().unwrap();
    let key = KeyPair::generate()
        .unwrap()
        .agree(Role::Server, id, client.public())
        .unwrap();
    let session = Session::new(key, facts, process, 0);
    engine.sessions.insert(session, 0).unwrap()
}

fn owners_call() -> Call {
    let principal = Principal {
        uid: OWNER.uid,
        gid: 1,
        pid: OWNER.pid,
        exe: String::new(),
    };
    Call::new(principal, "CloseSession").unwrap()
}

#[test]
fn a_session_closed_while_its_mount_is_there_is_a_holder_until_that_is_gone() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let key = create(&engine);
    let session = open(&engine, [1; 16], Arc::default());
    engine.register(&session, &BTreeSet::from([key])).unwrap();
    engine
        .attach((OWNER.uid, OWNER.pid), &session.id, MINOR, Arc::new(Stubborn))
        .unwrap();
    engine.close_session(&owners_call(), &session.id).unwrap();
    assert_eq!(engine.sessions.holders(Some(key)).len(), 1);
    session.set_mount(Mount::default());
    engine.close_session(&owners_call(), &session.id).unwrap();
    assert!(engine.sessions.holders(Some(key)).is_empty());
    assert!(engine.register(&session, &BTreeSet::from([key])).is_err());
}

/// A mount that stays, and whose pages the kernel drops.
struct Willing;

impl Reach for Willing {
    fn invalidate(&self) -> Result<(), String> {
        Ok(())
    }

    fn abort(&self) -> Result<(), String> {
        Ok(())
    }

    fn is_gone(&self) -> bool {
        false
    }
}

#[test]
fn a_key_domain_that_is_given_up_holds_nothing_and_ends_no_mount() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let key = create(&engine);
    let of_domain = Facts { domain: 3, ..facts() };
    let mounts: [Arc<dyn Reach>; 2] = [Arc::new(Willing), Arc::new(Stubborn)];
    for (number, mount) in (1..).zip(mounts) {
        let process = Arc::new(Mortal::default());
        let session = open_as(&engine, [number; 16], Arc::clone(&process), of_domain.clone());
        engine.register(&session, &BTreeSet::from([key])).unwrap();
        engine
            .attach((OWNER.uid, OWNER.pid), &session.id, MINOR, mount)
            .unwrap();
        engine.close_session(&owners_call(), &session.id).unwrap();
        assert!(!process.has_exited());
        // What the kernel does not drop, a revocation has to see to.
        assert_eq!(session.is_over(), number == 1);
        assert_eq!(engine.sessions.holders(Some(key)).len(), usize::from(number) - 1);
    }
}

/// The descriptors of a mount that is gone. While they say so, others are attached to the session.
struct Parting {
    engine: Weak<Engine>,
    session: SessionId,
}

impl Reach for Parting {
    fn invalidate(&self) -> Result<(), String> {
        Ok(())
    }

    fn abort(&self) -> Result<(), String> {
        Ok(())
    }

    fn is_gone(&self) -> bool {
        let engine = self.engine.upgrade().unwrap();
        let owner = (OWNER.uid, OWNER.pid);
        engine
            .attach(owner, &self.session, MINOR, Arc::new(Stubborn))
            .unwrap();
        true
    }
}

#[test]
fn what_a_session_takes_over_as_its_process_ends_does_not_end_with_it() {
    let home = tempfile::tempdir().unwrap();
    let engine = Arc::new(engine(home.path()));
    let key = create(&engine);
    let mount = Mount {
        minor: Some(MINOR),
        reach: None,
    };
    let left = Session::left_behind([1; 16], facts(), None, BTreeSet::from([key]), mount);
    engine.sessions.insert(left, 0).unwrap();
    let process = Arc::new(Mortal::default());
    let session = open(&engine, [2; 16], Arc::clone(&process));
    session.set_mount(Mount {
        minor: Some(MINOR + 1),
        reach: Some(Arc::new(Parting {
            engine: Arc::downgrade(&engine),
            session: session.id,
        })),
    });
    process.kill().unwrap();
    assert!(!engine.process_exited(session.id));
    assert_eq!(engine.sessions.holders(Some(key)).len(), 1);
    let revoked = run(&engine, "DisableKey", |call, trail| {
        engine.disable_key(call, trail, &key.to_string())
    });
    assert_eq!(revoked.unwrap_err().code, Code::RevocationIncomplete);
}

/// A mount has a session for each domain that it serves, and hands over the same device with each.
#[test]
fn each_domain_s_session_takes_over_what_was_its_own_and_is_named() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let of = |domain| Facts { domain, ..facts() };
    let keys = [0_u16, 7].map(|domain| (domain, create(&engine)));
    let mount = Mount {
        minor: Some(MINOR),
        reach: None,
    };
    for (domain, key) in keys {
        let id = [domain as u8 + 1; 16];
        let left = Session::left_behind(id, of(domain), None, BTreeSet::from([key]), mount.clone());
        engine.sessions.insert(left, 0).unwrap();
    }
    let process = Arc::new(Mortal::default());
    for (at, (domain, key)) in keys.into_iter().enumerate() {
        let id = [domain as u8 + 100; 16];
        let session = open_as(&engine, id, Arc::clone(&process), of(domain));
        engine
            .attach((OWNER.uid, OWNER.pid), &session.id, MINOR, Arc::new(Stubborn))
            .unwrap();
        assert_eq!(session.used(), BTreeSet::from([key]));
        let left = engine.sessions.holders(None);
        let left = left.iter().filter(|held| held.is_left_behind()).count();
        assert_eq!(left, 1 - at);
    }
    let rows = engine.store.scan(Table::Holders).unwrap();
    let mut domains: Vec<_> = rows
        .iter()
        .map(|(_, plain)| HolderRow::decode(plain.as_slice()).unwrap().domain)
        .collect();
    domains.sort_unstable();
    assert_eq!(domains, [0, 7]);
    // Each answers for its own key alone, and is named by its domain.
    process.kill().unwrap();
    for (domain, key) in keys {
        let revoked = run(&engine, "DisableKey", |call, trail| {
            engine.disable_key(call, trail, &key.to_string())
        });
        let message = revoked.unwrap_err().message;
        assert_eq!(message.matches("process 1 of uid 1").count(), 1, "{message}");
        assert_eq!(message.contains(", domain 7, device"), domain == 7, "{message}");
    }
}

#[test]
fn a_row_of_a_domain_that_cannot_be_stops_the_start() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let boot_id = engine.boot_id.clone();
    let load = |domain| {
        let row = HolderRow {
            session_id: vec![1; 16],
            volume: vec![2; 16],
            boot_id: boot_id.clone(),
            pid: i32::MAX,
            domain,
            ..HolderRow::default()
        };
        let mut change = engine.store.begin();
        change
            .put(Table::Holders, &[1; 16], &row.encode_to_vec())
            .unwrap();
        change.commit(false).unwrap();
        super::holders::load(&engine.store, &boot_id, |_| None)
    };
    let sessions = load(65_535).unwrap();
    assert_eq!(sessions.any([1; 16]).unwrap().facts.domain, 65_535);
    assert!(load(65_536).is_err());
}
