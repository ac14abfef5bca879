//! Watches over the runs: no thread may panic, and none may stand still.

use crate::host::detach;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest run; no outcome depends on how long one takes.
const LIMIT: Duration = Duration::from_secs(60);

static PANICS: AtomicUsize = AtomicUsize::new(0);
static RUNS: AtomicU64 = AtomicU64::new(0);

struct Running {
    number: u64,
    name: String,
    since: Instant,
    mountpoint: PathBuf,
}

#[derive(Clone)]
pub struct Watch(Arc<Mutex<Vec<Running>>>);

/// A run that is watched until this is dropped.
pub struct Run<'w> {
    watch: &'w Watch,
    number: u64,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let mut running = self.watch.0.lock().unwrap();
        running.retain(|run| run.number != self.number);
    }
}

impl Watch {
    pub fn begin() -> Self {
        let inherited = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            inherited(panic);
        }));
        let watch = Self(Arc::default());
        let watched = watch.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                watched.abort_if_it_hangs();
            }
        });
        watch
    }

    pub fn run(&self, name: String, mountpoint: PathBuf) -> Run<'_> {
        let number = RUNS.fetch_add(1, Ordering::SeqCst);
        self.0.lock().unwrap().push(Running {
            number,
            name,
            since: Instant::now(),
            mountpoint,
        });
        Run { watch: self, number }
    }

    /// Panics of any thread, so far.
    pub fn panics(&self) -> usize {
        PANICS.load(Ordering::SeqCst)
    }

    fn abort_if_it_hangs(&self) {
        let running = self.0.lock().unwrap();
        let Some(hanging) = running.iter().find(|run| run.since.elapsed() > LIMIT) else {
            return;
        };
        println!("1 hang: {} stands still for {LIMIT:?}", hanging.name);
        for run in running.iter() {
            detach(&run.mountpoint);
            let _removed = std::fs::remove_dir(&run.mountpoint);
        }
        std::process::abort();
    }
}
