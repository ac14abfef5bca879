//! What mounts report of keys: who may, how much, and what stays.

use super::sessions::{Facts, Owner, Session};
use super::tests::{create, engine, run};
use super::{Call, Engine, Principal, Usage};
use crate::fence::Life;
use crate::rows::DependantRow;
use crate::store::Table;
use kms_api::session::{KeyPair, Role};
use kms_api::{Code, KmsError};
use prost::Message;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

const OWNER: Owner = Owner { uid: 1, pid: 1 };
const VOLUME: Uuid = Uuid::from_bytes([4; 16]);

/// A process that has ended, and left no mount behind.
struct Ended;

impl Life for Ended {
    fn has_exited(&self) -> bool {
        true
    }

    fn kill(&self) -> std::io::Result<()> {
        unreachable!("it has ended")
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        unreachable!("nobody waits here")
    }
}

/// A session for a domain.
pub(super) fn session(engine: &Engine, volume: Uuid, domain: u16) -> Arc<Session> {
    let id = super::fresh_uuid().unwrap().into_bytes();
    let peer = KeyPair::generate().unwrap().public();
    let key = KeyPair::generate()
        .unwrap()
        .agree(Role::Server, id, peer)
        .unwrap();
    let facts = Facts {
        owner: OWNER,
        started_ticks: 1,
        volume,
        domain,
        drain_max_ms: 0,
    };
    let session = Session::new(key, facts, Arc::new(Ended), 0);
    engine.sessions.insert(session, 0).unwrap()
}

pub(super) fn usage(key: &str) -> Usage<'_> {
    Usage {
        key,
        location: "/srv/vault",
        files: 3,
        bytes: 4096,
        removed: false,
    }
}

pub(super) fn report(engine: &Engine, session: &Session, usage: &Usage<'_>) -> Result<(), KmsError> {
    let principal = Principal {
        uid: OWNER.uid,
        gid: 1,
        pid: OWNER.pid,
        exe: String::new(),
    };
    let call = Call::new(principal, "ReportUsage").unwrap();
    engine.report_usage(&call, &session.id, usage)
}

/// What is listed: domain, location, files, and whether it is mounted.
pub(super) fn listed(engine: &Engine, key: Uuid) -> Vec<(u16, String, u64, bool)> {
    let all = run(engine, "ListDependants", |_, trail| {
        engine.list_dependants(trail, &key.to_string())
    });
    let each = all
        .unwrap()
        .into_iter()
        .map(|one| (one.domain, one.row.location, one.row.files, one.is_mounted));
    each.collect()
}

fn records(home: &Path) -> usize {
    super::destruction_tests::records_of(home, "ReportUsage")
}

#[test]
fn the_first_report_of_a_domain_and_its_removal_are_audited_and_no_other() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let key = create(&engine);
    let name = key.to_string();
    let (first, second) = (session(&engine, VOLUME, 0), session(&engine, VOLUME, 9));
    let removed = Usage {
        removed: true,
        ..usage(&name)
    };
    report(&engine, &first, &removed).unwrap();
    assert_eq!(records(home.path()), 0, "there was nothing");
    for files in 0..5 {
        let usage = Usage {
            files,
            ..usage(&name)
        };
        report(&engine, &first, &usage).unwrap();
        assert_eq!(listed(&engine, key), [(0, "/srv/vault".to_owned(), files, false)]);
    }
    assert_eq!(records(home.path()), 1);
    let elsewhere = Usage {
        location: "/mnt/vault",
        ..usage(&name)
    };
    report(&engine, &first, &elsewhere).unwrap();
    report(&engine, &second, &elsewhere).unwrap();
    assert_eq!(records(home.path()), 2);
    engine.register(&second, &BTreeSet::from([key])).unwrap();
    let there = "/mnt/vault".to_owned();
    assert_eq!(
        listed(&engine, key),
        [(0, there.clone(), 3, false), (9, there.clone(), 3, true)]
    );
    report(&engine, &first, &removed).unwrap();
    report(&engine, &first, &removed).unwrap();
    assert_eq!(records(home.path()), 3);
    assert_eq!(listed(&engine, key), [(9, there, 3, true)]);
    assert_eq!(listed(&engine, create(&engine)), []);
}

