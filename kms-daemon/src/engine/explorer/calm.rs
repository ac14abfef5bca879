//! From a state on nothing fails any more and everybody does what they can: it must end well.

use super::steps::{Action, Plant};
use super::world::{Key, MOUNTS, Process, SLOTS, State, World};
use crate::engine::clearing::{Clearing, Step};

/// Rounds, in each of which everybody takes a step, until a revocation must have succeeded.
const ROUNDS_MAX: usize = 300;
/// So many rounds are shorter than any deadline.
const PATIENCE_ROUNDS: usize = 40;

pub(super) const ENDLESS: &str = "a revocation never succeeds";
pub(super) const KILLED: &str = "a mount that would have gone dark is killed";

#[derive(Default)]
pub(super) struct Calm {
    pub(super) tried: usize,
}

impl Calm {
    /// A revocation that is repeated succeeds; it kills nobody who goes on; and with the key enabled every mount that is
    /// there is live.
    pub(super) fn down(&mut self, world: &World, plant: Plant) -> Result<(), &'static str> {
        self.tried += 1;
        let mut world = world.clone();
        let budget = &mut world.budget;
        (budget.revocations, budget.enables, budget.unmounts) = (9, 9, 9);
        let innocent: Vec<bool> = (0..MOUNTS).map(|m| is_innocent(&world, m)).collect();
        let mut quiet = 0;
        for passed in 0..ROUNDS_MAX {
            if world.is_promised && world.revoke.is_none() && world.is_up {
                break;
            }
            quiet = if round(&mut world, plant, &innocent)? {
                0
            } else {
                quiet + 1
            };
            if quiet > PATIENCE_ROUNDS {
                quiet = 0;
                for slot in 0..SLOTS {
                    step(&mut world, Action::TimePasses(slot), plant);
                }
            }
            // What came to have a dead mount's device is taken for that mount where kmsd has no descriptor: it ends, too.
            if world.reuses_minor && passed > ROUNDS_MAX / 2 {
                for m in 0..MOUNTS {
                    step(&mut world, Action::Unmount(m), plant);
                }
            }
            for revocation in [Action::Destroy, Action::Disable] {
                if !world.is_promised {
                    step(&mut world, revocation, plant);
                }
            }
        }
        if !world.is_promised {
            return Err(ENDLESS);
        }
        if world.key.0 == Key::Destroyed {
            return Ok(());
        }
        for _ in 0..PATIENCE_ROUNDS {
            step(&mut world, Action::Enable, plant);
            round(&mut world, plant, &innocent)?;
        }
        let is_dark = world.mounts.iter().any(|mount| {
            mount.serves
                && mount.runs()
                && mount.is_there()
                && !mount.is_aborted
                && mount.state != State::Live
        });
        if is_dark {
            Err("a mount of an enabled key is never live again")
        } else {
            Ok(())
        }
    }
}

/// It runs, or can go on, and nobody has decided to end it.
fn is_innocent(world: &World, m: usize) -> bool {
    let mount = &world.mounts[m];
    let is_condemned = world.slots.iter().any(|slot| {
        let is_of_mount = usize::from(slot.mount) == m;
        is_of_mount
            && slot.job.as_ref().is_some_and(|job| {
                job.is_overdue
                    || job.decided.is_some()
                    || world
                        .revoke
                        .is_none_or(|revoke| job.clearing != Clearing::of(revoke.epoch.into()))
            })
    });
    mount.serves
        && !mount.is_killed
        && !mount.is_aborted
        && mount.is_mounted
        && matches!(mount.process, Process::Running | Process::Stopped)
        && !is_condemned
}

fn step(world: &mut World, action: Action, plant: Plant) -> bool {
    let next = world.after(action, plant);
    let is_taken = next.is_some();
    if let Some(next) = next {
        *world = next;
    }
    is_taken
}

/// Everybody takes a step. Whether a revocation has come closer to its end.
fn round(world: &mut World, plant: Plant, innocent: &[bool]) -> Result<bool, &'static str> {
    step(world, Action::Restart, plant);
    step(world, Action::SideStep, plant);
    let mut is_closer = step(world, Action::List, plant);
    for s in 0..SLOTS {
        is_closer |= step(world, Action::Start(s), plant) || step(world, Action::Watch(s), plant);
        is_closer |= step(world, Action::Decide(s), plant);
        let slot = &world.slots[s];
        let kills = slot
            .job
            .as_ref()
            .is_some_and(|job| job.decided == Some(Step::Kill));
        if kills && innocent[usize::from(slot.mount)] {
            return Err(KILLED);
        }
        is_closer |= step(world, Action::Act(s), plant);
    }
    for m in 0..MOUNTS {
        step(world, Action::Continue(m), plant);
        step(world, Action::Heal(m), plant);
        step(world, Action::Exit(m), plant);
        for action in [
            Action::Register(m),
            Action::AnswerLeaves(m),
            Action::TakeKeys(m),
            Action::ReadState(m),
            Action::Ends(m),
            Action::Close(m),
            Action::Mount(m),
            Action::Renew(m),
            Action::TakeAnswer(m),
            Action::Purge(m),
            Action::Wipe(m),
            Action::PurgeAgain(m),
            Action::Acknowledge(m),
            Action::OpenSession(m),
            Action::Attach(m),
            Action::CloseFile(m),
        ] {
            step(world, action, plant);
        }
        if world.mounts[m].pc == super::world::Pc::Relighting {
            step(world, Action::AskForKeys(m), plant);
        }
        if world.mounts[m].process == Process::Dead {
            step(world, Action::Unmount(m), plant);
        }
    }
    Ok(is_closer)
}
