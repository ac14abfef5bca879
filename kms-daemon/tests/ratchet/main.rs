//! kill -9 of a real kmsd at each step of the ratchet (docs/kms-format.md, "Ratchet"): strace(1) kills it at the entry of
//! one system call, which is not made then; a ratchet that was traced and left alone says which calls make up which step. So
//! the daemon needs no hooks, and nothing depends on timing: what a kill has met is read from the trace of that very run.
//!
//! Every file that was ever written is copied and handed to `cmkfs-recover`, without the slots of epochs that are over, and
//! with the one of the epoch that has just ended.
//!
//! `RATCHET_KILLS` says how often each step is met.

// clippy.toml permits these in functions marked #[test] alone; here everything is a test, or helps one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[allow(dead_code, reason = "what it has for other targets")]
#[path = "../kms/fixture.rs"]
mod fixture;
mod trace;

use cmkfs_recover::{Given, recover};
use fixture::{Kms, base64, bytes};
use kms_api::proto;
use kms_client::Usage;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use trace::{Point, Step, Strace, killed_at, parse, points};

const SURVIVORS: usize = 4;
const WEEK_S: u64 = 7 * 24 * 3600;
const VOLUME: [u8; 16] = [5; 16];
/// A kill that is meant for one step may meet another, or come too late: so many are tried for each that is wanted.
const ATTEMPTS_PER_KILL_MAX: usize = 4;
/// A start that follows a kill is killed in turn, at one of so many calls of a name.
const SECOND_KILL_CALLS_MAX: u32 = 24;
/// How long a kmsd that was killed may take to be gone.
const KILL_MAX: Duration = Duration::from_secs(60);
/// Rounds whose copies are looked through at once.
const RECOVERED_ROUNDS: usize = 8;
const SECOND_KILL_CALLS: [&str; 5] = ["fsync", "unlink", "fdatasync", "write", "rename"];

/// A key, and something under it.
struct Key {
    id: String,
    blob: Vec<u8>,
}

impl Key {
    fn new(kms: &Kms) -> Self {
        let id = kms.create_key();
        let blob = bytes(&kms.encrypt(&id, &base64(id.as_bytes()), "{}"));
        Self { id, blob }
    }

    /// As cmkfs-recover names it.
    fn hex(&self) -> String {
        self.id.replace('-', "")
    }
}

/// What was met, over all rounds.
#[derive(Default)]
struct Tally {
    kills: BTreeMap<Step, BTreeMap<String, usize>>,
    attempts: BTreeMap<Step, usize>,
    /// Ratchets that came to their end.
    ended: usize,
    elsewhere: usize,
    /// Starts that were killed in turn: before they served, and when they did.
    killed_starts: (usize, usize),
    recoveries: usize,
}

impl Tally {
    fn kills(&self, step: Step) -> usize {
        self.kills.get(&step).map_or(0, |calls| calls.values().sum())
    }
}

struct Run {
    kms: Kms,
    survivors: Vec<Key>,
    dead: Vec<Key>,
    epoch: u64,
    /// Every file that ever was, a directory for each round.
    copies: TempDir,
    points: BTreeMap<Step, Vec<Point>>,
    tally: Tally,
    rounds: usize,
}

/// What one round has left, to be recovered from.
struct Round {
    directory: PathBuf,
    copies: Vec<PathBuf>,
    old_slot: Vec<u8>,
}

impl Round {
    /// Takes a copy of the home as it is.
    fn copy(&mut self, home: &Path, name: &str) -> PathBuf {
        let to = self.directory.join(name);
        copy(home, &to);
        self.copies.push(to.clone());
        to
    }

    /// Withholds the content of the old slot: from copies where it still has it. Where it lies now.
    fn withhold(&self, old: u64) -> PathBuf {
        let withheld = self.directory.join("withheld");
        for copy in &self.copies {
            let slot = copy.join(format!("slot-{old}"));
            if fs::read(&slot).is_ok_and(|content| content == self.old_slot) {
                fs::remove_file(slot).unwrap();
            }
        }
        fs::write(&withheld, &self.old_slot).unwrap();
        withheld
    }
}

