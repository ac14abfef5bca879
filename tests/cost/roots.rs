//! What roots cost: the same operations on a volume of format 1, which has none, and of the latest, in turns, in one run.
//! Prints medians and their ratio, of the time that passed and of what the calling thread computed;
//! `cargo run --release --example roots-cost [DIR]`.

// The fixture is the engine's tests' own.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

#[allow(dead_code, reason = "the engine's tests use more of it")]
#[path = "../engine/support.rs"]
mod support;

use cmkfs::engine::{Ino, Verify, Volume};
use rustix::time::{ClockId, clock_gettime};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{DIR, FILE, Fixture, copy_dir, noise};

const ROUNDS: usize = 7;
const CREATES: u32 = 20_000;
const SYNCED_WRITES: u32 = 2_000;
const VERSIONS: [u32; 2] = [1, 2];

/// What each of many operations took on average.
struct Took {
    passed: Duration,
    computed: Duration,
}

/// When many operations began.
struct Began(Instant, Duration);

impl Began {
    fn now() -> Self {
        Self(Instant::now(), computed())
    }

    fn end(self, count: u32) -> Took {
        Took {
            passed: self.0.elapsed() / count,
            computed: (computed() - self.1) / count,
        }
    }
}

/// What this thread has computed so far.
fn computed() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Many operations, timed.
type Operation = fn(&Volume) -> Took;

fn create(volume: &Volume) -> Took {
    let dir = volume.make(Ino::ROOT, b"created", &DIR).unwrap().ino;
    let began = Began::now();
    for number in 0..CREATES {
        let made = volume.make(dir, number.to_string().as_bytes(), &FILE).unwrap();
        volume.forget(made.ino, 1);
    }
    began.end(CREATES)
}

fn synced_write(volume: &Volume) -> Took {
    let ino = volume.make(Ino::ROOT, b"written", &FILE).unwrap().ino;
    let block = noise(1, 4096);
    volume.write(ino, 0, &noise(2, 1 << 20)).unwrap();
    volume.fsync(ino).unwrap();
    let began = Began::now();
    for number in 0..SYNCED_WRITES {
        let at = u64::from(number.wrapping_mul(2_654_435_761) % 256) * 4096;
        volume.write(ino, at, &block).unwrap();
        volume.fsync(ino).unwrap();
    }
    began.end(SYNCED_WRITES)
}

fn run(version: u32, operation: Operation, scratch: &Path) -> Took {
    let mut fixture = Fixture::new();
    fixture.options.verify = Verify::Off;
    fixture.options.publish_interval = Duration::from_secs(5);
    fixture.options.block_cache_bytes = 128 << 20;
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/volume-{version}"));
    let dir = scratch.join(format!("volume-{version}"));
    copy_dir(&golden, &dir);
    let volume: Arc<Volume> = fixture.try_open_at(&dir).unwrap();
    let took = operation(&volume);
    volume.close().unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    took
}

fn main() {
    let scratch = std::env::args_os()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let operations: [(&str, Operation); 2] = [("create", create), ("synced 4 KiB write", synced_write)];
    for (name, operation) in operations {
        let mut took = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            for (times, version) in took.iter_mut().zip(VERSIONS) {
                times.push(run(version, operation, &scratch));
            }
        }
        for (what, time) in [
            ("passed", (|took| took.passed) as fn(&Took) -> Duration),
            ("computed", |took| took.computed),
        ] {
            let [without, with] = took.each_ref().map(|took| {
                let mut times: Vec<_> = took.iter().map(time).collect();
                times.sort_unstable();
                times[ROUNDS / 2].as_secs_f64() * 1e6
            });
            println!(
                "{name}, {what}: {without:.2} us without roots, {with:.2} us with, {:+.2} us, ratio {:.3}",
                with - without,
                with / without
            );
        }
    }
}
