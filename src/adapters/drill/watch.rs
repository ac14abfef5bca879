//! The drill's end of an observer: starts it, tells it what to do, takes its log.

use super::markers::Markers;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest wait for one line.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How long a killed observer may take to go; one that waits for a mount goes when that does.
const END_MAX: Duration = Duration::from_secs(2);

/// A running observer.
pub struct Watch {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

/// What the loops without pauses did.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Accesses that succeeded.
    pub successes: u64,
    /// When the last of them began.
    pub last_success_ns: u64,
    /// Accesses that failed.
    pub failures: u64,
}

impl Watch {
    /// Starts one in `dir`, as user `uid` if one is given.
    ///
    /// # Errors
    /// It does not start, or cannot become that user.
    pub fn start(cmkfs: &Path, dir: &Path, uid: Option<u32>) -> Result<Self, String> {
        let mut child = Command::new(cmkfs)
            .args(["drill", "observe"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .map_err(|error| format!("the observer does not start: {error}"))?;
        let (sender, answers) = channel();
        if let Some(out) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let orders = child.stdin.take().ok_or("the observer has no standard input")?;
        let mut watch = Self {
            child,
            orders,
            answers,
        };
        let dir = dir.to_str().ok_or("the directory has no name that can be told")?;
        watch.tell(&format!("enter\t{dir}"))?;
        if let Some(uid) = uid {
            watch.tell(&format!("become\t{uid}"))?;
        }
        Ok(watch)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order; what the answer says beside "ok".
    ///
    /// # Errors
    /// What went wrong.
    pub fn tell(&mut self, order: &str) -> Result<Vec<String>, String> {
        self.say(order)?;
        let answer = self.next_line()?;
        let mut words = answer.split('\t').map(str::to_owned);
        match words.next().as_deref() {
            Some("ok") => Ok(words.collect()),
            _ => Err(format!("the observer: {}", words.collect::<Vec<_>>().join(" "))),
        }
    }

    fn say(&mut self, order: &str) -> Result<(), String> {
        writeln!(self.orders, "{order}").map_err(|error| format!("the observer is gone: {error}"))
    }

    fn next_line(&self) -> Result<String, String> {
        let start = Instant::now();
        loop {
            match self.answers.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => return Ok(line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    return Err("the observer is gone".to_owned());
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => super::check_interrupt()?,
            }
            if start.elapsed() > ANSWER_MAX {
                return Err("the observer does not answer".to_owned());
            }
        }
    }

    /// Has it write the markers, or open those that are there.
    ///
    /// # Errors
    /// What went wrong.
    pub fn take_up(&mut self, order: &str, markers: &Markers) -> Result<(), String> {
        let (nonce, large) = (markers.nonce().text(), markers.large_bytes());
        self.tell(&format!("{order}\t.\t{nonce}\t{large}"))?;
        Ok(())
    }

    /// Ends the loops without pauses.
    ///
    /// # Errors
    /// What went wrong.
    pub fn ease(&mut self) -> Result<Load, String> {
        let said = self.tell("ease")?;
        let number = |at: usize| said.get(at).and_then(|word| word.parse().ok());
        match (number(0), number(1), number(2)) {
            (Some(successes), Some(last_success_ns), Some(failures)) => Ok(Load {
                successes,
                last_success_ns,
                failures,
            }),
            _ => Err("the observer does not say what its load did".to_owned()),
        }
    }

    /// Ends every loop, and takes the log.
    ///
    /// # Errors
    /// What went wrong.
    pub fn finish(&mut self) -> Result<Vec<String>, String> {
        self.tell("stop")?;
        self.say("dump")?;
        let mut lines = Vec::new();
        loop {
            match self.next_line()? {
                end if end == "end" => return Ok(lines),
                error if error.starts_with("error") => return Err(format!("the observer: {error}")),
                line => lines.push(line),
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let start = Instant::now();
        while !matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) && start.elapsed() < END_MAX {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