impl Run {
    fn new() -> Self {
        let mut kms = Kms::initialized(&["--drill"]);
        kms.serve(&[]);
        let survivors: Vec<_> = (0..SURVIVORS).map(|_| Key::new(&kms)).collect();
        let alias = ["create-alias", "--alias-name", "alias/lives", "--key-id"];
        kms.ctl(&[&alias[..], &[&survivors[0].id]].concat()).unwrap();
        report(&kms, &survivors[0]);
        let mut run = Self {
            kms,
            survivors,
            dead: Vec::new(),
            epoch: 1,
            copies: tempfile::tempdir().unwrap(),
            points: BTreeMap::new(),
            tally: Tally::default(),
            rounds: 0,
        };
        run.round(None);
        run
    }

    /// Until every step was met so often.
    fn kill(&mut self, kills: usize) {
        let attempts_max = kills * ATTEMPTS_PER_KILL_MAX;
        while let Some(step) = Step::ALL.into_iter().find(|&step| self.tally.kills(step) < kills) {
            let attempt = self.tally.attempts.entry(step).or_default();
            let number = *attempt;
            *attempt += 1;
            assert!(number < attempts_max, "{step:?} cannot be met");
            let points = &self.points[&step];
            // All over the step, and each time around beside those of the time before.
            let at = (number * points.len() / kills + number / kills) % points.len();
            let point = points[at].clone();
            if self.round(Some(&point)) != Some(step) {
                self.tally.elsewhere += 1;
            }
        }
    }

    /// One ratchet, killed at a point, or traced and left alone: which step was met.
    fn round(&mut self, point: Option<&Point>) -> Option<Step> {
        let old = self.epoch;
        let directory = self.copies.path().join(format!("{:04}", self.rounds));
        fs::create_dir(&directory).unwrap();
        let home = self.kms.home();
        let mut round = Round {
            old_slot: fs::read(home.join(format!("slot-{old}"))).unwrap(),
            copies: Vec::new(),
            directory,
        };
        self.rounds += 1;
        let dies = Key::new(&self.kms);
        report(&self.kms, &dies);
        let schedule = ["schedule-key-deletion", "--yes", "--pending-window-in-days", "7"];
        self.kms
            .ctl(&[&schedule[..], &["--key-id", &dies.id]].concat())
            .unwrap();
        round.copy(&home, "before");

        let output = round.directory.join("trace");
        let strace = Strace::attach(self.kms.pid(), point, &output);
        let trace = match advance(&self.kms, WEEK_S) {
            Ok(_) => strace.detached(),
            Err(error) => {
                // strace ends with kmsd, and not before it.
                assert!(
                    ends(&mut self.kms),
                    "kmsd lives, and refused to shift its clock: {error}"
                );
                strace.ended()
            }
        };
        let calls = parse(&trace, &home, old);
        let mut met = None;
        if !self.kms.has_ended() {
            self.points = points(&calls);
            self.tally.ended += 1;
        } else {
            self.kms.killed();
            let call = killed_at(&calls, point.unwrap()).unwrap();
            let killed = round.copy(&home, "killed");
            self.check_files(&killed, call);
            met = Some(call.step());
            let kills = self.tally.kills.entry(call.step()).or_default();
            *kills.entry(call.label()).or_default() += 1;
            self.start_again(&mut round, killed, &dies);
        }
        self.dead.push(dies);
        self.check_end(&mut round, met, old + 1);
        self.epoch = old + 1;
        self.recover(&round, old);
        met
    }

    /// The files say of the kill what the trace says.
    fn check_files(&self, killed: &Path, call: &trace::Call) {
        let (old, next) = (self.epoch, self.epoch + 1);
        let there = |name: &str| killed.join(name).exists();
        let is_selected = there(&format!("slot-{next}"));
        let is_staged = there(&format!("slot-{next}.staged"));
        let is_old_there = there(&format!("slot-{old}"));
        let is_as_traced = match call.step() {
            Step::Before | Step::Intend => is_old_there && !is_staged && !is_selected,
            Step::Stage => is_old_there && !is_selected,
            Step::Write => is_old_there && is_staged && !is_selected,
            Step::Commit => is_old_there && is_staged == call.is_rename_of_slot() && is_selected != is_staged,
            Step::Close => is_selected,
            Step::Drop | Step::After => is_selected && !is_old_there,
        };
        assert!(is_as_traced, "{call:?}: {is_staged} {is_selected} {is_old_there}");
    }

