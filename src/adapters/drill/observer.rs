//! The observing process: unprivileged, apart from everything that it watches. It writes the markers, keeps files open and
//! mapped, and logs begin, end and errno of every access, by CLOCK_BOOTTIME. It is told what to do in lines on its
//! standard input, and answers in lines on its standard output.
//!
//! It holds files of a mount that may be stopped, so it neither forks nor executes anything: closing the copies of their
//! descriptors would wait for that mount.

use super::markers::{BLOCK, Kind, Markers, Nonce};
use super::timeline::{Access, DIFFERENT, Record};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of each access that are compared with what was written.
const PROBE: usize = 64;
/// Between two accesses of a kind that are logged, in microseconds: around a revocation, and else.
const HOT_PACE_US: u64 = 150;
const CALM_PACE_US: u64 = 4000;
/// Records of one kind that are kept, so that a drill that nobody ends does not fill the memory.
const RECORDS_MAX: usize = 1 << 20;
/// Name of the attribute.
const ATTRIBUTE: &str = "user.drill";

/// CLOCK_BOOTTIME, in nanoseconds.
#[must_use]
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// Runs the observer until its standard input ends.
///
/// # Errors
/// If it cannot become unprivileged, or hears nothing it understands.
pub fn run() -> Result<(), String> {
    // It is of no use to anybody once the drill is gone.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| format!("observer: {error}"))?;
    let mut watched = None;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| format!("observer: {error}"))?;
        let words: Vec<&str> = line.split('\t').collect();
        let answer = obey(&words, &mut watched).unwrap_or_else(|error| format!("error\t{error}"));
        let mut out = io::stdout().lock();
        writeln!(out, "{}", answer.replace('\n', " "))
            .and_then(|()| out.flush())
            .map_err(|error| format!("observer: {error}"))?;
    }
    Ok(())
}

fn obey(words: &[&str], watched: &mut Option<Watched>) -> Result<String, String> {
    match (words, watched.as_mut()) {
        (["enter", dir], None) => enter(dir),
        (["become", uid], None) => become_user(uid),
        (["plant", dir, nonce, large], None) => {
            let markers = parse(nonce, large)?;
            plant(Path::new(dir), &markers)
                .map_err(|error| format!("the markers cannot be written: {error}"))?;
            *watched = Some(Watched::open(Path::new(dir), markers)?);
            Ok("ok".to_owned())
        }
        (["open", dir, nonce, large], None) => {
            *watched = Some(Watched::open(Path::new(dir), parse(nonce, large)?)?);
            Ok("ok".to_owned())
        }
        (["start"], Some(watched)) => watched.start(),
        (["hot"], Some(watched)) => watched.pace(HOT_PACE_US),
        (["calm"], Some(watched)) => watched.pace(CALM_PACE_US),
        (["checksums"], Some(watched)) => Ok(format!("ok\t{}", watched.checksums())),
        (["stir"], Some(watched)) => watched.stir(),
        (["ease"], Some(watched)) => watched.ease(),
        (["stop"], Some(watched)) => watched.stop(),
        (["dump"], Some(watched)) => watched.dump(),
        _ => Err("not understood".to_owned()),
    }
}

fn parse(nonce: &str, large: &str) -> Result<Markers, String> {
    let large = large.parse().map_err(|_| "no size".to_owned())?;
    Ok(Markers::new(Nonce::parse(nonce)?, large))
}

/// Works in a directory that it may not be able to reach once it has no privileges any more.
fn enter(dir: &str) -> Result<String, String> {
    std::env::set_current_dir(dir).map_err(|error| format!("{dir}: {error}"))?;
    Ok("ok".to_owned())
}

/// Gives up every privilege for good.
fn become_user(uid: &str) -> Result<String, String> {
    let uid: libc::uid_t = uid.parse().map_err(|_| "no uid".to_owned())?;
    // SAFETY: none of these calls takes memory of ours but the first, which is told that there is none. libc changes
    // the credentials of every thread.
    let done = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(uid, uid, uid) == 0
            && libc::setresuid(uid, uid, uid) == 0
    };
    if done {
        Ok("ok".to_owned())
    } else {
        Err(format!("cannot become uid {uid}: {}", io::Error::last_os_error()))
    }
}

