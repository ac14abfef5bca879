//! A KMS in memory and a clock that tests move by hand.

use cmkfs::engine::{
    Anchor, CheckOptions, Clock, Cookie, CreateParams, Dependants, Domain, Error, Fault, FileKind, Ino,
    IssuedKey, KeyContext, KeyError, KeyService, NewNode, OpenError, Options, Position, Renewal, Report,
    Taken, Timestamp, Volume,
};
use kms_crypto::{KeySalt, Label, NONCE_LEN, Nonce, NonceSource, Sealer, SecretKey, TAG_LEN, Tag, derive};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How the KMS answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Enabled,
    Disabled,
    Destroyed,
    NoMaterial,
    Denied,
    Unreachable,
    Panic,
}

type Hook = Box<dyn FnOnce(&FakeKms) + Send>;

/// Wraps keys as a KMS does: sealed under a key of its own, bound to their context.
pub struct FakeKms {
    sealer: Sealer,
    nonces: NonceSource,
    answer: Mutex<Answer>,
    issues: AtomicU64,
    opens: AtomicU64,
    renewals: AtomicU64,
    epoch: AtomicU64,
    acknowledged: AtomicU64,
    is_refusing: AtomicBool,
    seed: u8,
    reported: Mutex<Option<Dependants>>,
    others: Mutex<BTreeMap<Domain, Arc<FakeKms>>>,
    at_position: Mutex<Option<Hook>>,
    has_ended: AtomicBool,
    /// Most tests open copies of a volume as if nobody knew.
    keeps_anchors: AtomicBool,
    anchor: Mutex<Option<Anchor>>,
}

impl FakeKms {
    pub const LEASE: Duration = Duration::from_secs(30);

    pub fn new(seed: u8) -> Self {
        let master = key_of([seed; 32]);
        Self {
            sealer: Sealer::new(derive(
                &master,
                KeySalt(&[seed]),
                Label::VolumeRecords { domain: 0 },
            )),
            nonces: NonceSource::new().unwrap(),
            answer: Mutex::new(Answer::Enabled),
            issues: AtomicU64::new(0),
            opens: AtomicU64::new(0),
            renewals: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            is_refusing: AtomicBool::new(false),
            seed,
            reported: Mutex::default(),
            others: Mutex::default(),
            at_position: Mutex::default(),
            has_ended: AtomicBool::new(false),
            keeps_anchors: AtomicBool::new(false),
            anchor: Mutex::default(),
        }
    }

    /// What it answers from now on; each is a revocation epoch of its own. That epoch.
    pub fn set(&self, answer: Answer) -> u64 {
        *self.answer.lock().unwrap() = answer;
        self.epoch.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Up to which epoch it was told that all is gone.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// It is another now, that has heard nothing.
    pub fn restart(&self) {
        self.acknowledged.store(0, Ordering::SeqCst);
    }

    /// The same for another key domain, whose key is another.
    pub fn domain(&self, domain: Domain) -> Arc<Self> {
        let mut others = self.others.lock().unwrap();
        let new = || Arc::new(Self::new(self.seed.wrapping_add(domain.0 as u8)));
        Arc::clone(others.entry(domain).or_insert_with(new))
    }

    /// Has something done when it is next asked how far it has come, as it is whenever the seal file is written.
    pub fn at_position(&self, hook: impl FnOnce(&Self) + Send + 'static) {
        *self.at_position.lock().unwrap() = Some(Box::new(hook));
    }

    /// Has it keep anchors from now on: copies of a volume are told apart.
    pub fn keep_anchors(&self) {
        self.keeps_anchors.store(true, Ordering::SeqCst);
    }

    /// The anchor that it has, which may be set.
    pub fn anchor(&self) -> MutexGuard<'_, Option<Anchor>> {
        self.anchor.lock().unwrap()
    }

    /// Whether it was given up.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// Whether somebody waits for those who wait for it.
    pub fn is_refusing(&self) -> bool {
        self.is_refusing.load(Ordering::SeqCst)
    }

    /// What it was told last that depends on the key.
    pub fn reported(&self) -> Option<Dependants> {
        *self.reported.lock().unwrap()
    }

    /// Calls that issued or opened keys.
    pub fn calls(&self) -> u64 {
        self.issues.load(Ordering::SeqCst) + self.opens.load(Ordering::SeqCst)
    }

    /// Renewals that were asked for.
    pub fn renewals(&self) -> u64 {
        self.renewals.load(Ordering::SeqCst)
    }

    fn check(&self) -> Result<(), KeyError> {
        if self.is_refusing.load(Ordering::SeqCst) {
            return Err(KeyError::Unreachable("it was told to refuse".to_owned()));
        }
        let answer = *self.answer.lock().unwrap();
        match answer {
            Answer::Enabled => Ok(()),
            Answer::Disabled => Err(KeyError::Revoked),
            Answer::Destroyed => Err(KeyError::Destroyed),
            Answer::NoMaterial => Err(KeyError::Erased),
            Answer::Denied => Err(KeyError::Denied),
            Answer::Unreachable => Err(KeyError::Unreachable("nothing listens".to_owned())),
            Answer::Panic => panic!("a defect in the adapter"),
        }
    }

