//! Power cuts, simulated: a disk that records every write and flush, a loop device on it, ext4 on that, and on that a
//! volume and its keystore under a random workload. Then the disk as it may have been at any moment is made again, mounted,
//! and compared with what had been acknowledged.
//!
//! `POWERCUT_WORKLOADS`, `POWERCUT_STATES` (of each) and `POWERCUT_SEED` say how much is tried, and where to begin.

// clippy.toml permits these in functions marked #[test] alone; here everything is a test, or helps one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod disk;
mod machine;
mod oracle;
#[path = "../common/program.rs"]
mod program;
mod random;
mod workload;

use disk::{Disk, Image};
use machine::{Daemon, Machine};
use oracle::{History, Violation};
use random::Random;
use std::sync::{Arc, Mutex, PoisonError};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// A child that is about to run a program has for a moment everything that another test has open, and keeps it from being unmounted.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(
        rustix::process::geteuid().is_root(),
        "this test attaches loop devices and mounts: run it as root"
    );
    let (workloads, states) = (setting("POWERCUT_WORKLOADS", 4), setting("POWERCUT_STATES", 6));
    let first_seed = setting("POWERCUT_SEED", 1);
    let base = Machine::base_image();
    let mut violations = Vec::new();
    let mut tried = 0;
    for seed in first_seed..first_seed + workloads {
        let mut random = Random::new(seed);
        let mut image = Arc::clone(&base);
        // The second one begins where power failed in the first.
        for round in 1..=2 {
            let (history, recorded) = match workload::run(&image, &mut random) {
                Ok(run) => run,
                Err(violation) => {
                    println!("workload {seed}.{round} cannot be run: {violation}");
                    violations.push((seed, violation));
                    break;
                }
            };
            for _ in 0..states.div_ceil(2) {
                let cut = recorded.random_cut(&mut random);
                tried += 1;
                if let Err(violation) = survive(&cut.image, &history, cut.length) {
                    println!(
                        "workload {seed}.{round}, power cut at write {}: {violation}",
                        cut.length
                    );
                    println!("{history}");
                    violations.push((seed, violation));
                }
                image = cut.image;
            }
            println!(
                "workload {seed}.{round}: {} operations, {} writes",
                history.len(),
                recorded.len()
            );
        }
    }
    println!(
        "{tried} power cuts in {workloads} workloads, {} violations",
        violations.len()
    );
    assert!(violations.is_empty());
}

#[test]
fn what_was_acknowledged_survives_the_death_of_a_daemon() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(
        rustix::process::geteuid().is_root(),
        "this test attaches loop devices and mounts: run it as root"
    );
    let (kills, seed) = (setting("POWERCUT_KILLS", 8), setting("POWERCUT_SEED", 1));
    let mut random = Random::new(seed);
    let machine = Machine::boot(Disk::new(Machine::base_image())).unwrap();
    machine.start_kmsd().unwrap();
    machine.mount().unwrap();
    for number in 0..kills {
        for victim in [Daemon::Mount, Daemon::Kmsd] {
            let history = workload::run_until_killed(&machine, victim, &mut random);
            let outcome = machine
                .recover(victim)
                .and_then(|()| machine.observe())
                .and_then(|seen| history.check_after_death(&seen));
            if let Err(violation) = outcome {
                panic!("seed {seed}, kill {number} of {victim:?}: {violation}\n{history}");
            }
        }
    }
    machine.unmount().unwrap();
    machine.fsck().unwrap();
    machine.shut_down();
    println!("{kills} kills of each daemon, nothing lost");
}

/// Starts the machine again on what the disk holds, and compares.
fn survive(image: &Arc<Image>, history: &History, length: usize) -> Result<(), Violation> {
    let machine = Machine::boot(Disk::new(Arc::clone(image)))?;
    let outcome = machine
        .start_kmsd()
        .and_then(|()| machine.mount())
        .and_then(|()| machine.observe())
        .and_then(|seen| history.check(length, &seen))
        .and_then(|()| machine.unmount())
        .and_then(|()| machine.fsck());
    machine.shut_down();
    outcome
}
