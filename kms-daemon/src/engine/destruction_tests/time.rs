//! When a key is due.

use super::*;

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
