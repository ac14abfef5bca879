//! A ring is not lost, and a stop ends the thread. No time passes in a model: a wait that nobody ends is a deadlock.

use super::{explore, together};
use crate::engine::bell::{Bell, Wake};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[test]
fn what_was_done_before_a_ring_is_seen_after_it_and_a_stop_ends_the_waiting() {
    explore(5000, || {
        let bell = Arc::new(Bell::default());
        let (asked, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let waiter = {
            let (bell, asked, seen) = (Arc::clone(&bell), Arc::clone(&asked), Arc::clone(&seen));
            shuttle::thread::spawn(move || {
                while seen.load(Ordering::SeqCst) < 2 {
                    assert_eq!(bell.wait(Duration::MAX), Wake::Work);
                    seen.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
                }
                // Only the stop is left, which every later wait sees.
                while bell.wait(Duration::MAX) != Wake::Stop {}
                assert_eq!(bell.wait(Duration::MAX), Wake::Stop);
            })
        };
        let ringer = || -> Box<dyn FnOnce() + Send> {
            let (bell, asked) = (Arc::clone(&bell), Arc::clone(&asked));
            Box::new(move || {
                asked.fetch_add(1, Ordering::SeqCst);
                bell.ring();
            })
        };
        together([ringer(), ringer()]);
        while seen.load(Ordering::SeqCst) < 2 {
            shuttle::thread::yield_now();
        }
        bell.stop();
        waiter.join().unwrap();
    });
}
