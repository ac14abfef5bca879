//! What a kmsd did in a ratchet, as strace(1) tells it: each call, the step that it belongs to, and how to name it to strace.

use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

/// Calls that change a file, or make a change durable.
pub const CALLS: &str =
    "openat,write,pwrite64,fsync,fdatasync,sync_file_range,rename,unlink,ftruncate,fallocate";

/// The steps of docs/kms-format.md, "Ratchet", and what comes before and after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Before,
    Intend,
    Stage,
    Write,
    Commit,
    Close,
    Drop,
    After,
}

impl Step {
    /// 0 to 5.
    pub const ALL: [Self; 6] = [
        Self::Intend,
        Self::Stage,
        Self::Write,
        Self::Commit,
        Self::Close,
        Self::Drop,
    ];
}

/// A call, as it was entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    thread: u32,
    name: String,
    /// In the home, or as it was named.
    path: String,
    arguments: String,
    step: Step,
    /// Among the calls of this name of its thread, from 1: strace counts so.
    ordinal: u32,
}

/// Where a kmsd is killed: at the entry of the first call that is the so-manieth of its name in its thread.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    pub name: String,
    pub ordinal: u32,
}

impl Call {
    /// The name and the file, without its number: what people are told.
    pub fn label(&self) -> String {
        let path: String = self.path.chars().filter(|c| !c.is_ascii_digit()).collect();
        format!("{} {}", self.name, if path.is_empty() { "." } else { &path })
    }

    pub fn step(&self) -> Step {
        self.step
    }

    pub fn is_rename_of_slot(&self) -> bool {
        self.name == "rename" && self.path.starts_with("slot-")
    }

    fn creates(&self, path: &str) -> bool {
        self.name == "openat" && self.path == path && self.arguments.contains("O_CREAT")
    }

    fn is(&self, name: &str, path: &str) -> bool {
        self.name == name && self.path == path
    }

    /// It changes the keystore, or is between two calls that do: RocksDB's own log is no part of it.
    fn matters(&self) -> bool {
        let is_in_home = !self.path.starts_with('/') && !self.path.starts_with("db/LOG");
        let is_for_writing = ["O_CREAT", "O_WRONLY"]
            .iter()
            .any(|flag| self.arguments.contains(flag));
        is_in_home && (self.name != "openat" || self.path.is_empty() || is_for_writing)
    }
}

/// Tells the steps from one another by what is done to which file.
struct Steps {
    old: u64,
    step: Step,
    /// The clock was shifted, and that is written to the audit log; the intent follows.
    is_advanced: bool,
    is_root_there: bool,
    is_slot_gone: bool,
    /// The record that ends it all is written.
    is_recorded: bool,
}

impl Steps {
    /// The step that a call belongs to.
    fn enter(&mut self, call: &Call) -> Step {
        let next = self.old + 1;
        let staged = format!("slot-{next}.staged");
        let (syncs_home, syncs_log) = (call.is("fsync", ""), call.is("fdatasync", "audit.log"));
        self.is_advanced |= call.arguments.contains("AdvanceClock");
        self.is_root_there |= call.creates(&format!("root-{next}"));
        self.is_slot_gone |= call.is("unlink", &format!("slot-{}", self.old));
        self.is_recorded |= call.arguments.contains("DestroyKeyMaterial");
        match self.step {
            Step::Intend if call.creates(&staged) => self.step = Step::Stage,
            Step::Write if call.is("rename", &staged) => self.step = Step::Commit,
            _ => {}
        }
        let step = self.step;
        self.step = match step {
            Step::Before if self.is_advanced && syncs_log => Step::Intend,
            Step::Stage if self.is_root_there && syncs_home => Step::Write,
            Step::Commit if syncs_home => Step::Close,
            Step::Close if self.is_slot_gone && syncs_home => Step::Drop,
            Step::Drop if self.is_recorded && syncs_log => Step::After,
            _ => step,
        };
        step
    }
}

/// Every call of a trace, in the order in which they were entered. `old` is the epoch that the ratchet leaves.
pub fn parse(text: &str, home: &Path, old: u64) -> Vec<Call> {
    let mut steps = Steps {
        old,
        step: Step::Before,
        is_advanced: false,
        is_root_there: false,
        is_slot_gone: false,
        is_recorded: false,
    };
    let mut ordinals: BTreeMap<(u32, String), u32> = BTreeMap::new();
    let mut calls = Vec::new();
    for line in text.lines() {
        let Some(mut call) = entered(line, home) else {
            continue;
        };
        let ordinal = ordinals.entry((call.thread, call.name.clone())).or_default();
        *ordinal += 1;
        call.ordinal = *ordinal;
        call.step = steps.enter(&call);
        calls.push(call);
    }
    calls
}

