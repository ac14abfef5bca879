//! Material from outside: what is taken, what is refused, and that what is deleted is gone.

use super::destruction_tests::{
    Bed, HOUR_MS, WEEK_MS, cancel, copy, decrypt, encrypt, records_of, schedule, state,
};
use super::tests::{create, row, run};
use super::{Engine, NewKey};
use crate::clock::Clock;
use crate::ratchet::Step;
use crate::rows::KeyRow;
use crate::store::Table;
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use kms_api::proto::KeyState;
use kms_api::{Code, KmsError};
use uuid::Uuid;

const MATERIAL: [u8; 32] = [0xa7; 32];

fn external(engine: &Engine) -> Uuid {
    let new = NewKey {
        origin: "EXTERNAL".to_owned(),
        ..NewKey::default()
    };
    let made = run(engine, "CreateKey", |call, trail| {
        engine.create_key(call, trail, &new)
    });
    Uuid::from_slice(&made.unwrap().key_id).unwrap()
}

/// What an owner of material does with the answer of GetParametersForImport.
fn wrap(public_key: &[u8], material: &[u8]) -> Vec<u8> {
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(public_key).unwrap()).unwrap();
    let mut out = vec![0; key.ciphertext_size()];
    key.encrypt(&OAEP_SHA256_MGF1SHA256, material, &mut out, None)
        .unwrap();
    out
}

fn offer(engine: &Engine, id: Uuid) -> Result<(Vec<u8>, Vec<u8>), KmsError> {
    let offered = run(engine, "GetParametersForImport", |_, trail| {
        engine.get_parameters_for_import(trail, &id.to_string(), "", "")
    })?;
    Ok((offered.public_key, offered.token))
}

fn take(engine: &Engine, id: Uuid, encrypted: &[u8], token: &[u8], expire: u64) -> Result<(), KmsError> {
    run(engine, "ImportKeyMaterial", |call, trail| {
        engine.import_key_material(call, trail, &id.to_string(), (encrypted, token), expire)
    })
}

fn import(engine: &Engine, id: Uuid, material: &[u8], expire: u64) -> Result<(), KmsError> {
    let (public_key, token) = offer(engine, id)?;
    take(engine, id, &wrap(&public_key, material), &token, expire)
}

fn delete(engine: &Engine, id: Uuid) -> Result<(), KmsError> {
    let call = super::Call::new(
        super::Principal {
            uid: 1,
            gid: 1,
            pid: 1,
            exe: String::new(),
        },
        "DeleteKeyMaterial",
    );
    engine.delete_key_material(&call.unwrap(), &id.to_string())
}

/// Which parameter a refusal names.
fn named<T>(outcome: Result<T, KmsError>) -> String {
    let error = outcome.err().unwrap();
    assert_eq!(error.code, Code::InvalidParameter, "{error}");
    error.message.split(' ').next().unwrap().to_owned()
}

#[test]
fn imported_material_works_goes_and_comes_back() {
    let mut bed = Bed::new();
    let other = create(bed.engine());
    let others = encrypt(bed.engine(), other);
    let id = external(bed.engine());
    assert_eq!(state(bed.engine(), id), KeyState::PendingImport);
    assert_eq!(bed.engine().store.scan(Table::Material).unwrap().len(), 1);
    import(bed.engine(), id, &MATERIAL, 0).unwrap();
    assert_eq!(state(bed.engine(), id), KeyState::Enabled);
    let version = Uuid::from_slice(&row(bed.engine(), id).primary_version).unwrap();
    assert_eq!(*bed.engine().material(id, version).unwrap().expose(), MATERIAL);
    let blob = encrypt(bed.engine(), id);
    bed.reopen();
    assert_eq!(decrypt(bed.engine(), &blob).unwrap(), id.as_bytes());

    delete(bed.engine(), id).unwrap();
    for _ in 0..2 {
        let gone = row(bed.engine(), id);
        assert_eq!(gone.state(), KeyState::PendingImport);
        assert_eq!((gone.imported, gone.destroyed_ms), (false, None));
        assert_eq!(gone.left_epoch, Some(1));
        assert_eq!(
            decrypt(bed.engine(), &blob).unwrap_err().code,
            Code::PendingImport
        );
        assert_eq!(bed.engine().position().epoch, 2, "at once, by the ratchet");
        assert_eq!(bed.engine().store.scan(Table::Material).unwrap().len(), 1);
        assert_eq!(decrypt(bed.engine(), &others).unwrap(), other.as_bytes());
        bed.reopen();
    }
    assert_eq!(delete(bed.engine(), id).unwrap_err().code, Code::PendingImport);
    assert_eq!(
        named(import(bed.engine(), id, &[0xa8; 32], 0)),
        "EncryptedKeyMaterial",
        "another"
    );
    assert_eq!(state(bed.engine(), id), KeyState::PendingImport);
    import(bed.engine(), id, &MATERIAL, 0).unwrap();
    assert_eq!(decrypt(bed.engine(), &blob).unwrap(), id.as_bytes());
    assert_eq!(records_of(&bed.home(), "DestroyKeyMaterial"), 1);
}

