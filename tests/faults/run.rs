//! One run: a workload on a volume whose host fails, the end of that mount, and what the next one finds.

use crate::host::{Fault, Host, Mounted, Plan, Sites};
use crate::oracle::{Found, Op, Oracle, Outcome, Seen};
use crate::support::{DIR, FILE, FakeKms, ManualClock, noise};
use crate::tree::Tree;
use crate::workload::{PREPARATION, PROBE, WORKLOAD};
use cmkfs::engine::{
    Attr, CheckOptions, Clock, Cookie, CreateParams, Error, Fallocate, FileKind, Ino, KeyService, OpenError,
    Options, RenameFlags, SetAttr, SetXattr, Taken, Timestamp, Volume,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const UUID: [u8; 16] = *b"a volume's uuid!";
/// Questions of the background for the time, after which it has had rounds enough to do what it can.
const QUESTIONS: u64 = 48;

/// Memory for RocksDB: with this little it flushes memtables, begins new logs and compacts all the time.
const CACHE_BYTES: usize = 4 << 20;

/// How a mount ends after its storage failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// In good order, if the volume can.
    Close,
    /// The process dies; what the host has taken in stays.
    Death,
    /// The host loses power: what it was not asked to sync is gone.
    PowerCut,
}

impl End {
    pub const ALL: [Self; 3] = [Self::Close, Self::Death, Self::PowerCut];
}

/// A clock moved by hand that counts how often the background asked for the time.
struct Watched {
    clock: ManualClock,
    questions: AtomicU64,
}

impl Clock for Watched {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn monotonic(&self) -> Instant {
        if std::thread::current().name() == Some("upkeep") {
            self.questions.fetch_add(1, Ordering::SeqCst);
        }
        self.clock.monotonic()
    }
}

/// A host with a volume on it, and what is known of that.
pub struct Machine {
    volume: Option<Arc<Volume>>,
    mounted: Mounted,
    kms: Arc<FakeKms>,
    clock: Arc<Watched>,
    oracle: Oracle,
    seed: u64,
}

/// A volume that was made once.
#[derive(Clone)]
pub struct Template {
    tree: Tree,
    oracle: Oracle,
}

/// What became of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// How many requests there were while they could fail.
    pub sites: Sites,
    /// Those that failed.
    pub failed: Vec<String>,
    /// Whether the volume took changes again once storage was well, unless it had to be closed before that.
    pub takes_changes: Option<bool>,
}

type Verdict<T> = Result<T, String>;

impl Machine {
    fn new(tree: Tree, oracle: Oracle) -> Self {
        Self {
            volume: None,
            mounted: Mounted::new(tree),
            kms: Arc::new(FakeKms::new(1)),
            clock: Arc::new(Watched {
                clock: ManualClock::new(),
                questions: AtomicU64::new(0),
            }),
            oracle,
            seed: 0,
        }
    }

    pub fn host(&self) -> &Host {
        &self.mounted.host
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.mounted.scratch.path().to_owned()
    }

    fn dir(&self) -> PathBuf {
        self.mounted.scratch.path().join("volume")
    }

    fn open(&mut self) -> Result<(), OpenError> {
        let options = Options {
            // Rounds are frequent; what is due in them goes by the manual clock.
            publish_interval: Duration::from_millis(1),
            block_cache_bytes: CACHE_BYTES,
            dek_prefetch: 16,
            ..Options::default()
        };
        let kms: Arc<dyn KeyService> = self.kms.clone();
        self.volume = Some(Volume::open(&self.dir(), options, kms, self.clock.clone())?);
        Ok(())
    }

    fn volume(&self) -> &Volume {
        self.volume.as_ref().unwrap()
    }

