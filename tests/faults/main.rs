//! Storage that fails, at every request that a workload makes of it: a host in memory, served through FUSE, on which the
//! volume lies. Then storage is well again, the volume is opened anew, and compared with what had been acknowledged.
//!
//! `FAULTS_INJECTIONS` (0: every one there is), `FAULTS_SEED`, `FAULTS_ONLY` (a fault) and `FAULTS_WORKERS` say how much is
//! tried, of which, and by how many threads.

// clippy.toml permits these in functions marked #[test] alone; here everything is a test, or helps one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod host;
mod oracle;
mod run;
#[allow(dead_code, reason = "what it has for other targets")]
#[path = "../engine/support.rs"]
mod support;
mod tree;
mod watch;
mod workload;

use host::{Class, Fault, Plan, Sites};
use run::{End, Report, Template};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use watch::Watch;

/// Requests that fail one after the other, where it is more than one.
const LASTING: usize = 12;

/// What became of all runs with one fault.
#[derive(Default)]
struct Tally {
    injections: usize,
    /// The background was quicker or slower than in the run that counted: the request was not made.
    unreached: usize,
    remounts: usize,
    violations: usize,
}

type Tallies = BTreeMap<String, Tally>;
type Queue = Mutex<std::vec::IntoIter<(Plan, End)>>;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// Every way to fail in this manner.
fn plans(fault: Fault, sites: usize) -> Vec<Plan> {
    let lengths: &[usize] = match fault {
        Fault::Eio => &[1, LASTING, Plan::FOR_GOOD],
        _ => &[1, LASTING],
    };
    let of = |length: &usize| {
        let length = *length;
        (0..sites).map(move |site| Plan { fault, site, length })
    };
    lengths.iter().flat_map(of).collect()
}

/// As many as are wanted, with the ends of their runs in turns: of each fault the same number, evenly over its sites.
fn injections(sites: impl Fn(Fault) -> usize) -> Vec<(Plan, End)> {
    let (wanted, seed) = (setting("FAULTS_INJECTIONS", 60), setting("FAULTS_SEED", 1));
    let only = std::env::var("FAULTS_ONLY").ok();
    let is_wanted = |fault: &Fault| only.as_ref().is_none_or(|only| *only == format!("{fault:?}"));
    let faults: Vec<_> = Fault::ALL.into_iter().filter(is_wanted).collect();
    let mut chosen = Vec::new();
    for &fault in &faults {
        let plans = plans(fault, sites(fault));
        let share = wanted / faults.len();
        let stride = plans.len().checked_div(share).unwrap_or(1).max(1);
        chosen.extend(plans.into_iter().skip(seed * 7 % stride).step_by(stride));
    }
    let ends = End::ALL.into_iter().cycle().skip(seed % End::ALL.len());
    chosen.into_iter().zip(ends).collect()
}

/// Counts what a workload asks of its host when nothing fails.
fn count_sites(template: &Template, watch: &Watch) -> Sites {
    let mut machine = template.machine();
    let _run = watch.run("the run in which nothing fails".to_owned(), machine.mountpoint());
    machine.run(None, End::Close).unwrap().sites
}

/// One run; an error is a violation, or a panic of the test's own thread.
fn inject(template: &Template, watch: &Watch, (plan, end): (Plan, End)) -> Result<Report, String> {
    let mut machine = template.machine();
    let _run = watch.run(format!("{plan:?}, then {end:?}"), machine.mountpoint());
    let outcome = catch_unwind(AssertUnwindSafe(|| machine.run(Some(plan), end)));
    let outcome = outcome.unwrap_or_else(|_| Err("a panic".to_owned()));
    outcome.map_err(|why| {
        let failed = machine.host().failed();
        format!(
            "{plan:?}, then {end:?}: {why}\n    failed: {failed:?}\n{}",
            machine.history()
        )
    })
}

/// Whether a volume has to take changes once storage is well again: room that was missing for a while ends it only if a
/// sync found none, after which nobody knows what is there.
fn must_go_on(plan: &Plan, report: &Report) -> bool {
    let goes_on =
        plan.fault == Fault::Enospc && !report.failed.iter().any(|failed| failed.starts_with("Fsync"));
    if goes_on {
        println!(
            "violation: {plan:?}: the volume takes no more changes\n    failed: {:?}",
            report.failed
        );
    }
    goes_on
}

/// Takes injections until there are no more.
fn work(template: &Template, watch: &Watch, queue: &Queue, tallies: &Mutex<Tallies>) {
    loop {
        let next = queue.lock().unwrap().next();
        let Some(injection) = next else { return };
        let outcome = inject(template, watch, injection);
        let mut tallies = tallies.lock().unwrap();
        let tally = tallies.entry(format!("{:?}", injection.0.fault)).or_default();
        tally.injections += 1;
        match outcome {
            Ok(report) => {
                tally.unreached += usize::from(report.failed.is_empty());
                if report.takes_changes == Some(false) {
                    tally.remounts += 1;
                    tally.violations += usize::from(must_go_on(&injection.0, &report));
                }
            }
            Err(why) => {
                tally.violations += 1;
                println!("violation: {why}");
            }
        }
    }
}

#[test]
fn storage_that_fails_loses_nothing_that_was_acknowledged() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts a FUSE filesystem: run it as root"
    );
    let watch = Watch::begin();
    let template = Template::make();
    let sites = count_sites(&template, &watch);
    let queue = Mutex::new(injections(|fault| sites.of(fault.class())).into_iter());
    let tallies = Mutex::new(Tallies::new());
    std::thread::scope(|scope| {
        for _ in 0..setting("FAULTS_WORKERS", 3) {
            scope.spawn(|| work(&template, &watch, &queue, &tallies));
        }
    });
    let tallies = tallies.into_inner().unwrap();
    for (fault, tally) in &tallies {
        println!(
            "{fault}: {} injections, {} not reached; after {} the volume took no more changes until the next mount",
            tally.injections, tally.unreached, tally.remounts
        );
    }
    let sum = |of: fn(&Tally) -> usize| tallies.values().map(of).sum::<usize>();
    println!(
        "{} sites, {} injections, {} panics, 0 hangs, {} silent losses",
        sites.of(Class::Changes) + sites.of(Class::Reads),
        sum(|tally| tally.injections),
        watch.panics(),
        sum(|tally| tally.violations),
    );
    assert_eq!((sum(|tally| tally.violations), watch.panics()), (0, 0));
}
