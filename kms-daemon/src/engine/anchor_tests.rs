//! Anchors: who may move them, from where, and what stays.

use super::dependants_tests::session;
use super::sessions::Session;
use super::tests::{engine, reopened};
use super::{Anchor, Call, Engine, Move, Principal};
use kms_api::{Code, KmsError};
use std::collections::BTreeMap;
use uuid::Uuid;

const VOLUME: Uuid = Uuid::from_bytes([4; 16]);
const KEY: Uuid = Uuid::from_bytes([5; 16]);

fn call(session: &Session, operation: &'static str) -> Call {
    let owner = session.facts.owner;
    let principal = Principal {
        uid: owner.uid,
        gid: 1,
        pid: owner.pid,
        exe: String::new(),
    };
    Call::new(principal, operation).unwrap()
}

fn anchor(commit_seq: u64, mac: u8) -> Anchor {
    Anchor {
        commit_seq,
        mac: vec![mac; 32],
        ino_limit: commit_seq * 10,
    }
}

fn advance(engine: &Engine, session: &Session, from: Option<&Anchor>, to: &Anchor) -> Result<(), KmsError> {
    engine.move_anchor(&call(session, "AdvanceAnchor"), &session.id, Move::From(from), to)
}

fn accept(engine: &Engine, session: &Session, to: &Anchor) -> Result<(), KmsError> {
    engine.move_anchor(&call(session, "AcceptRestore"), &session.id, Move::Restored, to)
}

fn found(engine: &Engine, session: &Session) -> Option<Anchor> {
    engine
        .get_anchor(&call(session, "GetAnchor"), &session.id)
        .unwrap()
}

fn code<T>(result: Result<T, KmsError>) -> Code {
    result.err().unwrap().code
}

/// A session that was given the volume key of its domain.
fn with_volume_key(engine: &Engine, domain: u16) -> std::sync::Arc<Session> {
    let session = session(engine, VOLUME, domain);
    let context = [
        ("purpose", "vk".to_owned()),
        ("volume", VOLUME.simple().to_string()),
        ("domain", domain.to_string()),
    ];
    session.note_volume_key(&context.map(|(name, value)| (name.to_owned(), value)).into(), KEY);
    session
}

#[test]
fn an_anchor_moves_forward_from_where_its_mount_knows_it() {
    let home = tempfile::tempdir().unwrap();
    let (one, two, three) = (anchor(1, 1), anchor(2, 2), anchor(3, 3));
    let seq = {
        let engine = engine(home.path());
        let session = with_volume_key(&engine, 0);
        assert_eq!(found(&engine, &session), None);
        assert_eq!(
            code(advance(&engine, &session, Some(&one), &two)),
            Code::AnchorConflict
        );
        advance(&engine, &session, None, &one).unwrap();
        let before = engine.position().state_seq;
        advance(&engine, &session, Some(&one), &two).unwrap();
        // Every mount would have to remember another's.
        assert_eq!(engine.position().state_seq, before);
        // An answer that was lost, and another's history.
        advance(&engine, &session, Some(&one), &two).unwrap();
        assert_eq!(
            code(advance(&engine, &session, Some(&one), &three)),
            Code::AnchorConflict
        );
        assert_eq!(
            code(advance(&engine, &session, None, &three)),
            Code::AnchorConflict
        );
        assert_eq!(
            code(advance(&engine, &session, Some(&two), &one)),
            Code::AnchorConflict
        );
        assert_eq!(
            code(advance(&engine, &session, Some(&two), &anchor(2, 9))),
            Code::AnchorConflict
        );
        // Of another domain nothing is known.
        assert_eq!(found(&engine, &with_volume_key(&engine, 7)), None);
        engine.position().state_seq
    };
    let engine = reopened(home.path());
    let session = with_volume_key(&engine, 0);
    assert_eq!(found(&engine, &session), Some(two.clone()));
    assert_eq!(engine.position().state_seq, seq);
    advance(&engine, &session, Some(&two), &three).unwrap();
}

#[test]
fn a_restored_volume_begins_anew_and_no_inode_number_is_forgotten() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let session = with_volume_key(&engine, 0);
    advance(&engine, &session, None, &anchor(9, 1)).unwrap();
    accept(&engine, &session, &anchor(3, 2)).unwrap();
    let kept = found(&engine, &session).unwrap();
    assert_eq!((kept.commit_seq, kept.ino_limit), (3, 90));
    advance(&engine, &session, Some(&anchor(3, 2)), &anchor(4, 2)).unwrap();
    assert_eq!(
        super::destruction_tests::records_of(home.path(), "AcceptRestore"),
        1
    );
    assert_eq!(
        super::destruction_tests::records_of(home.path(), "AdvanceAnchor"),
        1
    );
}

#[test]
fn only_a_session_that_was_given_the_volume_key_has_an_anchor() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path());
    let claims = session(&engine, VOLUME, 0);
    let asked = engine.get_anchor(&call(&claims, "GetAnchor"), &claims.id);
    assert_eq!(code(asked), Code::NoPermission);
    assert_eq!(
        code(advance(&engine, &claims, None, &anchor(1, 1))),
        Code::NoPermission
    );
    assert_eq!(code(accept(&engine, &claims, &anchor(1, 1))), Code::NoPermission);
    // That of another volume, of another domain, or a file's, is not it.
    let context = |purpose: &str, volume: &str, domain: &str| -> BTreeMap<String, String> {
        let entries = [("purpose", purpose), ("volume", volume), ("domain", domain)];
        entries
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into()
    };
    let volume = VOLUME.simple().to_string();
    for other in [
        context("vk", &"05".repeat(16), "0"),
        context("vk", &volume, "1"),
        context("dek", &volume, "0"),
    ] {
        claims.note_volume_key(&other, KEY);
        assert_eq!(claims.volume_key(), None);
    }
    claims.note_volume_key(&context("vk", &volume, "0"), KEY);
    advance(&engine, &claims, None, &anchor(1, 1)).unwrap();
    let short = Anchor {
        mac: vec![1; 31],
        ..anchor(2, 1)
    };
    assert_eq!(
        code(advance(&engine, &claims, Some(&anchor(1, 1)), &short)),
        Code::InvalidParameter
    );
    // A key that somebody had made under another CMK, and said to be this volume's.
    claims.note_volume_key(&context("vk", &volume, "0"), Uuid::from_bytes([6; 16]));
    assert_eq!(
        code(engine.get_anchor(&call(&claims, "GetAnchor"), &claims.id)),
        Code::NoPermission
    );
    assert_eq!(code(accept(&engine, &claims, &anchor(1, 1))), Code::NoPermission);
    // What was refused is recorded: by those who had no key, and by the last.
    assert_eq!(
        super::destruction_tests::records_of(home.path(), "AcceptRestore"),
        2
    );
}