#[test]
fn a_copy_of_the_home_without_the_old_slot_has_no_deleted_material() {
    let bed = Bed::new();
    let id = external(bed.engine());
    import(bed.engine(), id, &MATERIAL, 0).unwrap();
    delete(bed.engine(), id).unwrap();
    let after = tempfile::tempdir().unwrap();
    let after = after.path().join("home");
    copy(&bed.home(), &after);
    let engine = Engine::open(&after, bed.clock.clone()).unwrap();
    assert!(engine.store.scan(Table::Material).unwrap().is_empty());
    assert_eq!(engine.home.slots().unwrap(), [2]);
}

#[test]
fn a_token_of_another_key_used_twice_or_late_opens_nothing() {
    let bed = Bed::new();
    let engine = bed.engine();
    let (id, other) = (external(engine), external(engine));
    let (public_key, token) = offer(engine, id).unwrap();
    let (_, others) = offer(engine, other).unwrap();
    let wrapped = wrap(&public_key, &MATERIAL);
    for wrong in [others.as_slice(), &token[..31], &[]] {
        assert_eq!(named(take(engine, id, &wrapped, wrong, 0)), "ImportToken");
    }
    assert_eq!(named(take(engine, other, &wrapped, &token, 0)), "ImportToken");
    take(engine, id, &wrapped, &token, 0).unwrap();
    assert_eq!(
        named(take(engine, id, &wrapped, &token, 0)),
        "ImportToken",
        "used"
    );

    let (public_key, token) = offer(engine, id).unwrap();
    offer(engine, id).unwrap();
    let wrapped = wrap(&public_key, &MATERIAL);
    assert_eq!(
        named(take(engine, id, &wrapped, &token, 0)),
        "ImportToken",
        "replaced"
    );

    let (public_key, token) = offer(engine, id).unwrap();
    bed.clock.pass(24 * HOUR_MS);
    let wrapped = wrap(&public_key, &MATERIAL);
    assert_eq!(
        named(take(engine, id, &wrapped, &token, 0)),
        "ImportToken",
        "late"
    );
}

#[test]
fn a_wrapping_key_does_not_outlive_the_daemon() {
    let mut bed = Bed::new();
    let id = external(bed.engine());
    let (public_key, token) = offer(bed.engine(), id).unwrap();
    bed.reopen();
    let wrapped = wrap(&public_key, &MATERIAL);
    assert_eq!(named(take(bed.engine(), id, &wrapped, &token, 0)), "ImportToken");
}

#[test]
fn material_of_a_wrong_length_or_under_a_wrong_key_is_refused_and_ends_the_wrapping_key() {
    let bed = Bed::new();
    let engine = bed.engine();
    let id = external(engine);
    let foreign = offer(engine, external(engine)).unwrap().0;
    for wrong in [31, 33, 0] {
        let (public_key, token) = offer(engine, id).unwrap();
        let wrapped = wrap(&public_key, &vec![1; wrong]);
        assert_eq!(
            named(take(engine, id, &wrapped, &token, 0)),
            "EncryptedKeyMaterial"
        );
        let right = wrap(&public_key, &MATERIAL);
        assert_eq!(
            named(take(engine, id, &right, &token, 0)),
            "ImportToken",
            "used up"
        );
    }
    for wrong in [wrap(&foreign, &MATERIAL), vec![], vec![1; 255], vec![0xff; 256]] {
        let (_, token) = offer(engine, id).unwrap();
        assert_eq!(named(take(engine, id, &wrong, &token, 0)), "EncryptedKeyMaterial");
    }
    assert_eq!(state(engine, id), KeyState::PendingImport);
    assert!(row(engine, id).fingerprint.is_empty());
}

#[test]
fn only_an_external_key_that_lives_takes_material() {
    let bed = Bed::new();
    let engine = bed.engine();
    let ours = create(engine);
    assert_eq!(named(offer(engine, ours)), "KeyId");
    assert_eq!(named(delete(engine, ours)), "KeyId");
    assert_eq!(state(engine, ours), KeyState::Enabled);
    let id = external(engine);
    let wrong = run(engine, "GetParametersForImport", |_, trail| {
        engine.get_parameters_for_import(trail, &id.to_string(), "RSAES_PKCS1_V1_5", "")
    });
    assert_eq!(named(wrong), "WrappingAlgorithm");
    let wrong = run(engine, "GetParametersForImport", |_, trail| {
        engine.get_parameters_for_import(trail, &id.to_string(), "", "RSA_1024")
    });
    assert_eq!(named(wrong), "WrappingKeySpec");
    schedule(engine, id).unwrap();
    assert_eq!(offer(engine, id).unwrap_err().code, Code::PendingDeletion);
    assert_eq!(delete(engine, id).unwrap_err().code, Code::PendingDeletion);
    cancel(engine, id).unwrap();
    assert_eq!(state(engine, id), KeyState::PendingImport, "it has no material");
    schedule(engine, id).unwrap();
    bed.clock.pass(WEEK_MS);
    assert_eq!(engine.destroy_due().unwrap(), [id]);
    assert_eq!(offer(engine, id).unwrap_err().code, Code::KeyNotFound);
}