/// Writes everything, each kind in its way, and has it stored.
fn plant(dir: &Path, markers: &Markers) -> io::Result<()> {
    for kind in Kind::ALL {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.join(markers.name(kind)))?;
        file.set_len(markers.length(kind))?;
        if kind == Kind::Mapped {
            let mut map = Map::new(&file, markers.length(kind), libc::MAP_SHARED, true)?;
            for block in markers.blocks(kind) {
                map.fill(offset(block), &markers.block(kind, block));
            }
            map.sync()?;
        } else {
            for block in markers.blocks(kind) {
                file.write_all_at(&markers.block(kind, block), offset(block))?;
            }
        }
        file.sync_all()?;
    }
    std::os::unix::fs::symlink(markers.target(), dir.join(markers.link()))?;
    let small = dir.join(markers.name(Kind::Small));
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&small, ATTRIBUTE, markers.attribute().as_bytes(), flags)?;
    File::open(small)?.sync_all()?;
    File::open(dir)?.sync_all()
}

const fn offset(block: u64) -> u64 {
    block * BLOCK as u64
}

/// A mapping whose pages only the kernel touches, but for [`Map::fill`].
struct Map {
    at: *mut u8,
    length: usize,
}

// SAFETY: the mapping stays where it is until the last user drops it; through a shared reference it is only named to
// the kernel.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: &File, length: u64, how: i32, is_writable: bool) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | if is_writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, how, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            at: at.cast(),
            length,
        })
    }

    fn fill(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if at.checked_add(bytes.len()).is_some_and(|end| end <= self.length) {
            // SAFETY: the range lies within the mapping, which is writable wherever this is called, and nobody else has
            // a reference into it.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(at), bytes.len()) };
        }
    }

    fn sync(&self) -> io::Result<()> {
        // SAFETY: the whole mapping.
        match unsafe { libc::msync(self.at.cast(), self.length, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads through a pipe: write(2) fails with EFAULT where a load would be answered by SIGBUS.
    fn read(&self, pipe: &mut Pipe, at: u64, out: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(at).map_err(io::Error::other)?;
        if at.checked_add(out.len()).is_none_or(|end| end > self.length) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the range lies within the mapping, and the kernel alone reads it.
        let written = unsafe { libc::write(pipe.writer.as_raw_fd(), self.at.add(at).cast(), out.len()) };
        let Ok(written) = usize::try_from(written) else {
            return Err(io::Error::last_os_error());
        };
        let (got, rest) = out.split_at_mut(written.min(out.len()));
        pipe.reader.read_exact(got)?;
        // The kernel wrote what it could: the next page is the one that faults.
        if rest.is_empty() {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EFAULT))
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody refers to it any more.
        unsafe { libc::munmap(self.at.cast(), self.length) };
    }
}

struct Pipe {
    reader: io::PipeReader,
    writer: io::PipeWriter,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Self { reader, writer })
    }
}

/// The files that are watched, held open and mapped from the beginning.
struct Files {
    dir: PathBuf,
    markers: Markers,
    handles: Vec<(Kind, File)>,
    shared: Map,
    private: Map,
}

