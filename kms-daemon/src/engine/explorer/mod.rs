//! Every interleaving of a revocation with what mounts, kmsd, the kernel and programs do, up to a bound: the decisions are
//! `clearing`'s own, all else is a model (docs/revocation.md). Breadth first, so that what is found is shown by a shortest
//! way to it.

mod calm;
mod steps;
mod world;

use calm::{Calm, ENDLESS, KILLED};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;
use steps::{Action, Plant, actions};
use world::{Budget, SHOWN, UNREGISTERED, World};

/// Distinct states, at most, in each search of a test.
const STATES_MAX: usize = 400_000;
/// The same for a longer run.
const STATES_MAX_VARIABLE: &str = "KMSD_EXPLORER_STATES";
/// From one state in so many it is tried whether all ends well.
const CALM_EVERY: u64 = 8;

/// What went wrong, and the way there.
struct Found {
    what: &'static str,
    way: Vec<Action>,
    state: World,
}

struct Explored {
    states: usize,
    is_complete: bool,
    calmed: usize,
    found: Option<Found>,
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

fn explore(start: World, plant: Plant, states_max: usize) -> Explored {
    let all = actions();
    let mut seen = HashSet::from([fingerprint(&start)]);
    let mut states = vec![(start, 0_u32, None::<Action>)];
    let mut calm = Calm::default();
    let mut at = 0;
    let way = |states: &[(World, u32, Option<Action>)], mut at: usize| {
        let mut way = Vec::new();
        while let Some(action) = states[at].2 {
            way.push(action);
            at = states[at].1 as usize;
        }
        way.reverse();
        way
    };
    let mut found = None;
    while at < states.len() && found.is_none() {
        let world = states[at].0.clone();
        if fingerprint(&world).is_multiple_of(CALM_EVERY)
            && let Err(what) = calm.down(&world, plant)
        {
            found = Some(Found {
                what,
                way: way(&states, at),
                state: world,
            });
            break;
        }
        for &action in &all {
            let Some(next) = world.after(action, plant) else {
                continue;
            };
            if !seen.insert(fingerprint(&next)) {
                continue;
            }
            let wrong = next.wrong();
            let state = next.clone();
            states.push((next, at as u32, Some(action)));
            if let Some(what) = wrong {
                found = Some(Found {
                    what,
                    way: way(&states, states.len() - 1),
                    state,
                });
                break;
            }
        }
        at += 1;
        if states.len() >= states_max {
            break;
        }
    }
    Explored {
        states: states.len(),
        is_complete: at == states.len(),
        calmed: calm.tried,
        found,
    }
}

fn bound() -> usize {
    std::env::var(STATES_MAX_VARIABLE)
        .ok()
        .and_then(|states| states.parse().ok())
        .unwrap_or(STATES_MAX)
}

const NOTHING: Budget = Budget {
    revocations: 0,
    enables: 0,
    unstored: 0,
    crashes: 0,
    stops: 0,
    kills: 0,
    aborts: 0,
    unmounts: 0,
    cuts: 0,
    births: 0,
};

/// Which things happen in a search: each lets others happen, so that each reaches far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Search {
    /// Nothing fails; the key is revoked and given back, again and again.
    AllWell,
    MountFails,
    KmsdCrashes,
    BothFail,
    /// A second mount comes while the first is revoked.
    MountComes,
    /// And comes to have the device of the first.
    DeviceComesAgain,
}

const SEARCHES: [Search; 6] = [
    Search::AllWell,
    Search::MountFails,
    Search::KmsdCrashes,
    Search::BothFail,
    Search::MountComes,
    Search::DeviceComesAgain,
];

impl Search {
    fn start(self) -> World {
        let budget = match self {
            Self::AllWell => Budget {
                revocations: 3,
                enables: 2,
                ..NOTHING
            },
            Self::MountFails => Budget {
                revocations: 2,
                enables: 1,
                stops: 1,
                kills: 1,
                aborts: 1,
                unmounts: 1,
                cuts: 1,
                ..NOTHING
            },
            Self::KmsdCrashes => Budget {
                revocations: 2,
                enables: 1,
                unstored: 1,
                crashes: 2,
                ..NOTHING
            },
            Self::BothFail => Budget {
                revocations: 1,
                crashes: 2,
                stops: 1,
                kills: 1,
                unmounts: 1,
                ..NOTHING
            },
            Self::MountComes => Budget {
                revocations: 2,
                enables: 1,
                crashes: 1,
                births: 1,
                ..NOTHING
            },
            Self::DeviceComesAgain => Budget {
                revocations: 1,
                crashes: 1,
                kills: 1,
                unmounts: 2,
                births: 1,
                aborts: 1,
                ..NOTHING
            },
        };
        World::new(self == Self::DeviceComesAgain, budget)
    }
}

/// Explores one search with the product's own decisions.
fn holds(search: Search) {
    let began = Instant::now();
    let explored = explore(search.start(), Plant::Nothing, bound());
    println!(
        "{search:?}: {} states, from {} of them all ends well, {}, {:?}",
        explored.states,
        explored.calmed,
        if explored.is_complete {
            "all there are"
        } else {
            "up to the bound"
        },
        began.elapsed()
    );
    if let Some(Found { what, way, state }) = &explored.found {
        panic!("{search:?}: {what}\nby {way:?}\nto {state:?}");
    }
}

#[test]
fn no_interleaving_shows_what_was_revoked_and_each_can_end_well() {
    for search in SEARCHES {
        holds(search);
    }
}

/// A bug that is put in is found, as what it does.
#[track_caller]
fn finds(plant: Plant, search: Search, what: &str) {
    let explored = explore(search.start(), plant, bound());
    let Some(found) = explored.found else {
        panic!(
            "{plant:?} was not found in {} states of {search:?}",
            explored.states
        );
    };
    println!(
        "{plant:?}: after {} states, by {} steps: {:?}",
        explored.states,
        found.way.len(),
        found.way
    );
    assert_eq!(found.what, what);
}

macro_rules! planted {
    ($($name:ident: $plant:ident in $search:ident shows $what:ident,)*) => {
        $(#[test] fn $name() { finds(Plant::$plant, Search::$search, $what); })*
    };
}

planted! {
    an_acknowledgement_before_the_second_purge: AcknowledgesEarly in AllWell shows SHOWN,
    an_acknowledgement_of_an_epoch_before: AnyAcknowledgement in AllWell shows SHOWN,
    an_acknowledgement_that_the_next_kmsd_never_hears: AcknowledgesOnce in KmsdCrashes shows KILLED,
    a_key_issued_without_the_lock: IssuesUnlocked in MountComes shows SHOWN,
    a_key_issued_before_its_row: IssuesUnregistered in MountComes shows UNREGISTERED,
    a_restart_that_forgets_holders: RestartForgets in KmsdCrashes shows SHOWN,
    an_adoption_that_drops_the_old_row_first: AdoptsTooEarly in KmsdCrashes shows UNREGISTERED,
    holders_that_are_listed_once: ListsOnce in KmsdCrashes shows SHOWN,
    a_kill_that_is_not_waited_for: KillsWithoutWaiting in MountFails shows UNREGISTERED,
    one_invalidation_of_a_dead_mount: InvalidatesOnce in MountFails shows UNREGISTERED,
    a_connection_that_is_not_aborted: DoesNotAbort in MountFails shows ENDLESS,
    a_session_that_ends_while_its_mount_attaches: EndsWhileAttaching in BothFail shows UNREGISTERED,
    a_close_of_a_mount_that_is_there: BelievesClose in MountFails shows UNREGISTERED,
}