/// A line of strace's that tells the entry of a call; not its return, a signal, or an exit.
fn entered(line: &str, home: &Path) -> Option<Call> {
    let (thread, rest) = line.split_once(' ')?;
    let (name, arguments) = rest.trim_start().split_once('(')?;
    if !CALLS.split(',').any(|known| known == name) {
        return None;
    }
    let by_name = matches!(name, "openat" | "rename" | "unlink");
    let path = if by_name {
        arguments.split('"').nth(1)?
    } else {
        arguments.split_once('<')?.1.split_once('>')?.0
    };
    let path = match Path::new(path).strip_prefix(home) {
        Ok(inside) => inside.to_str()?.to_owned(),
        Err(_) => path.to_owned(),
    };
    Some(Call {
        thread: thread.parse().ok()?,
        name: name.to_owned(),
        path,
        arguments: arguments.to_owned(),
        step: Step::Before,
        ordinal: 0,
    })
}

/// The call at whose entry a kmsd was killed that was to be killed at `point`.
pub fn killed_at<'c>(calls: &'c [Call], point: &Point) -> Option<&'c Call> {
    calls
        .iter()
        .find(|call| call.name == point.name && call.ordinal == point.ordinal)
}

/// The points of each step, by the trace of a whole ratchet: of the calls that have a name and a number in common the first
/// is the one that is met.
pub fn points(calls: &[Call]) -> BTreeMap<Step, Vec<Point>> {
    let mut met = BTreeSet::new();
    let mut points: BTreeMap<Step, Vec<Point>> = BTreeMap::new();
    for call in calls {
        let point = Point {
            name: call.name.clone(),
            ordinal: call.ordinal,
        };
        if met.insert(point.clone()) && call.matters() {
            points.entry(call.step).or_default().push(point);
        }
    }
    points
}

/// The arguments with which strace kills at a point.
pub fn arguments(point: Option<&Point>, output: &Path) -> Vec<String> {
    let mut arguments = vec![
        "-f".to_owned(),
        "-y".to_owned(),
        "-s".to_owned(),
        "1024".to_owned(),
        "-o".to_owned(),
        output.to_str().unwrap().to_owned(),
        "-e".to_owned(),
        format!("trace={CALLS}"),
    ];
    if let Some(Point { name, ordinal }) = point {
        arguments.push("-e".to_owned());
        arguments.push(format!("inject={name}:signal=KILL:when={ordinal}"));
    }
    arguments
}

/// strace, attached to a process until that ends, or this is dropped.
pub struct Strace {
    tracer: Child,
    output: PathBuf,
    _said: BufReader<ChildStderr>,
}

impl Strace {
    /// Returns when every thread is attached: from then on calls are counted.
    pub fn attach(process: u32, point: Option<&Point>, output: &Path) -> Self {
        let mut strace = Command::new("strace");
        strace
            .args(arguments(point, output))
            .arg("-p")
            .arg(process.to_string())
            .stderr(Stdio::piped());
        let mut tracer = strace
            .spawn()
            .expect("strace is missing; scripts/setup.sh installs it");
        let mut said = BufReader::new(tracer.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains(" attached"), "strace cannot trace kmsd: {line}");
        Self {
            tracer,
            output: output.to_owned(),
            _said: said,
        }
    }

    /// What it has written when its process has ended.
    pub fn ended(mut self) -> String {
        self.tracer.wait().unwrap();
        std::fs::read_to_string(&self.output).unwrap()
    }

    /// Lets the process go, and gives what it did.
    pub fn detached(mut self) -> String {
        self.detach().unwrap();
        std::fs::read_to_string(&self.output).unwrap()
    }