impl Files {
    fn open(dir: &Path, markers: Markers) -> io::Result<Self> {
        let open = |kind| {
            let path = dir.join(markers.name(kind));
            File::options().read(true).write(true).open(path)
        };
        let mapped = open(Kind::Mapped)?;
        let length = markers.length(Kind::Mapped);
        let shared = Map::new(&mapped, length, libc::MAP_SHARED, false)?;
        let private = Map::new(&mapped, length, libc::MAP_PRIVATE, false)?;
        let handles = Kind::ALL
            .into_iter()
            .map(|kind| Ok((kind, open(kind)?)))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            dir: dir.to_owned(),
            handles,
            shared,
            private,
            markers,
        })
    }

    fn handle(&self, kind: Kind) -> io::Result<&File> {
        let found = self.handles.iter().find(|(of, _)| *of == kind);
        found
            .map(|(_, file)| file)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn path(&self, kind: Kind) -> PathBuf {
        self.dir.join(self.markers.name(kind))
    }

    /// Makes one access; false if what came is not what was written.
    fn access(&self, access: Access, turn: &Turn, pipe: &mut Pipe) -> io::Result<bool> {
        let (at, expected) = (offset(turn.block), &turn.expected);
        let mut got = [0; PROBE];
        match access {
            Access::Small => {
                File::open(self.path(Kind::Small))?.read_exact_at(&mut got, at)?;
            }
            Access::Large => self.handle(Kind::Large)?.read_exact_at(&mut got, at)?,
            Access::Sparse => self.handle(Kind::Sparse)?.read_exact_at(&mut got, at)?,
            Access::Open => self.handle(Kind::Open)?.read_exact_at(&mut got, at)?,
            Access::MappedShared => self.shared.read(pipe, at, &mut got)?,
            Access::MappedPrivate => self.private.read(pipe, at, &mut got)?,
            Access::Write => {
                // What stands there already: nothing is to be different afterwards.
                self.handle(Kind::Open)?.write_all_at(expected, at)?;
                return Ok(true);
            }
            Access::List => {
                let name = self.markers.name(Kind::Large);
                let mut found = false;
                for entry in fs::read_dir(&self.dir)? {
                    found |= entry?.file_name() == name.as_str();
                }
                return Ok(found);
            }
            Access::Stat => {
                return Ok(fs::metadata(self.path(Kind::Large))?.len() == self.markers.length(Kind::Large));
            }
            Access::Link => {
                let said = fs::read_link(self.dir.join(self.markers.link()))?;
                return Ok(said == Path::new(&self.markers.target()));
            }
            Access::Attribute => {
                let mut value = [0; 64];
                let length = rustix::fs::getxattr(self.path(Kind::Small), ATTRIBUTE, &mut value[..])?;
                return Ok(value.get(..length) == Some(self.markers.attribute().as_bytes()));
            }
        }
        Ok(got.as_slice() == expected.as_slice())
    }

    fn stir(&self) -> io::Result<()> {
        let path = self.dir.join(format!("{}-stir", self.markers.name(Kind::Large)));
        let file = File::create(&path)?;
        for block in self.markers.blocks(Kind::Large).take(256) {
            file.write_all_at(&self.markers.block(Kind::Large, block), offset(block))?;
        }
        file.sync_all()?;
        drop(file);
        fs::remove_file(path)?;
        for number in 0..20 {
            let path = self.dir.join(format!("{}-{number}", self.markers.link()));
            fs::create_dir(&path)?;
            fs::remove_dir(&path)?;
        }
        Ok(())
    }

    /// SHA-256 of every file through each way to read it; an errno where one fails.
    fn checksums(&self) -> String {
        let mut each = Vec::new();
        for kind in Kind::ALL {
            let text = |sum: io::Result<String>| match sum {
                Ok(sum) => sum,
                Err(error) => format!("errno {}", error.raw_os_error().unwrap_or_default()),
            };
            let open = self.handle(kind).and_then(|file| self.sum_of(kind, file));
            let fresh = File::open(self.path(kind)).and_then(|file| self.sum_of(kind, &file));
            each.push(format!(
                "{} handle={} fresh={}",
                kind.name(),
                text(open),
                text(fresh)
            ));
            if kind == Kind::Mapped {
                let shared = text(self.sum_of_map(&self.shared));
                let private = text(self.sum_of_map(&self.private));
                each.push(format!("mappings shared={shared} private={private}"));
            }
        }
        each.join(";")
    }

    fn sum_of(&self, kind: Kind, file: &File) -> io::Result<String> {
        let mut hash = Sha256::new();
        let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
        loop {
            let read = file.read_at(&mut buffer, at)?;
            let Some(bytes @ [_, ..]) = buffer.get(..read) else {
                break;
            };
            hash.update(bytes);
            at += read as u64;
        }
        if at == self.markers.length(kind) {
            Ok(hex::encode(hash.finalize()))
        } else {
            Err(io::Error::from_raw_os_error(libc::ENODATA))
        }
    }

    fn sum_of_map(&self, map: &Map) -> io::Result<String> {
        let mut pipe = Pipe::new()?;
        let mut hash = Sha256::new();
        let mut page = [0; BLOCK];
        for block in self.markers.blocks(Kind::Mapped) {
            map.read(&mut pipe, offset(block), &mut page)?;
            hash.update(page);
        }
        Ok(hex::encode(hash.finalize()))
    }
}

/// One place that an access goes to, and what is there.
struct Turn {
    block: u64,
    expected: Vec<u8>,
}

fn turns(markers: &Markers, access: Access) -> Vec<Turn> {
    let kind = access.file();
    let blocks: Vec<u64> = markers.blocks(kind).collect();
    // As many as show every part of a file, few enough to be kept.
    let step = blocks.len().div_ceil(64).max(1);
    let each = blocks.into_iter().step_by(step).map(|block| {
        let mut expected = markers.block(kind, block);
        expected.truncate(PROBE);
        Turn { block, expected }
    });
    each.collect()
}

struct Shared {
    files: Files,
    pace_us: AtomicU64,
    is_stopped: AtomicBool,
    is_eased: AtomicBool,
}

/// What a reader without pauses did: it logs no more than this.
#[derive(Default)]
struct Load {
    successes: u64,
    last_success_ns: u64,
    failures: u64,
}

struct Watched {
    shared: Arc<Shared>,
    loops: Vec<JoinHandle<Vec<Record>>>,
    loads: Vec<JoinHandle<Load>>,
    records: Arc<Mutex<Vec<Record>>>,
}