    /// Starts kmsd on what a kill has left, and every second time kills that start, too.
    fn start_again(&mut self, round: &mut Round, killed: PathBuf, dies: &Key) {
        let mut last = killed;
        if self.rounds.is_multiple_of(2) {
            let number = u32::try_from(self.rounds / 2).unwrap();
            let names = u32::try_from(SECOND_KILL_CALLS.len()).unwrap();
            let point = Point {
                name: SECOND_KILL_CALLS[(number % names) as usize].to_owned(),
                ordinal: 1 + number / names % SECOND_KILL_CALLS_MAX,
            };
            let output = round.directory.join("trace-of-start");
            let is_ready = self.kms.serve_or_be_killed(|kmsd| traced(&kmsd, &point, &output));
            if is_ready {
                // It destroys what is due at once, and may be killed in that, or before this.
                self.kms.kill();
                self.tally.killed_starts.1 += 1;
            } else {
                self.tally.killed_starts.0 += 1;
            }
            let twice = round.copy(&self.kms.home(), "killed-twice");
            assert!(selected(&twice) >= selected(&last), "{}: back", twice.display());
            last = twice;
        }
        let log = round.directory.join("log");
        let file = fs::File::create(&log).unwrap();
        self.kms.serve_by(|mut kmsd| {
            kmsd.env("RUST_LOG", "info").stderr(file);
            kmsd
        });
        let expected = selected(&last);
        self.check_ready(dies, expected);
        let log = fs::read_to_string(log).unwrap();
        let opened = log
            .lines()
            .find(|line| line.contains("root slot opened"))
            .unwrap();
        assert!(opened.contains(&format!(" epoch={expected} ")), "{opened}");
        if expected > self.epoch {
            // Never back: it is that very slot, and no other of the same number.
            let slot = |home: &Path| fs::read(home.join(format!("slot-{expected}"))).unwrap();
            assert_eq!(slot(&last), slot(&self.kms.home()));
        }
    }

    /// What a start has made of what a kill left, by its ready line and before a call has it do more. What was committed is
    /// finished before anything is served; what was not is begun again from then on, unless it is not due yet.
    fn check_ready(&self, dies: &Key, expected: u64) {
        let (old, next) = (self.epoch, self.epoch + 1);
        let home = self.kms.home();
        let there = roots(&home);
        let state = self.kms.state(&dies.id);
        let only_next = of_epoch(next);
        if expected > old {
            assert_eq!((there, state.as_str()), (only_next, "Destroyed"));
            return;
        }
        let mut possible: BTreeSet<_> = of_epoch(old).union(&only_next).cloned().collect();
        possible.insert(format!("slot-{next}.staged"));
        assert!(there.is_subset(&possible), "{there:?}");
        match state.as_str() {
            "Destroyed" => assert_eq!(roots(&home), only_next),
            state => assert_eq!(state, "PendingDeletion"),
        }
    }

