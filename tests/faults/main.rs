//! Storage that fails, at every request that a workload makes of it: a host in memory, served through FUSE, on which the
//! volume lies. Then storage is well again, the volume is opened anew, and compared with what had been acknowledged.
//!
//! `FAULTS_INJECTIONS` (0: every one there is) and `FAULTS_SEED` say how much is tried, and of which; `FAULTS_ONLY=NUMBER` tries
//! one and tells what was done.

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

use host::{Fault, Plan, Sites};
use run::{End, Template};
use std::collections::BTreeMap;
use watch::Watch;

/// Whether ENOSPC that is over may leave a mount that takes no more changes.
const MAY_NEED_REMOUNT_AFTER_ENOSPC: bool = true;
/// Requests that fail one after the other, where it is more than one.
const LASTING: usize = 12;

fn setting(name: &str) -> Option<usize> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

/// Everything that can be made to fail, with the end that each run takes.
fn injections(sites: &Sites) -> Vec<(Plan, End)> {
    let mut all = Vec::new();
    for fault in Fault::ALL {
        for length in [1, LASTING] {
            for site in 0..sites.of(fault.class()) {
                let end = End::ALL[all.len() % End::ALL.len()];
                all.push((Plan { fault, site, length }, end));
            }
        }
    }
    all
}

#[test]
fn storage_that_fails_loses_nothing_that_was_acknowledged() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts a FUSE filesystem: run it as root"
    );
    let watch = Watch::begin();
    let template = Template::make();
    let sites = {
        let mut machine = template.machine();
        let _run = watch.run("nothing fails".to_owned(), machine.mountpoint());
        machine.host().log();
        machine.run(None, End::Close).unwrap();
        let log = machine.host().log();
        if setting("FAULTS_LOG").is_some() {
            println!("{}", log.join("\n"));
        }
        machine.host().sites()
    };
    println!("{sites:?}");
    assert_eq!(watch.panics(), 0);
}