    /// The inode that `path` leads to.
    fn find(&self, path: &str) -> Result<Attr, Error> {
        let volume = self.volume();
        let mut found = volume.getattr(Ino::ROOT)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            found = volume.lookup(found.ino, name.as_bytes())?;
            volume.forget(found.ino, 1);
        }
        Ok(found)
    }

    /// The directory that `path` lies in, and its name there.
    fn place<'p>(&self, path: &'p str) -> Result<(Ino, &'p [u8]), Error> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.find(dir)?.ino, name.as_bytes()))
    }

    fn perform(&mut self, op: &Op, data: &[u8]) -> Result<(Outcome, Option<Ino>), Error> {
        let volume = Arc::clone(self.volume.as_ref().unwrap());
        let file = |path: &str| self.find(path).map(|attr| attr.ino);
        let truncate = |size: usize| SetAttr {
            size: Some(size as u64),
            ..SetAttr::default()
        };
        let allocate = |path: &str, how: Fallocate, offset: usize, length: usize| {
            volume.fallocate(file(path)?, how, offset as u64, length as u64)
        };
        let rename = |from: &str, to: &str, exchange: bool| {
            let flags = RenameFlags {
                exchange,
                ..RenameFlags::default()
            };
            let ((dir, name), (new_dir, new_name)) = (self.place(from)?, self.place(to)?);
            volume.rename(dir, name, new_dir, new_name, flags)
        };
        let done = Outcome::Done(0);
        match *op {
            Op::Create(path) | Op::Mkdir(path) => {
                let (dir, name) = self.place(path)?;
                let new = if matches!(op, Op::Create(_)) { FILE } else { DIR };
                let made = volume.make(dir, name, &new)?;
                volume.forget(made.ino, 1);
                return Ok((done, Some(made.ino)));
            }
            Op::Write { path, offset, .. } => {
                let count = volume.write(file(path)?, offset as u64, data)?;
                return Ok((Outcome::Done(count), None));
            }
            Op::Truncate(path, size) => drop(volume.setattr(file(path)?, &truncate(size))?),
            Op::Punch(path, offset, length) => allocate(path, Fallocate::PunchHole, offset, length)?,
            Op::ZeroRange(path, offset, length) => {
                allocate(path, Fallocate::ZeroRange { keep_size: false }, offset, length)?
            }
            Op::Allocate(path, offset, length) => {
                allocate(path, Fallocate::Allocate { keep_size: false }, offset, length)?
            }
            Op::Fsync(path) => volume.fsync(file(path)?)?,
            Op::Rename(from, to) => rename(from, to, false)?,
            Op::Exchange(from, to) => rename(from, to, true)?,
            Op::Link(from, to) => {
                let (dir, name) = self.place(to)?;
                let linked = volume.link(file(from)?, dir, name)?;
                volume.forget(linked.ino, 1);
            }
            Op::Unlink(path) => {
                let (dir, name) = self.place(path)?;
                volume.unlink(dir, name)?;
            }
            Op::Rmdir(path) => {
                let (dir, name) = self.place(path)?;
                volume.rmdir(dir, name)?;
            }
            Op::SetXattr(path, name, _) => {
                volume.setxattr(file(path)?, name.as_bytes(), data, SetXattr::Any, false)?
            }
            Op::RemoveXattr(path, name) => volume.removexattr(file(path)?, name.as_bytes())?,
            Op::Wait => self.wait(),
            Op::Reopen => {}
        }
        Ok((done, None))
    }

    /// Lets the background do what is due, or fail at it.
    fn wait(&self) {
        let before = self.clock.questions.load(Ordering::SeqCst);
        self.clock.clock.advance(Duration::from_secs(10));
        let asked = || self.clock.questions.load(Ordering::SeqCst) - before;
        let is_settled = || {
            let status = self.volume().status();
            status.active_files == 0 && status.durable_seq == status.commit_seq
        };
        // The first questions come before the work.
        while asked() < 4 || (asked() < QUESTIONS && !is_settled()) {
            std::thread::yield_now();
        }
    }

    /// Does one thing, and tells the oracle. An error is one that the caller was not to be told.
    fn step(&mut self, op: &Op) -> Verdict<Option<Error>> {
        self.seed += 1;
        let length = match *op {
            Op::Write { length, .. } | Op::SetXattr(_, _, length) => length,
            _ => 0,
        };
        let data = noise(self.seed, length);
        for path in op.paths() {
            self.look_up(path)?;
        }
        let performed = self.perform(op, &data);
        let (outcome, made) = match &performed {
            Ok(done) => *done,
            // Two steps, of which the first may have been made.
            Err(_) if matches!(op, Op::ZeroRange(..)) => (Outcome::Failed, None),
            Err(Error::Poisoned | Error::Posix(_)) => (Outcome::Refused, None),
            Err(_) => (Outcome::Failed, None),
        };
        self.oracle.note(op, &data, outcome)?;
        if let (Some(ino), Some(path)) = (made, op.paths().first()) {
            self.oracle.looked_up(path, Some(ino.0))?;
        }
        match performed {
            Ok(_) => Ok(None),
            Err(error) => Ok(Some(error)),
        }
    }

    fn look_up(&mut self, path: &str) -> Verdict<()> {
        match self.find(path) {
            Ok(attr) if !path.is_empty() => self.oracle.looked_up(path, Some(attr.ino.0)),
            Err(Error::Posix(libc::ENOENT)) => self.oracle.looked_up(path, None),
            _ => Ok(()),
        }
    }

    /// Reads a file of the live volume back.
    fn read_back(&mut self, path: &str, may_be_lost: bool) -> Verdict<()> {
        let content = self
            .find(path)
            .map(|attr| (attr.kind == FileKind::Regular).then(|| self.content(&attr)));
        match content {
            Ok(Some(Ok(data))) => self.oracle.read(path, &data),
            Ok(Some(Err(error @ Error::Corrupt { .. }))) if !may_be_lost => {
                Err(format!("'{path}' cannot be read: {error}"))
            }
            _ => Ok(()),
        }
    }

    fn content(&self, attr: &Attr) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; attr.size as usize];
        let count = self.volume().read(attr.ino, 0, &mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    /// Everything there is. Fails if names or attributes cannot be read.
    fn see(&self) -> Result<Seen, Error> {
        let volume = self.volume();
        let mut seen = Seen::new();
        let mut dirs = vec![(String::new(), Ino::ROOT)];
        while let Some((path, dir)) = dirs.pop() {
            let mut entries = Vec::new();
            let mut from = None;
            // As the kernel does: a call that fails behind its first entries says so when it is made again from there.
            loop {
                let before = from;
                volume.readdir(dir, from.unwrap_or(Cookie::START), &mut |entry| {
                    from = Some(entry.cookie);
                    if entry.name != b"." && entry.name != b".." {
                        entries.push((String::from_utf8_lossy(entry.name).into_owned(), entry.ino));
                    }
                    Taken::Yes
                })?;
                if from == before {
                    break;
                }
            }
            for (name, ino) in entries {
                let path = if path.is_empty() {
                    name
                } else {
                    format!("{path}/{name}")
                };
                let attr = volume.getattr(ino)?;
                let mut xattrs = BTreeMap::new();
                for name in volume.listxattr(ino)? {
                    let value = volume.getxattr(ino, &name)?;
                    xattrs.insert(String::from_utf8_lossy(&name).into_owned(), value);
                }
                let content = match attr.kind {
                    FileKind::Directory => {
                        dirs.push((path.clone(), ino));
                        None
                    }
                    _ => Some(self.content(&attr).map_err(|error| error.to_string())),
                };
                let found = Found {
                    ino: ino.0,
                    nlink: attr.nlink,
                    content,
                    xattrs,
                };
                seen.insert(path, found);
            }
        }
        Ok(seen)
    }

    /// Closes and opens; false if either cannot be done, or the volume takes no more changes as it is.
    fn reopen(&mut self) -> bool {
        if self.volume().status().failed {
            return false;
        }
        let closed = self.volume.take().map(|volume| volume.close());
        if closed != Some(Ok(())) {
            return false;
        }
        self.oracle.closed();
        self.open().is_ok()
    }

    /// Does all of it, unless the volume fails before it is to be reopened.
    fn work(&mut self, ops: &[Op], may_be_lost: bool) -> Verdict<()> {
        for op in ops {
            if *op == Op::Reopen {
                if !self.reopen() {
                    return Ok(());
                }
                continue;
            }
            let error = self.step(op)?;
            if matches!(error, Some(Error::Corrupt { .. })) && !may_be_lost {
                return Err(format!("{op:?}: {}", error.unwrap()));
            }
            for path in op.paths() {
                self.read_back(path, may_be_lost)?;
            }
            if error.is_some()
                && let Ok(seen) = self.see()
            {
                self.oracle.observe(&seen)?;
            }
        }
        Ok(())
    }

    /// Everything in the live volume can be read, and is what it must be.
    fn look_around(&mut self, may_be_lost: bool) -> Verdict<()> {
        let seen = self
            .see()
            .map_err(|error| format!("once storage is well again: {error}"))?;
        let unreadable = seen.iter().find_map(|(path, found)| match &found.content {
            Some(Err(why)) => Some(format!("once storage is well again, '{path}': {why}")),
            _ => None,
        });
        if let (Some(why), false) = (unreadable, may_be_lost) {
            return Err(why);
        }
        self.oracle.observe(&seen)
    }

    /// Whether the volume takes changes. One that does not says that it failed.
    fn takes_changes(&mut self) -> Verdict<bool> {
        for op in PROBE {
            if let Some(error) = self.step(op)? {
                let has_failed = self.volume().status().failed;
                return match has_failed {
                    true => Ok(false),
                    false => Err(format!(
                        "{op:?} fails once storage is well again, and the volume has not failed: {error}"
                    )),
                };
            }
        }
        Ok(true)
    }

    /// The next mount finds what it must, works, and leaves a volume without a fault.
    fn recover(&mut self) -> Verdict<()> {
        self.open()
            .map_err(|error| format!("the volume does not open: {error}"))?;
        let seen = self.see().map_err(|error| format!("after a remount: {error}"))?;
        self.oracle
            .restart(&seen)
            .map_err(|why| format!("after a remount: {why}"))?;
        for op in PROBE {
            if let Some(error) = self.step(op)? {
                return Err(format!("after a remount {op:?} fails: {error}"));
            }
        }
        let volume = self.volume.take();
        let closed = volume.as_ref().map(|volume| volume.close());
        if let Some(Err(error)) = closed {
            return Err(format!("after a remount the volume does not close: {error}"));
        }
        drop(volume);
        self.check()
    }

    fn check(&self) -> Verdict<()> {
        let how = CheckOptions {
            scrub: true,
            ..CheckOptions::default()
        };
        let kms: Arc<dyn KeyService> = self.kms.clone();
        let report = Volume::check(&self.dir(), how, kms, self.clock.clone(), &mut |_| ());
        let report = report.map_err(|error| format!("the check breaks off: {error}"))?;
        let is_leak = |fault| fault == cmkfs::engine::Fault::LeakedSpace;
        match report.problems.iter().find(|problem| !is_leak(problem.fault)) {
            Some(problem) => Err(format!("the check finds {problem:?}")),
            None => Ok(()),
        }
    }
}