    /// One epoch is selected; who lives, lives; who is dead, is dead.
    fn check_end(&mut self, round: &mut Round, met: Option<Step>, epoch: u64) {
        let what = &round.directory.display();
        // The start, or the check that follows it, has it again; but for a kill before the clock was shifted.
        let is_due = met != Some(Step::Before);
        advance(&self.kms, if is_due { 1 } else { WEEK_S }).unwrap();
        let dies = self.dead.last().unwrap();
        assert_eq!(self.kms.state(&dies.id), "Destroyed", "{what}");
        let info = self.kms.ctl(&["get-keystore-info"]).unwrap();
        assert_eq!(info["Epoch"], epoch, "{what}");
        let home = self.kms.home();
        assert_eq!(roots(&home), of_epoch(epoch), "{what}");
        self.kms.verify().unwrap();
        for (key, opened) in self.survivors.iter().zip(decrypt(&self.kms, &self.survivors)) {
            assert_eq!(opened.as_deref(), Ok(key.id.as_bytes()), "{what}");
        }
        for opened in decrypt(&self.kms, &self.dead) {
            assert_eq!(opened.unwrap_err(), "Forbidden.KeyNotFound", "{what}");
        }
        for key in [&self.survivors[0], dies] {
            let described = self.kms.ctl(&["describe-key", "--key-id", &key.id]).unwrap();
            assert_eq!(described["Dependants"].as_array().unwrap().len(), 1, "{what}");
        }
        let lives = &self.survivors[0].id;
        let described = self
            .kms
            .ctl(&["describe-key", "--key-id", "alias/lives"])
            .unwrap();
        assert_eq!(described["KeyMetadata"]["KeyId"], **lives, "{what}");
        round.copy(&home, "after");
    }

    /// Without the old slot the copies of a round give nothing of who died in it; with it they do, or that would mean nothing.
    fn recover(&mut self, round: &Round, old: u64) {
        let withheld = round.withhold(old);
        let mut expected: BTreeSet<_> = self.survivors.iter().map(Key::hex).collect();
        let what = round.directory.display();
        assert_eq!(recovered(&round.copies, &[]), expected, "{what}");
        expected.insert(self.dead.last().unwrap().hex());
        assert_eq!(recovered(&round.copies, &[withheld]), expected, "{what}");
        self.tally.recoveries += 1;
    }

    /// Everything that ever was and the present slot, without the slots of the epochs that are over; with those that were
    /// staged and discarded. In groups of rounds: what each of them adds opens rows of its own epoch alone.
    fn recover_from_all(&self) {
        let began = Instant::now();
        let expected: BTreeSet<_> = self.survivors.iter().map(Key::hex).collect();
        let present = self.kms.home().join(format!("slot-{}", self.epoch));
        let rounds = subdirectories(self.copies.path());
        let mut count = 0;
        for group in rounds.chunks(RECOVERED_ROUNDS) {
            let copies: Vec<_> = group.iter().flat_map(|round| subdirectories(round)).collect();
            for copy in &copies {
                for epoch in slots(copy).into_iter().filter(|&epoch| epoch < self.epoch) {
                    fs::remove_file(copy.join(format!("slot-{epoch}"))).unwrap();
                }
            }
            let found = recovered(&copies, std::slice::from_ref(&present));
            assert!(found.is_subset(&expected), "{found:?}");
            count += copies.len();
        }
        let last = subdirectories(rounds.last().unwrap());
        assert_eq!(recovered(&last, &[present]), expected);
        println!(
            "{count} copies of {} epochs, without the slots of those that are over: none of {} destroyed keys, in {:?}",
            self.epoch,
            self.dead.len(),
            began.elapsed()
        );
    }
}

fn report(kms: &Kms, key: &Key) {
    let session = kms.client().open_session(VOLUME, 0, Duration::ZERO).unwrap();
    let usage = Usage {
        location: Path::new("/srv/vault"),
        files: 1,
        bytes: 1,
    };
    session.report_usage(&key.id, &usage).unwrap();
    session.close().unwrap();
}

fn advance(kms: &Kms, seconds: u64) -> Result<serde_json::Value, String> {
    kms.ctl(&["advance-clock", "--seconds", &seconds.to_string()])
}

/// What each key's blob decrypts to, or the code.
fn decrypt(kms: &Kms, keys: &[Key]) -> Vec<Result<Vec<u8>, String>> {
    use proto::batch_decrypt_response::item::Outcome;
    let client = kms.client();
    let mut all = Vec::new();
    for batch in keys.chunks(256) {
        let items = batch.iter().map(|key| proto::DecryptRequest {
            ciphertext_blob: key.blob.clone(),
            encryption_context: BTreeMap::new(),
        });
        let request = proto::BatchDecryptRequest {
            items: items.collect(),
        };
        let answer = client.call(|mut kms| async move { kms.batch_decrypt(request).await });
        let items = answer.unwrap().items.into_iter();
        all.extend(items.map(|item| match item.outcome.unwrap() {
            Outcome::Result(result) => Ok(result.plaintext),
            Outcome::Error(error) => Err(error.code),
        }));
    }
    all
}

