//! What lies in the files: for a thief, for whoever puts them back, and under a passphrase.

use super::*;

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
    let wrong = Engine::open_with(&home, passphrase("correct horsf"), clock.clone(), BTreeMap::new());
    let error = wrong.err().unwrap();
    assert!(
        matches!(error, OpenError::Slot(SlotError::WrongPassphrase(_))),
        "{error}"
    );
    assert!(matches!(
        Engine::open(&home, clock.clone()),
        Err(OpenError::Slot(SlotError::NeedsPassphrase(_)))
    ));
    let engine = Engine::open_with(&home, right(), clock.clone(), BTreeMap::new()).unwrap();
    let (lives, dies) = (create(&engine), create(&engine));
    let (living, dying) = (encrypt(&engine, lives), encrypt(&engine, dies));
    engine.close();
    copy(&home, &old);
    schedule(&engine, dies).unwrap();
    clock.pass(WEEK_MS);
    assert_eq!(engine.destroy_due().unwrap(), [dies]);
    engine.close();
    drop(engine);
    let engine = Engine::open_with(&home, right(), clock.clone(), BTreeMap::new()).unwrap();
    assert_eq!(decrypt(&engine, &living).unwrap(), lives.as_bytes());
    assert_eq!(decrypt(&engine, &dying).unwrap_err().code, Code::KeyNotFound);
    assert_eq!(engine.home.slots().unwrap(), [2]);
    drop(engine);

    // The old slot's file and the passphrase do not open the present root, by whatever name.
    let mut stolen = std::fs::read(old.join("slot-1")).unwrap();
    stolen[26..34].copy_from_slice(&2_u64.to_be_bytes());
    let present = std::fs::read(home.join("slot-2")).unwrap();
    std::fs::write(home.join("slot-2"), &stolen).unwrap();
    assert!(Engine::open_with(&home, right(), clock.clone(), BTreeMap::new()).is_err());
    std::fs::write(home.join("slot-2"), &present).unwrap();
    let salt = 46..78;
    assert_ne!(present[salt.clone()], stolen[salt]);
    // But with the old database they open what has died since: erasure is none.
    let engine = Engine::open_with(&old, right(), clock, BTreeMap::new()).unwrap();
    assert_eq!(decrypt(&engine, &dying).unwrap(), dies.as_bytes());
}
