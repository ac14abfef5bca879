//! Sessions that end while something happens to them.

use super::sessions::{Facts, Mount, Owner, Session, SessionId};
use super::tests::{create, engine, run};
use super::{Call, Engine, Principal};
use crate::fence::{Life, Reach};
use kms_api::Code;
use kms_api::session::{KeyPair, Role};
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
        drain_max_ms: 1,
    }
}

fn open(engine: &Engine, id: [u8; 16], process: Arc<Mortal>) -> Arc<Session> {
    let client = KeyPair::generate().unwrap();
    let key = KeyPair::generate()
        .unwrap()
        .agree(Role::Server, id, client.public())
        .unwrap();
    let session = Session::new(key, facts(), process, 0);
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
