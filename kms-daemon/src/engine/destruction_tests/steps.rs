//! Crashes, failures and other calls in the midst of a ratchet.

use super::*;

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

/// A holder that comes while the survivors are already written is one of the next epoch.
#[test]
fn a_holder_that_registers_while_the_keystore_moves_is_not_left_behind() {
    let mut bed = Bed::new();
    let ids = bed.keys(2);
    bed.doom(&ids[..1]);
    let engine = bed.engine();
    let session = open_session(engine, ids[1], Arc::new(Ended));
    let keys = BTreeSet::from([ids[1]]);
    std::thread::scope(|scope| {
        let destroyed = engine.destroy_due_observed(&mut |step| {
            if step == Step::RowsWritten {
                let registered = scope.spawn(|| engine.register(&session, &keys).unwrap());
                for _ in 0..30 {
                    assert!(!registered.is_finished(), "its row is of the epoch before");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
            Ok(())
        });
        assert_eq!(destroyed.unwrap(), ids[..1]);
    });
    let rows = engine.store.scan(Table::Holders).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].0, session.id);
}

/// What depended on a key is known when the key is gone; and what is reported while the survivors are already written is of the
/// next epoch.
#[test]
fn what_depends_on_keys_outlives_them() {
    use crate::engine::dependants_tests::{listed, report, session, usage};
    let mut bed = Bed::new();
    let ids = bed.keys(2);
    let names = [ids[0].to_string(), ids[1].to_string()];
    let mut expected = Vec::new();
    for domain in [0, 1] {
        let session = session(bed.engine(), ids[0], domain);
        for name in &names {
            report(bed.engine(), &session, &usage(name)).unwrap();
        }
        expected.push((domain, "/srv/vault".to_owned(), 3, false));
    }
    bed.doom(&ids[..1]);
    let engine = bed.engine();
    let late = session(engine, ids[0], 2);
    std::thread::scope(|scope| {
        let destroyed = engine.destroy_due_observed(&mut |step| {
            if step == Step::RowsWritten {
                scope.spawn(|| report(engine, &late, &usage(&names[1])).unwrap());
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            Ok(())
        });
        assert_eq!(destroyed.unwrap(), ids[..1]);
    });
    for _ in 0..2 {
        assert_eq!(state(bed.engine(), ids[0]), KeyState::Destroyed);
        assert_eq!(listed(bed.engine(), ids[0]), expected);
        assert_eq!(listed(bed.engine(), ids[1]).len(), 3);
        bed.reopen();
    }
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