    fn open_one(&self, context: &KeyContext, wrapped: &[u8]) -> Option<SecretKey> {
        let (nonce, rest) = wrapped.split_first_chunk::<NONCE_LEN>()?;
        let (tag, body) = rest.split_first_chunk::<TAG_LEN>()?;
        let mut key: [u8; 32] = body.try_into().ok()?;
        self.sealer
            .open(
                Nonce(*nonce),
                format!("{context:?}").as_bytes(),
                &mut key,
                Tag(*tag),
            )
            .ok()?;
        Some(key_of(key))
    }
}

fn key_of(bytes: [u8; 32]) -> SecretKey {
    SecretKey::fill_with(|key| {
        *key = bytes;
        Ok::<(), ()>(())
    })
    .unwrap()
}

impl KeyService for FakeKms {
    fn issue(&self, contexts: &[KeyContext]) -> Result<Vec<IssuedKey>, KeyError> {
        self.issues.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        let issue = |context: &KeyContext| {
            let key = SecretKey::generate().unwrap();
            let nonce = self.nonces.next().unwrap();
            let mut body = *key.expose();
            let tag = self
                .sealer
                .seal(nonce, format!("{context:?}").as_bytes(), &mut body)
                .unwrap();
            IssuedKey {
                wrapped: [&nonce.0[..], &tag.0, &body].concat(),
                key,
            }
        };
        Ok(contexts.iter().map(issue).collect())
    }

    fn open(&self, items: &[(KeyContext, Vec<u8>)]) -> Result<Vec<Result<SecretKey, KeyError>>, KeyError> {
        self.opens.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        Ok(items
            .iter()
            .map(|(context, wrapped)| self.open_one(context, wrapped).ok_or(KeyError::BadBlob))
            .collect())
    }

    fn renew(&self, _: Duration) -> Result<Renewal, KeyError> {
        self.renewals.fetch_add(1, Ordering::SeqCst);
        let epoch = self.epoch.load(Ordering::SeqCst);
        let state = match self.check() {
            Err(error @ KeyError::Unreachable(_)) => return Err(error),
            state => state,
        };
        Ok(Renewal {
            lease: Self::LEASE,
            epoch,
            state,
        })
    }

    fn acknowledge(&self, epoch: u64) -> Result<(), KeyError> {
        self.acknowledged.fetch_max(epoch, Ordering::SeqCst);
        Ok(())
    }

    fn position(&self) -> Position {
        let hook = self.at_position.lock().unwrap().take();
        if let Some(hook) = hook {
            hook(self);
        }
        Position {
            keystore: [7; 16],
            epoch: 1,
            state_seq: self.epoch.load(Ordering::SeqCst),
            audit_records: 0,
            audit_head: [0; 32],
        }
    }

    fn expect(&self, seen: Position) -> Result<(), KeyError> {
        let follows = self.position().follows(&seen);
        follows.then_some(()).ok_or(KeyError::RolledBack)
    }

    fn for_domain(&self, domain: Domain, _: &str) -> Result<Arc<dyn KeyService>, KeyError> {
        Ok(self.domain(domain))
    }

    fn report(&self, dependants: Dependants) -> Result<(), KeyError> {
        *self.reported.lock().unwrap() = Some(dependants);
        Ok(())
    }

    fn anchor(&self) -> Result<Option<Anchor>, KeyError> {
        self.check()?;
        Ok(*FakeKms::anchor(self))
    }

    fn advance_anchor(&self, from: Option<Anchor>, to: Anchor) -> Result<(), KeyError> {
        self.check()?;
        if !self.keeps_anchors.load(Ordering::SeqCst) {
            return Err(KeyError::Other("it keeps no anchors".to_owned()));
        }
        let mut stored = FakeKms::anchor(self);
        if *stored == Some(to) {
            return Ok(());
        }
        if *stored != from || stored.is_some_and(|stored| stored.commit_seq >= to.commit_seq) {
            return Err(KeyError::AnchorConflict);
        }
        *stored = Some(to);
        Ok(())
    }

    fn accept_restore(&self, to: Anchor) -> Result<(), KeyError> {
        self.check()?;
        *FakeKms::anchor(self) = Some(to);
        Ok(())
    }

    fn end(&self) {
        self.has_ended.store(true, Ordering::SeqCst);
    }

    fn refuse(&self, refusing: bool) {
        self.is_refusing.store(refusing, Ordering::SeqCst);
    }
}

/// A clock that stands still until it is moved.
pub struct ManualClock {
    start: Instant,
    moved: AtomicU64,
}