impl Watched {
    fn open(dir: &Path, markers: Markers) -> Result<Self, String> {
        let files =
            Files::open(dir, markers).map_err(|error| format!("the markers cannot be opened: {error}"))?;
        Ok(Self {
            shared: Arc::new(Shared {
                files,
                pace_us: AtomicU64::new(CALM_PACE_US),
                is_stopped: AtomicBool::new(false),
                is_eased: AtomicBool::new(false),
            }),
            loops: Vec::new(),
            loads: Vec::new(),
            records: Arc::default(),
        })
    }

    /// A loop for each kind of access, and two that pause never.
    fn start(&mut self) -> Result<String, String> {
        let failed = |error: io::Error| error.to_string();
        for access in Access::ALL {
            let shared = Arc::clone(&self.shared);
            let pipe = Pipe::new().map_err(failed)?;
            let work = move || observe(&shared, access, pipe);
            self.loops
                .push(std::thread::Builder::new().spawn(work).map_err(failed)?);
        }
        for access in [Access::Large, Access::MappedShared] {
            let shared = Arc::clone(&self.shared);
            let pipe = Pipe::new().map_err(failed)?;
            let work = move || burden(&shared, access, pipe);
            self.loads
                .push(std::thread::Builder::new().spawn(work).map_err(failed)?);
        }
        Ok("ok".to_owned())
    }

    fn pace(&self, pace_us: u64) -> Result<String, String> {
        self.shared.pace_us.store(pace_us, Ordering::Relaxed);
        Ok("ok".to_owned())
    }

    /// Ends the loops that pause never, and says what they did.
    fn ease(&mut self) -> Result<String, String> {
        self.shared.is_eased.store(true, Ordering::Relaxed);
        let mut sum = Load::default();
        for load in self.loads.drain(..) {
            let load = load.join().map_err(|_| "a loop panicked".to_owned())?;
            sum.successes += load.successes;
            sum.failures += load.failures;
            sum.last_success_ns = sum.last_success_ns.max(load.last_success_ns);
        }
        Ok(format!(
            "ok\t{}\t{}\t{}",
            sum.successes, sum.last_success_ns, sum.failures
        ))
    }

    fn stop(&mut self) -> Result<String, String> {
        self.shared.is_stopped.store(true, Ordering::Relaxed);
        let mut count = 0;
        for looping in self.loops.drain(..) {
            let records = looping.join().map_err(|_| "a loop panicked".to_owned())?;
            count += records.len();
            self.records.lock().extend(records);
        }
        Ok(format!("ok\t{count}"))
    }

    /// Every record, in the order of beginning, then a line that tells that there are no more.
    fn dump(&self) -> Result<String, String> {
        let mut records = self.records.lock();
        records.sort_by_key(|record| record.begin_ns);
        let mut out = io::BufWriter::new(io::stdout().lock());
        for record in records.iter() {
            writeln!(out, "{}", record.line()).map_err(|error| error.to_string())?;
        }
        out.flush().map_err(|error| error.to_string())?;
        Ok("end".to_owned())
    }

    fn checksums(&self) -> String {
        self.shared.files.checksums()
    }

    /// Has the mount handle content and names right now, whatever the kernel caches.
    fn stir(&self) -> Result<String, String> {
        self.shared.files.stir().map_err(|error| error.to_string())?;
        Ok("ok".to_owned())
    }
}

fn observe(shared: &Shared, access: Access, mut pipe: Pipe) -> Vec<Record> {
    let turns = turns(&shared.files.markers, access);
    let mut records = Vec::with_capacity(1 << 14);
    for turn in turns.iter().cycle() {
        if shared.is_stopped.load(Ordering::Relaxed) || records.len() >= RECORDS_MAX {
            break;
        }
        let begin_ns = boottime_ns();
        let outcome = shared.files.access(access, turn, &mut pipe);
        let end_ns = boottime_ns();
        records.push(Record {
            access,
            begin_ns,
            end_ns,
            errno: match outcome {
                Ok(true) => 0,
                Ok(false) => DIFFERENT,
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            },
        });
        std::thread::sleep(Duration::from_micros(shared.pace_us.load(Ordering::Relaxed)));
    }
    records
}

fn burden(shared: &Shared, access: Access, mut pipe: Pipe) -> Load {
    let turns = turns(&shared.files.markers, access);
    let mut load = Load::default();
    for turn in turns.iter().cycle() {
        if shared.is_eased.load(Ordering::Relaxed) {
            break;
        }
        let begin_ns = boottime_ns();
        if shared.files.access(access, turn, &mut pipe).is_ok() {
            load.successes += 1;
            load.last_success_ns = begin_ns;
        } else {
            load.failures += 1;
            // The refused loop is not to take the processor from those that log.
            std::thread::sleep(Duration::from_micros(HOT_PACE_US));
        }
    }
    load
}