impl Template {
    pub fn make() -> Self {
        let mut machine = Machine::new(Tree::new(), Oracle::new());
        let params = CreateParams {
            cmk_arn: "acs:kms:local:1:key/test".to_owned(),
            uid: 0,
            gid: 0,
        };
        Volume::create(&machine.dir(), &params, &*machine.kms, UUID).unwrap();
        machine.open().unwrap();
        machine.work(PREPARATION, false).unwrap();
        machine.volume().close().unwrap();
        machine.volume = None;
        machine.oracle.closed();
        machine.check().unwrap();
        Self {
            tree: machine.host().tree(),
            oracle: machine.oracle.clone(),
        }
    }

    /// A machine with this volume.
    pub fn machine(&self) -> Machine {
        let mut machine = Machine::new(self.tree.clone(), self.oracle.clone());
        machine.seed = 1000;
        machine
    }
}

impl Machine {
    /// The whole of a run. What is told of it is why it is a violation.
    pub fn run(&mut self, plan: Option<Plan>, end: End) -> Verdict<Report> {
        let may_be_lost = plan.is_some_and(|plan| plan.fault == Fault::Lost);
        self.host().arm(plan);
        if self.open().is_ok() {
            self.work(WORKLOAD, may_be_lost)?;
        }
        let mut report = Report {
            sites: self.host().sites(),
            failed: self.host().failed(),
            takes_changes: None,
        };
        if plan.is_none_or(|plan| plan.length != Plan::FOR_GOOD) {
            self.host().heal();
            if self.volume.is_some() {
                self.look_around(may_be_lost)?;
                report.takes_changes = Some(self.takes_changes()?);
                self.look_around(may_be_lost)?;
            }
        }
        let volume = self.volume.take();
        if end == End::Close && volume.as_ref().is_some_and(|volume| volume.close().is_ok()) {
            self.oracle.closed();
        }
        drop(volume);
        self.host().heal();
        if end == End::PowerCut {
            let seed = plan.map_or(0, |plan| plan.site as u64);
            self.host().lose_power(seed);
        }
        self.recover()?;
        Ok(report)
    }

    /// What was done, for a person.
    pub fn history(&self) -> String {
        self.oracle.to_string()
    }
}