impl ManualClock {
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            moved: AtomicU64::new(0),
        }
    }

    pub fn advance(&self, by: Duration) {
        self.moved
            .fetch_add(u64::try_from(by.as_nanos()).unwrap(), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        let nanos = self.moved.load(Ordering::SeqCst);
        Timestamp {
            secs: 1_800_000_000 + (nanos / 1_000_000_000) as i64,
            nanos: (nanos % 1_000_000_000) as u32,
        }
    }

    fn monotonic(&self) -> Instant {
        self.start + Duration::from_nanos(self.moved.load(Ordering::SeqCst))
    }
}

/// A volume in a scratch directory, with its KMS and clock, that can be closed, dropped and opened again.
pub struct Fixture {
    pub scratch: TempDir,
    pub kms: Arc<FakeKms>,
    pub clock: Arc<ManualClock>,
    pub options: Options,
}

impl Fixture {
    pub const UUID: [u8; 16] = *b"a volume's uuid!";

    /// Makes a volume.
    pub fn new() -> Self {
        Self::prepared(|_| ())
    }

    /// Makes a volume in a directory that `prepare` has made something of.
    pub fn prepared(prepare: impl FnOnce(&Path)) -> Self {
        let fixture = Self {
            scratch: tempfile::tempdir().unwrap(),
            kms: Arc::new(FakeKms::new(1)),
            clock: Arc::new(ManualClock::new()),
            options: Options {
                // Rounds are frequent; what is due in them goes by the manual clock.
                publish_interval: Duration::from_millis(5),
                key_poll_interval: Duration::from_millis(5),
                block_cache_bytes: 8 << 20,
                ..Options::default()
            },
        };
        std::fs::create_dir(fixture.dir()).unwrap();
        prepare(&fixture.dir());
        let params = CreateParams {
            cmk_arn: "acs:kms:local:1:key/test".to_owned(),
            uid: 0,
            gid: 0,
        };
        Volume::create(&fixture.dir(), &params, &*fixture.kms, Self::UUID).unwrap();
        fixture
    }

    pub fn dir(&self) -> PathBuf {
        self.scratch.path().join("volume")
    }

    pub fn try_open(&self) -> Result<Arc<Volume>, OpenError> {
        self.try_open_at(&self.dir())
    }

    pub fn try_open_at(&self, dir: &Path) -> Result<Arc<Volume>, OpenError> {
        let kms: Arc<dyn KeyService> = self.kms.clone();
        Volume::open(dir, self.options, kms, self.clock.clone())
    }

    pub fn try_check(&self, how: CheckOptions) -> Result<Report, OpenError> {
        let kms: Arc<dyn KeyService> = self.kms.clone();
        Volume::check(&self.dir(), how, kms, self.clock.clone(), &mut |_| ())
    }

    /// Checks every record, count and block of a volume that is not open: space alone may have leaked.
    pub fn assert_consistent(&self) {
        let how = CheckOptions {
            scrub: true,
            ..CheckOptions::default()
        };
        let mut problems = self.try_check(how).unwrap().problems;
        problems.retain(|problem| problem.fault != Fault::LeakedSpace);
        assert_eq!(problems, []);
    }

    pub fn open(&self) -> Arc<Volume> {
        self.try_open().unwrap()
    }
}

/// A regular file's `NewNode`.
pub const FILE: NewNode = NewNode {
    kind: FileKind::Regular,
    perm: 0o644,
    umask: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
};
/// A directory's.
pub const DIR: NewNode = NewNode {
    kind: FileKind::Directory,
    perm: 0o755,
    umask: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
};

/// Bytes that differ between seeds and positions.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| step()).collect()
}

/// The whole content of a file.
pub fn content(volume: &Volume, ino: Ino) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; usize::try_from(volume.getattr(ino)?.size).unwrap()];
    let count = volume.read(ino, 0, &mut bytes)?;
    assert_eq!(count, bytes.len());
    Ok(bytes)
}

/// Names and inodes of a directory, `.` and `..` left out.
pub fn list(volume: &Volume, dir: Ino) -> Result<Vec<(Vec<u8>, Ino)>, Error> {
    let mut entries = Vec::new();
    volume.readdir(dir, Cookie::START, &mut |entry| {
        if entry.name != b"." && entry.name != b".." {
            entries.push((entry.name.to_vec(), entry.ino));
        }
        Taken::Yes
    })?;
    entries.sort();
    Ok(entries)
}

/// Waits until `holds`; fails after a minute, which is no matter of timing.
pub fn eventually(mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it did not come about within a minute"
        );
        std::thread::yield_now();
    }
}

/// Copies a directory with all that is in it.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_dir(&entry.path(), &target),
            _ => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Every file below a directory, in a fixed order.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path)
            } else {
                files.push(path)
            }
        }
    }
    files.sort();
    files
}

/// Changes one bit of a byte.
pub fn flip(file: &Path, at: u64) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1 << (at % 8);
    file.write_all_at(&byte, at).unwrap();
}