#[test]
fn who_may_not_use_the_key_reports_nothing_of_it() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let key = create(&engine);
    let name = key.to_string();
    let (holder, other) = (session(&engine, VOLUME, 0), session(&engine, VOLUME, 1));
    engine.register(&holder, &BTreeSet::from([key])).unwrap();
    let code =
        |session: &Session, usage: &Usage<'_>| report(&engine, session, usage).err().map(|error| error.code);
    run(&engine, "CreateAlias", |call, trail| {
        engine.create_alias(call, trail, "alias/name", &name)
    })
    .unwrap();
    for unknown in ["alias/name", "", &Uuid::nil().to_string()] {
        assert_eq!(
            code(&holder, &usage(unknown)),
            Some(Code::KeyNotFound),
            "{unknown}"
        );
    }
    let long = "x".repeat(4097);
    for (location, expected) in [
        ("", Some(Code::InvalidParameter)),
        (&long, Some(Code::InvalidParameter)),
        (&long[1..], None),
    ] {
        let usage = Usage {
            location,
            ..usage(&name)
        };
        assert_eq!(code(&other, &usage), expected, "{} bytes", location.len());
    }
    assert_eq!(code(&other, &usage(&engine.arn(key))), None);
    let of_nobody = session(&super::tests::engine(&home.path().join("other")), VOLUME, 0);
    assert_eq!(code(&of_nobody, &usage(&name)), Some(Code::SessionNotFound));

    // A holder goes on when the key is disabled: it is to be known what is dark. Its process has ended, so that nobody waits.
    engine
        .lock_of(key)
        .unwrap()
        .write()
        .set_state(kms_api::proto::KeyState::Disabled);
    assert_eq!(code(&holder, &usage(&name)), None);
    assert_eq!(code(&other, &usage(&name)), Some(Code::Disabled));
    let removed = Usage {
        removed: true,
        ..usage(&name)
    };
    assert_eq!(code(&other, &removed), Some(Code::Disabled));
    assert_eq!(listed(&engine, key).len(), 2);

    // Once it is destroyed, what depended on it stays as it was.
    engine
        .lock_of(key)
        .unwrap()
        .write()
        .set_state(kms_api::proto::KeyState::Destroyed);
    let before = listed(&engine, key);
    let less = Usage {
        files: 0,
        bytes: 0,
        ..usage(&name)
    };
    assert_eq!((code(&holder, &less), code(&holder, &removed)), (None, None));
    assert_eq!(code(&other, &removed), Some(Code::KeyNotFound));
    assert_eq!(listed(&engine, key), before);
}

#[test]
fn one_key_has_4096_dependants_at_most() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let (full, empty) = (create(&engine), create(&engine));
    let mut change = engine.store.begin();
    for domain in 0..4096_u16 {
        let name = [
            full.as_bytes().as_slice(),
            VOLUME.as_bytes(),
            &domain.to_be_bytes(),
        ];
        let row = DependantRow::default().encode_to_vec();
        change.put(Table::Dependants, &name.concat(), &row).unwrap();
    }
    change.commit(false).unwrap();
    let (known, new) = (session(&engine, VOLUME, 4095), session(&engine, VOLUME, 4096));
    let name = full.to_string();
    let refused = report(&engine, &new, &usage(&name)).unwrap_err();
    assert_eq!(refused.code, Code::LimitExceeded);
    report(&engine, &known, &usage(&name)).unwrap();
    report(&engine, &new, &usage(&empty.to_string())).unwrap();
    let removed = Usage {
        removed: true,
        ..usage(&name)
    };
    report(&engine, &known, &removed).unwrap();
    report(&engine, &new, &usage(&name)).unwrap();
    assert_eq!(listed(&engine, full).len(), 4096);
}