#[test]
fn material_that_expires_goes_by_the_ratchet_and_may_be_renewed_before() {
    let bed = Bed::new();
    let engine = bed.engine();
    let id = external(engine);
    let now = bed.clock.now_ms().unsigned_abs() / 1000;
    for wrong in [1, now, 253_402_300_800, u64::MAX] {
        assert_eq!(
            named(import(engine, id, &MATERIAL, wrong)),
            "KeyMaterialExpireUnix"
        );
    }
    import(engine, id, &MATERIAL, now + 3600).unwrap();
    let blob = encrypt(engine, id);
    bed.clock.pass(HOUR_MS - 1000);
    engine.destroy_due().unwrap();
    assert_eq!(decrypt(engine, &blob).unwrap(), id.as_bytes());
    import(engine, id, &MATERIAL, now + 7200).unwrap();
    bed.clock.pass(HOUR_MS);
    engine.destroy_due().unwrap();
    assert_eq!(decrypt(engine, &blob).unwrap(), id.as_bytes(), "renewed");
    bed.clock.pass(1000);
    assert!(
        engine.destroy_due().unwrap().is_empty(),
        "the key is not destroyed"
    );
    assert_eq!(state(engine, id), KeyState::PendingImport);
    assert_eq!(engine.position().epoch, 2);
    assert_eq!(row(engine, id).material_expires_ms, None);
    assert_eq!(records_of(&bed.home(), "ExpireKeyMaterial"), 1);
    import(engine, id, &MATERIAL, 0).unwrap();
    assert_eq!(decrypt(engine, &blob).unwrap(), id.as_bytes());
}

/// Its row is Disabled until the old slot is gone, and nobody may bring it back.
#[test]
fn a_key_whose_material_was_left_behind_goes_nowhere_but_to_pending_import() {
    for reopens in [false, true] {
        let mut bed = Bed::new();
        let id = external(bed.engine());
        import(bed.engine(), id, &MATERIAL, 0).unwrap();
        run(bed.engine(), "DisableKey", |call, trail| {
            bed.engine().disable_key(call, trail, &id.to_string())
        })
        .unwrap();
        let only = |row: &KeyRow| (row.key_id == id.as_bytes()).then_some(KeyState::PendingImport);
        let stopped = bed
            .engine()
            .destroy(bed.engine().candidates(only), &mut |step| match step {
                Step::SlotOverwritten => Err(std::io::Error::other("injected")),
                _ => Ok(()),
            });
        assert_eq!(stopped.unwrap_err().code, Code::InternalFailure);
        assert_eq!(state(bed.engine(), id), KeyState::Disabled);
        let enabled = run(bed.engine(), "EnableKey", |call, trail| {
            bed.engine().enable_key(call, trail, &id.to_string())
        });
        assert_eq!(enabled.unwrap_err().code, Code::PendingImport);
        for refused in [
            schedule(bed.engine(), id).map(drop),
            offer(bed.engine(), id).map(drop),
        ] {
            assert_eq!(refused.unwrap_err().code, Code::StateModifiedFailed);
        }
        if reopens {
            bed.reopen();
        } else {
            bed.engine().destroy_due().unwrap();
        }
        assert_eq!(state(bed.engine(), id), KeyState::PendingImport);
        assert_eq!(bed.engine().home.slots().unwrap(), [2]);
    }
}

/// While the clock is to be confirmed nothing is destroyed; what has expired is refused all the same.
#[test]
fn expired_material_is_disabled_while_destruction_is_suspended() {
    let bed = Bed::new();
    let engine = bed.engine();
    let id = external(engine);
    let now = bed.clock.now_ms().unsigned_abs() / 1000;
    import(engine, id, &MATERIAL, now + 3600).unwrap();
    let blob = encrypt(engine, id);
    bed.clock.set(2 * HOUR_MS as i64);
    engine.destroy_due().unwrap();
    assert_eq!(decrypt(engine, &blob).unwrap_err().code, Code::Disabled);
    assert_eq!(engine.position().epoch, 1);
    let enabled = run(engine, "EnableKey", |call, trail| {
        engine.enable_key(call, trail, &id.to_string())
    });
    assert_eq!(enabled.unwrap_err().code, Code::PendingImport);
    // The clock was wrong: the same material comes again, and lives on.
    import(engine, id, &MATERIAL, 0).unwrap();
    run(engine, "EnableKey", |call, trail| {
        engine.enable_key(call, trail, &id.to_string())
    })
    .unwrap();
    assert_eq!(decrypt(engine, &blob).unwrap(), id.as_bytes());
}