    fn detach(&mut self) -> std::io::Result<()> {
        // One that was waited for has no process any more.
        if self.tracer.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.tracer), Signal::INT)?;
            self.tracer.wait()?;
        }
        Ok(())
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("a strace is left behind: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each call is, without what the daemon does between: `>` begins a thread's line with its number.
    const WHOLE: &str = r#"
9  pwrite64(12</h/audit.log>, "...AdvanceClock...", 150, 700) = 150
9  fdatasync(12</h/audit.log>)      = 0
7  write(9</h/db/000009.log>, "..."..., 451) = 451
7  fdatasync(9</h/db/000009.log> <unfinished ...>
9  pwrite64(12</h/audit.log>, "...BeginKeyDestruction...", 150, 850) = 150
7  <... fdatasync resumed>)         = 0
9  fdatasync(12</h/audit.log>)      = 0
7  openat(AT_FDCWD</tmp>, "/h", O_RDONLY|O_DIRECTORY) = 22</h>
7  openat(AT_FDCWD</tmp>, "/h/slot-2.staged", O_WRONLY|O_CREAT|O_EXCL, 0600) = 22</h/slot-2.staged>
7  fsync(22</h/slot-2.staged>)      = 0
7  fsync(23</h>)                    = 0
7  openat(AT_FDCWD</tmp>, "/h/root-2", O_WRONLY|O_CREAT|O_EXCL, 0600) = 22</h/root-2>
7  fsync(23</h>)                    = 0
7  write(9</h/db/000009.log>, "..."..., 2000) = 2000
8  fsync(5</h/db>)                  = 0
8  write(4</h/db/LOG>, "..."..., 10) = 10
7  openat(AT_FDCWD</tmp>, "/h/slot-2.staged", O_RDONLY) = 28</h/slot-2.staged>
7  rename("/h/slot-2.staged", "/h/slot-2") = 0
7  openat(AT_FDCWD</tmp>, "/h", O_RDONLY|O_CLOEXEC) = 28</h>
7  fsync(28</h>)                    = 0
7  openat(AT_FDCWD</tmp>, "/h/slot-1", O_WRONLY|O_NOFOLLOW) = 28</h/slot-1>
7  pwrite64(28</h/slot-1>, "\0\0"..., 66, 0) = 66
7  fsync(28</h/slot-1>)             = 0
7  unlink("/h/slot-1")              = 0
7  fsync(29</h>)                    = 0
7  unlink("/h/root-1")              = 0
7  fsync(28</h>)                    = 0
9  pwrite64(12</h/audit.log>, "...DestroyKeyMaterial...", 150, 1000) = 150
9  fdatasync(12</h/audit.log>)      = 0
7  write(28</h/db/000021.log>, "..."..., 46) = 46
7  +++ exited with 0 +++
"#;

    #[test]
    fn a_process_that_is_traced_is_let_go_when_the_tracer_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let mut traced = Command::new("sleep").arg("600").spawn().unwrap();
        let status = format!("/proc/{}/status", traced.id());
        let tracer = || {
            let status = std::fs::read_to_string(&status).unwrap();
            let line = status
                .lines()
                .find(|line| line.starts_with("TracerPid:"))
                .unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        let strace = Strace::attach(traced.id(), None, &directory.path().join("trace"));
        assert_ne!(tracer(), "0");
        drop(strace);
        assert_eq!(tracer(), "0");
        assert!(traced.try_wait().unwrap().is_none());
        traced.kill().unwrap();
        traced.wait().unwrap();
    }

    #[test]
    fn each_call_is_of_its_step_and_each_point_is_the_first_of_its_name_and_number() {
        let calls = parse(WHOLE, Path::new("/h"), 1);
        let steps: Vec<_> = calls.iter().map(Call::step).collect();
        let expected = [
            (Step::Before, 2),
            (Step::Intend, 5),
            (Step::Stage, 5),
            (Step::Write, 4),
            (Step::Commit, 3),
            (Step::Close, 5),
            (Step::Drop, 4),
            (Step::After, 1),
        ];
        let expected = expected
            .into_iter()
            .flat_map(|(step, count)| std::iter::repeat_n(step, count));
        assert_eq!(steps, expected.collect::<Vec<_>>());
        let points = points(&calls);
        let named = |step| -> Vec<_> {
            let each = points[&step].iter();
            each.map(|point| format!("{} {}", point.name, point.ordinal))
                .collect()
        };
        // The second sync of the log is the first in its thread to have that number; the slot's overwriting is not.
        assert_eq!(
            named(Step::Intend),
            ["write 1", "pwrite64 2", "fdatasync 2", "openat 1"]
        );
        assert_eq!(named(Step::Commit), ["rename 1", "openat 5", "fsync 4"]);
        assert_eq!(named(Step::Close), ["openat 6", "fsync 5", "unlink 1", "fsync 6"]);
        let killed = killed_at(&calls, &points[&Step::Close][2]).unwrap();
        assert_eq!(killed.label(), "unlink slot-");
    }
}
