//! The processes together, and what is done to the key under them.
use crate::log::{Entry, LOG_ENTRIES, LOG_STALLS, LOG_WRONG, Log};
use crate::system::now;
use crate::world::{READERS, Random, Role, WRITERS, What, World, variable};
use crate::writers::Signals;
use std::collections::BTreeMap;
use std::io::{BufRead, Error, Read, Result};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, fs, process, thread};

/// How long a command, or any process of the herd, may take before it counts as stuck.
pub const STUCK_S: u64 = 60;

pub struct Member {
    pub role: Role,
    pub log: Log,
    pub entries: Arc<Mutex<Vec<Entry>>>,
    pub process: Child,
}

impl Member {
    /// What it has logged since this was last asked.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = lock(&self.entries);
        self.log.drain(&mut entries);
        std::mem::take(&mut entries)
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps logs from getting full.
pub fn collect(log: Log, entries: &Mutex<Vec<Entry>>) {
    loop {
        log.drain(&mut lock(entries));
        thread::sleep(Duration::from_millis(20));
    }
}

/// When the key was disabled and enabled.
#[derive(Clone, Copy)]
pub struct Times {
    pub called: u64,
    pub returned: u64,
    pub enabled: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Before,
    During,
    Dark,
    /// Begun in the dark, and under way when the key was enabled again: it may have found it so.
    Dawn,
    After,
}

impl Times {
    pub fn phase(&self, begin: u64, end: u64) -> Phase {
        match begin {
            begin if begin >= self.enabled => Phase::After,
            begin if begin >= self.returned && end >= self.enabled => Phase::Dawn,
            begin if begin >= self.returned => Phase::Dark,
            begin if begin >= self.called => Phase::During,
            _ => Phase::Before,
        }
    }
}

/// How many accesses of which kind began when, and how they ended.
pub type Counts = BTreeMap<(Role, What, Phase, u32), u64>;

pub struct Herd {
    pub members: Vec<Member>,
    pub signals: Signals,
    pub counts: Counts,
    /// When the command under way counts as stuck; in seconds of now(), 0 for never.
    pub deadline_s: Arc<AtomicU32>,
    pub random: Random,
}

impl Herd {
    pub fn start(world: &World, with_writers: bool) -> Result<Self> {
        let signals = Signals::of(world)?;
        let mut roles = READERS.to_vec();
        if with_writers {
            roles.extend(WRITERS);
        }
        let mut members = Vec::new();
        for (number, role) in roles.into_iter().enumerate() {
            let log = Log::of(world, number)?;
            for word in &log.words[..LOG_ENTRIES] {
                word.store(0, Ordering::SeqCst);
            }
            let mut process = Command::new(env::current_exe()?)
                .args(["member", &number.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            let mut line = String::new();
            let out = process.stdout.take().ok_or_else(|| Error::other("no pipe"))?;
            std::io::BufReader::new(out).read_line(&mut line)?;
            if line != "ready\n" {
                return Err(Error::other(format!("the {role:?} process did not begin")));
            }
            let entries = Arc::<Mutex<Vec<Entry>>>::default();
            let collected = Arc::clone(&entries);
            thread::spawn(move || collect(log, &collected));
            members.push(Member {
                entries,
                role,
                log,
                process,
            });
        }
        let deadline_s = Arc::default();
        let pids: Vec<(String, u32)> = members
            .iter()
            .map(|member| (format!("{:?}", member.role), member.process.id()))
            .collect();
        watch(Arc::clone(&deadline_s), pids);
        let random = Random(now());
        Ok(Self {
            members,
            signals,
            counts: Counts::new(),
            deadline_s,
            random,
        })
    }

    /// Runs kmsctl; the time at which it said how it went, or its line of error.
    pub fn kmsctl(&self, operation: &str) -> Result<std::result::Result<u64, String>> {
        let mut child = Command::new(variable("KMSCTL")?)
            .args([operation, "--key-id", &variable("KEY")?])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut out = child.stdout.take().ok_or_else(|| Error::other("no pipe"))?;
        let read = out.read(&mut [0; 4096])?;
        let returned = now();
        let output = child.wait_with_output()?;
        if output.status.success() && read > 0 {
            Ok(Ok(returned))
        } else {
            Ok(Err(String::from_utf8_lossy(&output.stderr)
                .trim()
                .replace('\n', " ")))
        }
    }

    pub fn obey(&mut self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["cycles", count] => self.cycles(count.parse().map_err(Error::other)?),
            ["revoke"] => self.revoke(),
            ["restore"] => self.restore(),
            _ => Err(Error::other(format!("'{line}' is no command"))),
        }
    }

    pub fn alive(&self) {
        self.deadline_s
            .store((now() / 1_000_000_000 + STUCK_S) as u32, Ordering::SeqCst);
    }

    pub fn sleep_ms(&mut self, least: u64, most: u64) {
        thread::sleep(Duration::from_micros(
            least * 1000 + self.random.below((most - least) * 1000),
        ));
    }

    /// Reads the logs; how many accesses succeeded that began in the dark.
    pub fn count(&mut self, times: Times) -> u64 {
        let mut violations = 0;
        for member in &self.members {
            for entry in member.entries() {
                let phase = times.phase(entry.begin, entry.end);
                if entry.errno == 0 && entry.what == What::Access && phase == Phase::Dark {
                    violations += 1;
                    if violations <= 5 {
                        let since = |from: u64| (entry.begin - from) / 1000;
                        eprintln!(
                            "VIOLATION: {:?}, begun {} us after DisableKey returned, ended {} us before EnableKey was called, within {} us",
                            member.role,
                            since(times.returned),
                            (times.enabled - entry.end) / 1000,
                            (entry.end - entry.begin) / 1000
                        );
                    }
                }
                *self
                    .counts
                    .entry((member.role, entry.what, phase, entry.errno))
                    .or_default() += 1;
            }
        }
        violations
    }

    /// Waits until every process has made another access that began after `since`, and so hangs nowhere.
    pub fn all_move_on(&mut self) {
        // The one under way, and one more.
        let until: Vec<u64> = self.members.iter().map(|member| member.log.count() + 2).collect();
        while self
            .members
            .iter()
            .zip(&until)
            .any(|(member, until)| member.log.count() < *until)
        {
            for member in &mut self.members {
                if !matches!(member.process.try_wait(), Ok(None)) {
                    eprintln!("the {:?} process has ended", member.role);
                    process::exit(1);
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn cycles(&mut self, count: usize) -> Result<String> {
        let (mut took, mut base, mut lit, mut violations, mut least) = (vec![], vec![], vec![], 0, u64::MAX);
        for cycle in 0..count {
            self.alive();
            let warmed = Command::new(env::current_exe()?).arg("warm").status()?;
            if !warmed.success() {
                return Err(Error::other(
                    "not everything can be read while the key is enabled",
                ));
            }
            self.sleep_ms(10, 200);
            let begin = now();
            self.kmsctl("describe-key")?.map_err(Error::other)?;
            base.push(now() - begin);
            let called = now();
            let returned = self.kmsctl("disable-key")?.map_err(Error::other)?;
            took.push(returned - called);
            self.sleep_ms(50, 250);
            self.all_move_on();
            let enabled = now();
            self.kmsctl("enable-key")?.map_err(Error::other)?;
            let round = self.signals.round().fetch_add(1, Ordering::SeqCst) + 1;
            while (0..WRITERS.len())
                .any(|writer| self.signals.verified(writer).load(Ordering::SeqCst) != round)
            {
                thread::sleep(Duration::from_millis(1));
            }
            lit.push(now() - enabled);
            self.all_move_on();
            let before = self.dark_accesses();
            violations += self.count(Times {
                called,
                returned,
                enabled,
            });
            least = least.min(self.dark_accesses() - before);
            if cycle % 20 == 19 {
                eprintln!(
                    "   cycle {}: {violations} violations, DisableKey {}",
                    cycle + 1,
                    spread(&took)
                );
            }
        }
        self.deadline_s.store(0, Ordering::SeqCst);
        self.report();
        let [lost_synced, lost_accepted, wrong] = [0, 1, 2].map(|n| {
            (0..WRITERS.len())
                .map(|w| self.signals.findings(w, n).load(Ordering::SeqCst))
                .sum::<u64>()
        });
        let misread: u64 = self.words(LOG_WRONG);
        println!("   DisableKey, with kmsctl's start:  {}", spread(&took));
        println!("   kmsctl describe-key, beside it:   {}", spread(&base));
        println!("   EnableKey until all was verified: {}", spread(&lit));
        println!(
            "   in the dark: {} accesses, {least} in the cycle with the fewest",
            self.dark_accesses()
        );
        println!("   waits for a full log: {}", self.words(LOG_STALLS));
        let line = format!(
            "{count} cycles, {violations} successes in the dark, {lost_synced} synced and {lost_accepted} merely accepted writes lost, \
             {wrong} written wrong, {misread} read wrong"
        );
        match violations + lost_synced + lost_accepted + wrong + misread {
            0 if least > 0 => Ok(line),
            _ => Err(Error::other(line)),
        }
    }

    pub fn words(&self, which: usize) -> u64 {
        self.members
            .iter()
            .map(|member| member.log.words[which].load(Ordering::Relaxed))
            .sum()
    }

    pub fn dark_accesses(&self) -> u64 {
        let dark = |((_, what, phase, _), count): (&(Role, What, Phase, u32), &u64)| {
            if *what == What::Access && *phase == Phase::Dark {
                *count
            } else {
                0
            }
        };
        self.counts.iter().map(dark).sum()
    }

    pub fn report(&self) {
        let mut lines: BTreeMap<(Role, What), BTreeMap<Phase, Vec<String>>> = BTreeMap::new();
        for ((role, what, phase, errno), count) in &self.counts {
            let outcome = if *errno == 0 {
                "ok".to_owned()
            } else {
                format!("errno {errno}")
            };
            lines
                .entry((*role, *what))
                .or_default()
                .entry(*phase)
                .or_default()
                .push(format!("{outcome} {count}"));
        }
        for ((role, what), phases) in lines {
            let phases: Vec<_> = phases
                .iter()
                .map(|(phase, outcomes)| format!("{phase:?}: {}", outcomes.join(", ")))
                .collect();
            println!("   {:<20} {}", format!("{role:?} {what:?}"), phases.join(" | "));
        }
    }

    /// DisableKey, whatever became of the mount. Fails if something can be read thereafter.
    pub fn revoke(&mut self) -> Result<String> {
        self.alive();
        let called = now();
        let outcome = self.kmsctl("disable-key")?;
        let returned = *outcome.as_ref().unwrap_or(&u64::MAX);
        let took_ms = (now() - called) / 1_000_000;
        self.sleep_ms(50, 150);
        if let Err(error) = outcome {
            self.deadline_s.store(0, Ordering::SeqCst);
            self.count(Times {
                called,
                returned,
                enabled: u64::MAX,
            });
            return Ok(format!("refused {took_ms} {error}"));
        }
        self.all_move_on();
        self.deadline_s.store(0, Ordering::SeqCst);
        let before = self.dark_accesses();
        let violations = self.count(Times {
            called,
            returned,
            enabled: u64::MAX,
        });
        let accesses = self.dark_accesses() - before;
        match violations {
            0 => Ok(format!("revoked {took_ms} {accesses}")),
            _ => Err(Error::other(format!(
                "{violations} of {accesses} accesses succeeded after DisableKey returned"
            ))),
        }
    }

    /// EnableKey; returns when every process of the herd has read something again.
    pub fn restore(&mut self) -> Result<String> {
        self.alive();
        let enabled = now();
        self.kmsctl("enable-key")?.map_err(Error::other)?;
        let mut waiting: Vec<bool> = self.members.iter().map(|_| true).collect();
        while waiting.contains(&true) {
            for (member, waits) in self.members.iter().zip(&mut waiting) {
                let lit = |entry: &Entry| entry.errno == 0 && entry.begin >= enabled;
                *waits &= !member.entries().iter().any(lit);
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.deadline_s.store(0, Ordering::SeqCst);
        match self.words(LOG_WRONG) {
            0 => Ok(format!("restored {}", (now() - enabled) / 1_000_000)),
            wrong => Err(Error::other(format!("{wrong} pages were read wrong"))),
        }
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ended = member.process.kill();
        }
        for member in &mut self.members {
            let _status = member.process.wait();
        }
    }
}

pub fn spread(times: &[u64]) -> String {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = |share: usize| {
        sorted
            .get((sorted.len() * share / 100).min(sorted.len().saturating_sub(1)))
            .map_or(0.0, |ns| *ns as f64 / 1e6)
    };
    format!(
        "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
        at(50),
        at(99),
        at(100)
    )
}

/// Ends everything, and says where each process is, once a command takes too long.
pub fn watch(deadline_s: Arc<AtomicU32>, mut pids: Vec<(String, u32)>) {
    for name in ["MOUNT_PID", "KMSD_PID"] {
        if let Some(pid) = env::var(name).ok().and_then(|pid| pid.parse().ok()) {
            pids.push((name.to_owned(), pid));
        }
    }
    static SAYING: Mutex<()> = Mutex::new(());
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_millis(500));
            let deadline = u64::from(deadline_s.load(Ordering::SeqCst));
            if deadline == 0 || now() / 1_000_000_000 < deadline {
                continue;
            }
            let _one = SAYING.lock();
            println!("failed: nothing moved for {STUCK_S} s");
            for (name, pid) in &pids {
                let tasks = fs::read_dir(format!("/proc/{pid}/task"))
                    .into_iter()
                    .flatten()
                    .flatten();
                for task in tasks {
                    let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
                    eprintln!("-- {name} {pid} {} {}", read("comm").trim(), read("wchan"));
                    eprint!("{}", read("stack"));
                }
            }
            process::exit(1);
        }
    });
}
