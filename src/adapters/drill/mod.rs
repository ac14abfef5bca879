//! The drill: shows on data made for the purpose that taking a key away makes everything unreadable at once, that giving it
//! back brings everything back, and what destroying it is worth; and writes down what was seen so that others can check it.

mod copies;
mod course;
mod destruction;
pub mod document;
mod facts;
pub mod html;
mod kms;
mod live;
pub mod markers;
pub mod observer;
pub mod record;
pub mod report;
pub mod scratch;
pub mod sign;
pub mod timeline;
pub mod verify;
mod watch;

use course::Course;
use document::Check;
use markers::Nonce;
use report::Findings;
use scratch::{Programs, Scratch};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Set by a signal.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// What to drill on.
#[derive(Debug, Clone)]
pub enum Subject {
    /// A keystore, a volume and a mount of the drill's own.
    Scratch,
    /// A mounted volume, whose key is taken away and given back.
    Volume(LiveVolume),
}

/// A mounted volume.
#[derive(Debug, Clone)]
pub struct LiveVolume {
    /// Its directory.
    pub volume: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The process that serves it.
    pub pid: u32,
    /// Its key.
    pub key: String,
    /// The socket of the kmsd that has it.
    pub socket: PathBuf,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to drill on.
    pub subject: Subject,
    /// The challenge.
    pub nonce: Nonce,
    /// Whether it was given, and not drawn by the drill itself.
    pub is_challenge: bool,
    /// Bytes of the large file.
    pub large_bytes: u64,
    /// How long each darkness is watched.
    pub observe: Duration,
    /// Who runs it.
    pub operator: String,
    /// Who looks on.
    pub witness: Option<String>,
}

/// What happens.
#[derive(Debug)]
pub enum Progress<'p> {
    /// A step begins.
    Step(u8, &'p str),
    /// Something is under way.
    Doing(&'p str),
    /// A check was made.
    Checked(&'p Check),
}

/// Runs a drill. Whatever it made is gone when this returns; a key that it took away is back.
///
/// # Errors
/// It could not begin. What goes wrong later is a check that failed.
pub fn run(request: &Request, show: &mut dyn FnMut(Progress<'_>)) -> Result<Findings, String> {
    let mut course = Course::new(request, show);
    let done = match &request.subject {
        Subject::Scratch => {
            let mut scratch = Scratch::new(Programs::find()?)?;
            let done = course.on_scratch(&mut scratch);
            drop(scratch);
            done
        }
        Subject::Volume(live) => course.on_volume(live),
    };
    if let Err(error) = done {
        course.check("drill-complete", 7, "the drill reached its end", Err(error));
    }
    Ok(course.end())
}

/// Has SIGINT, SIGTERM and SIGHUP end a drill in order.
///
/// # Errors
/// The signals cannot be caught.
pub fn catch_signals() -> Result<(), String> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        signal_hook::flag::register(signal, Arc::clone(flag))
            .map_err(|error| format!("no signals: {error}"))?;
    }
    Ok(())
}

/// Whether a drill is to end.
pub(crate) fn check_interrupt() -> Result<(), String> {
    match INTERRUPTED.get() {
        Some(flag) if flag.load(Ordering::Relaxed) => Err("it was interrupted".to_owned()),
        _ => Ok(()),
    }
}

/// Sleeps, unless interrupted.
fn pause(length: Duration) -> Result<(), String> {
    let end = std::time::Instant::now() + length;
    loop {
        check_interrupt()?;
        let left = end.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}