/// kmsd under strace, which kills it at a point, counted from its first call.
fn traced(kmsd: &Command, point: &Point, output: &Path) -> Command {
    let mut strace = Command::new("strace");
    // As a grandchild, so that the daemon is the process that is waited for.
    strace.arg("-D").args(trace::arguments(Some(point), output));
    strace.arg(kmsd.get_program()).args(kmsd.get_args());
    strace.env("RUST_LOG", "warn");
    strace
}

/// Whether a kmsd that a signal was sent to, if any was, has ended by it.
fn ends(kms: &mut Kms) -> bool {
    let began = Instant::now();
    while !kms.has_ended() {
        if began.elapsed() > KILL_MAX {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Everything in a home that is named as a slot or as a root.
fn roots(home: &Path) -> BTreeSet<String> {
    let names = names(home).into_iter();
    names
        .filter(|name| name.starts_with("slot-") || name.starts_with("root-"))
        .collect()
}

/// What there is of these when one epoch is selected, and nothing is under way.
fn of_epoch(epoch: u64) -> BTreeSet<String> {
    BTreeSet::from([format!("root-{epoch}"), format!("slot-{epoch}")])
}

/// The greatest epoch that has a slot.
fn selected(home: &Path) -> u64 {
    slots(home).into_iter().max().unwrap()
}

/// The epochs that have one.
fn slots(home: &Path) -> Vec<u64> {
    let epochs = names(home)
        .into_iter()
        .filter_map(|name| name.strip_prefix("slot-")?.parse().ok());
    epochs.collect()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = directory.read_dir().unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    let all = names(directory).into_iter().map(|name| directory.join(name));
    all.filter(|path| path.is_dir()).collect()
}

/// Copies a home, but for its reserve, which has no content, and what goes while it is read.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else if name != "reserve" {
            match fs::copy(&from, to) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copied => drop(copied.unwrap()),
            }
        }
    }
}

/// The keys whose material cmkfs-recover gets from copies and slots.
fn recovered(copies: &[PathBuf], slots: &[PathBuf]) -> BTreeSet<String> {
    let given = Given {
        keystores: copies.to_vec(),
        volumes: Vec::new(),
        slots: slots.to_vec(),
    };
    let outcome = recover(&given).unwrap();
    assert_eq!(outcome.opened.databases, copies.len() as u64, "databases");
    let materials = outcome.opened.materials.iter();
    materials.map(cmkfs_recover::Material::key_id).collect()
}

#[test]
fn kill_9_at_each_step_selects_one_epoch_loses_no_survivor_and_brings_no_dead_key_back() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test traces a kmsd, which cannot be dumped: run it as root"
    );
    let kills = std::env::var("RATCHET_KILLS").map_or(1, |kills| kills.parse().unwrap());
    let began = Instant::now();
    let mut run = Run::new();
    println!(
        "points: {:?}",
        run.points
            .iter()
            .map(|(step, points)| (step, points.len()))
            .collect::<Vec<_>>()
    );
    run.kill(kills);
    run.recover_from_all();
    for step in Step::ALL {
        println!(
            "{step:?}: {} kills: {:?}",
            run.tally.kills(step),
            run.tally.kills[&step]
        );
        assert!(run.tally.kills(step) >= kills);
    }
    let tally = &run.tally;
    assert!(tally.killed_starts.0 > 0, "no start was killed before it served");
    println!(
        "{} rounds: {} kills at steps, {} starts killed before they served and {} when they did, {} ratchets not met, {} kills \
         elsewhere than meant; {} epochs, {} keys destroyed, {} recoveries, in {:?}",
        run.rounds,
        Step::ALL.iter().map(|&step| tally.kills(step)).sum::<usize>(),
        tally.killed_starts.0,
        tally.killed_starts.1,
        tally.ended - 1,
        tally.elsewhere,
        run.epoch,
        run.dead.len(),
        tally.recoveries,
        began.elapsed()
    );
}
