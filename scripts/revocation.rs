//! The work of revocation.sh: std only, built by plain rustc.
//!
//! `revocation fill` makes the files that are read; `revocation herd` starts the processes that read and write them, and obeys
//! lines of its standard input: `cycles N`, `revoke`, `restore`. It prints one line that begins with `done` or `failed` for
//! each. `revocation verify` compares what writers wrote with their journals. What is where comes in the environment.
//!
//! The processes of the herd hold files open and mapped; the herd itself holds none, since whatever it starts would close
//! copies of them, and wait for a mount that may be stopped. Each access is stamped before it begins and when it has ended, in a
//! ring that the herd reads. Mapped pages are touched by read(2) and write(2), which fail with EFAULT where a load or a store
//! would be answered by SIGBUS.
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, Error, PipeReader, PipeWriter, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, process, ptr, slice, thread};

const PAGE: usize = 4096;
const CONTENT_FILES: usize = 8;
const READERS: [Role; 9] = [
    Role::Buffered,
    Role::Direct,
    Role::Shared,
    Role::Private,
    Role::Buffered,
    Role::Direct,
    Role::Shared,
    Role::Private,
    Role::Names,
];
const WRITERS: [Role; 4] = [Role::WriteFsync, Role::MapMsync, Role::Append, Role::WriteDirect];
/// Pages of a file that is written to in place.
const SLOTS: usize = 512;
/// Longest record that is appended.
const RECORD_MAX: u64 = 6000;
const APPENDED_MAX: u64 = 256 << 20;
/// How many writes one fsync or msync covers.
const WRITES_PER_SYNC: u64 = 8;
/// What one process may log before the herd reads it.
const RING: u64 = 1 << 20;
/// How long a command, or any process of the herd, may take before it counts as stuck.
const STUCK_S: u64 = 60;

mod c {
    pub const PROT_READ: i32 = 1;
    pub const PROT_WRITE: i32 = 2;
    pub const MAP_SHARED: i32 = 1;
    pub const MAP_PRIVATE: i32 = 2;
    pub const MS_SYNC: i32 = 4;
    pub const CLOCK_MONOTONIC: i32 = 1;
    pub const PR_SET_PDEATHSIG: i32 = 1;
    pub const SIGKILL: usize = 9;
    #[cfg(target_arch = "aarch64")]
    pub const O_DIRECT: i32 = 0o200000;
    #[cfg(not(target_arch = "aarch64"))]
    pub const O_DIRECT: i32 = 0o40000;

    #[repr(C)]
    pub struct Timespec {
        pub seconds: i64,
        pub nanoseconds: i64,
    }

    unsafe extern "C" {
        pub fn mmap(at: *mut u8, length: usize, protection: i32, flags: i32, fd: i32, offset: i64)
        -> *mut u8;
        pub fn msync(at: *mut u8, length: usize, flags: i32) -> i32;
        pub fn write(fd: i32, from: *const u8, length: usize) -> isize;
        pub fn read(fd: i32, to: *mut u8, length: usize) -> isize;
        pub fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
        pub fn prctl(option: i32, ...) -> i32;
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, the same for all processes.
fn now() -> u64 {
    let mut time = c::Timespec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: the pointer is to a local of the right type.
    unsafe { c::clock_gettime(c::CLOCK_MONOTONIC, &mut time) };
    time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64
}

/// A bijection of 64 bits that looks random (splitmix64).
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % limit
    }
}

/// A mapping of a file, for as long as the process lives.
fn map(file: &File, length: usize, protection: i32, flags: i32) -> Result<*mut u8> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe { c::mmap(ptr::null_mut(), length, protection, flags, file.as_raw_fd(), 0) };
    if at as isize == -1 {
        Err(Error::last_os_error())
    } else {
        Ok(at)
    }
}

/// Words of a file outside the mount that several processes share.
fn shared_words(path: &Path, count: usize) -> Result<&'static [AtomicU64]> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.set_len(count as u64 * 8)?;
    let at = map(&file, count * 8, c::PROT_READ | c::PROT_WRITE, c::MAP_SHARED)?;
    // SAFETY: mapped, aligned to a page, never unmapped, and only ever used as atomics.
    Ok(unsafe { slice::from_raw_parts(at.cast(), count) })
}

struct World {
    mnt: PathBuf,
    state: PathBuf,
    inodes: usize,
    content: usize,
}

impl World {
    fn from_env() -> Result<Self> {
        Ok(Self {
            mnt: variable("MNT")?.into(),
            state: variable("STATE")?.into(),
            inodes: number("INODES")?,
            content: number("CONTENT_MIB")? << 20,
        })
    }

    /// Pages of each file that is read.
    fn pages(&self) -> usize {
        self.content / CONTENT_FILES / PAGE
    }

    fn content_file(&self, number: usize) -> PathBuf {
        self.mnt.join(format!("content-{number}"))
    }

    fn inode(&self, number: usize) -> PathBuf {
        self.mnt.join(format!("inodes/{}/{number}", number % 100))
    }

    fn few(&self) -> PathBuf {
        self.mnt.join("few")
    }

    fn written(&self, role: Role) -> PathBuf {
        self.mnt.join(format!("written-{role:?}"))
    }

    fn fill(&self) -> Result<()> {
        let mut chunk = vec![0; 1 << 20];
        for number in 0..CONTENT_FILES {
            let mut file = File::create(self.content_file(number))?;
            for first in (0..self.pages()).step_by(chunk.len() / PAGE) {
                for (page, bytes) in chunk.chunks_exact_mut(PAGE).enumerate() {
                    fill_page(content_seed(number, first + page), bytes);
                }
                let pages = (self.pages() - first).min(chunk.len() / PAGE);
                file.write_all(&chunk[..pages * PAGE])?;
            }
            file.sync_all()?;
        }
        for directory in 0..100 {
            fs::create_dir_all(self.mnt.join(format!("inodes/{directory}")))?;
        }
        for number in 0..self.inodes {
            fs::write(self.inode(number), number.to_string())?;
        }
        fs::create_dir(self.few())?;
        for number in 0..16 {
            std::os::unix::fs::symlink(number.to_string(), self.few().join(number.to_string()))?;
        }
        File::open(self.few())?.sync_all()
    }

    /// Has the kernel cache everything.
    fn warm(&self) -> Result<()> {
        let mut chunk = vec![0; 1 << 20];
        for number in 0..CONTENT_FILES {
            let mut file = File::open(self.content_file(number))?;
            while file.read(&mut chunk)? > 0 {}
        }
        for number in 0..self.inodes {
            fs::symlink_metadata(self.inode(number))?;
        }
        Ok(())
    }
}

fn variable(name: &str) -> Result<String> {
    env::var(name).map_err(|_| Error::other(format!("{name} is not in the environment")))
}

fn number(name: &str) -> Result<usize> {
    variable(name)?
        .parse()
        .map_err(|_| Error::other(format!("{name} is no number")))
}

fn content_seed(file: usize, page: usize) -> u64 {
    mix(((file as u64) << 40) | page as u64)
}

/// Word 0 is `seed` itself.
fn fill_page(seed: u64, page: &mut [u8]) {
    for (place, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&word_of(seed, place).to_ne_bytes());
    }
}

fn word_of(seed: u64, place: usize) -> u64 {
    seed.wrapping_mul(2 * place as u64 + 1)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Buffered,
    Direct,
    Shared,
    Private,
    Names,
    WriteFsync,
    MapMsync,
    Append,
    WriteDirect,
}

/// What an access was, as far as the count is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// Shows content or a name to a program, or takes content of it into the kernel's cache.
    Access,
    /// fsync, msync: shows nothing.
    Sync,
}

/// Where one process logs its accesses: how many there are, how many the herd has read, and then two words for each.
#[derive(Clone, Copy)]
struct Log {
    words: &'static [AtomicU64],
}

struct Entry {
    begin: u64,
    what: What,
    errno: u32,
}

const LOG_STALLS: usize = 2;
/// Content that was not what was written there.
const LOG_WRONG: usize = 3;
const LOG_ENTRIES: usize = 8;

impl Log {
    fn of(world: &World, number: usize) -> Result<Self> {
        let words = shared_words(
            &world.state.join(format!("log-{number}")),
            LOG_ENTRIES + RING as usize * 2,
        )?;
        Ok(Self { words })
    }

    /// Makes an access, and logs it.
    fn time<T>(&self, what: What, access: impl FnOnce() -> Result<T>) -> Result<T> {
        let count = self.words[0].load(Ordering::Relaxed);
        while count - self.words[1].load(Ordering::Acquire) >= RING {
            self.words[LOG_STALLS].fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
        let begin = now();
        let outcome = access();
        let took_us = (now() - begin) / 1000;
        let errno = match &outcome {
            Ok(_) => 0,
            Err(error) => error.raw_os_error().unwrap_or(0xffff) as u64,
        };
        let place = LOG_ENTRIES + (count % RING) as usize * 2;
        self.words[place].store(begin, Ordering::Relaxed);
        let packed = (took_us.min(u64::from(u32::MAX)) << 32) | ((what as u64) << 16) | errno;
        self.words[place + 1].store(packed, Ordering::Relaxed);
        self.words[0].store(count + 1, Ordering::Release);
        outcome
    }

    fn wrong(&self, what: &str) {
        eprintln!("wrong content: {what}");
        self.words[LOG_WRONG].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.words[0].load(Ordering::Acquire)
    }

    /// Adds what was logged since this was last asked.
    fn drain(&self, to: &mut Vec<Entry>) {
        let (from, until) = (self.words[1].load(Ordering::Relaxed), self.count());
        for number in from..until {
            let place = LOG_ENTRIES + (number % RING) as usize * 2;
            let packed = self.words[place + 1].load(Ordering::Relaxed);
            to.push(Entry {
                begin: self.words[place].load(Ordering::Relaxed),
                what: if (packed >> 16) & 0xff == 0 {
                    What::Access
                } else {
                    What::Sync
                },
                errno: (packed & 0xffff) as u32,
            });
        }
        self.words[1].store(until, Ordering::Release);
    }
}

/// Moves bytes between mapped pages and memory by system calls.
struct Mover {
    out: PipeReader,
    into: PipeWriter,
}

impl Mover {
    fn new() -> Result<Self> {
        let (out, into) = std::io::pipe()?;
        Ok(Self { out, into })
    }

    /// # Safety
    /// `from` is the address of a mapping, whatever lies behind it.
    unsafe fn load(&mut self, from: *const u8) -> Result<u64> {
        let mut bytes = [0; 8];
        // SAFETY: the kernel looks whether it can read there.
        match unsafe { c::write(self.into.as_raw_fd(), from, bytes.len()) } {
            -1 => Err(Error::last_os_error()),
            count => {
                self.out.read_exact(&mut bytes[..count as usize])?;
                Ok(u64::from_ne_bytes(bytes))
            }
        }
    }

    /// # Safety
    /// `to` is the address of a page of a mapping that nothing refers to.
    unsafe fn store(&mut self, to: *mut u8, page: &[u8]) -> Result<()> {
        self.into.write_all(page)?;
        // SAFETY: the kernel looks whether it can write there.
        let count = unsafe { c::read(self.out.as_raw_fd(), to, page.len()) };
        let error = Error::last_os_error();
        let stored = usize::try_from(count).unwrap_or(0);
        self.out.read_exact(&mut vec![0; page.len() - stored])?;
        if stored == page.len() { Ok(()) } else { Err(error) }
    }
}

#[repr(align(4096))]
struct Aligned([u8; PAGE]);

fn read_for_ever(world: &World, role: Role, log: Log) -> Result<()> {
    let mut random = Random(u64::from(process::id()) << 32);
    let pages = world.pages();
    let flags = if role == Role::Direct { c::O_DIRECT } else { 0 };
    let files: Vec<File> = (0..CONTENT_FILES)
        .map(|number| {
            OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(world.content_file(number))
        })
        .collect::<Result<_>>()?;
    let how = if role == Role::Private {
        c::MAP_PRIVATE
    } else {
        c::MAP_SHARED
    };
    let maps: Vec<*mut u8> = files
        .iter()
        .map(|file| map(file, pages * PAGE, c::PROT_READ, how))
        .collect::<Result<_>>()?;
    let mut mover = Mover::new()?;
    let mut page_of = Box::new(Aligned([0; PAGE]));
    let mut look = |number: usize, page: usize| match role {
        Role::Buffered | Role::Direct => {
            let count = files[number].read_at(&mut page_of.0, (page * PAGE) as u64)?;
            if count != PAGE {
                return Err(Error::other("a short read"));
            }
            let mut whole = [0; PAGE];
            fill_page(content_seed(number, page), &mut whole);
            Ok(if page_of.0 == whole {
                content_seed(number, page)
            } else {
                !content_seed(number, page)
            })
        }
        // SAFETY: the address lies within the mapping.
        _ => unsafe { mover.load(maps[number].add(page * PAGE)) },
    };
    // What is not cached to begin with would be asked for while the mount is stopped.
    for number in 0..CONTENT_FILES {
        for page in 0..pages.min(256) {
            look(number, page)?;
        }
    }
    ready()?;
    loop {
        let number = random.below(CONTENT_FILES as u64) as usize;
        // Half of the accesses go where everybody's do.
        let reach = if random.below(2) == 0 {
            pages.min(256)
        } else {
            pages
        };
        let page = random.below(reach as u64) as usize;
        if let Ok(word) = log.time(What::Access, || look(number, page))
            && word != content_seed(number, page)
        {
            log.wrong(&format!("{role:?} reader, file {number}, page {page}"));
        }
    }
}

/// Looks at what is no content: names, attributes, targets of links.
fn look_for_ever(world: &World, log: Log) -> Result<()> {
    let mut random = Random(u64::from(process::id()) << 32);
    let (held, directory) = (File::open(world.inode(0))?, world.few());
    let held_directory = File::open(&directory)?;
    ready()?;
    loop {
        let inode = world.inode(random.below(world.inodes as u64) as usize);
        let link = directory.join(random.below(16).to_string());
        let _logged = match random.below(6) {
            0 => log.time(What::Access, || fs::symlink_metadata(&inode).map(drop)),
            1 => log.time(What::Access, || fs::read(&inode).map(drop)),
            2 => log.time(What::Access, || fs::read_link(&link).map(drop)),
            3 => log.time(What::Access, || {
                fs::read_dir(&directory)?.try_for_each(|entry| entry.map(drop))
            }),
            4 => log.time(What::Access, || held.metadata().map(drop)),
            _ => log.time(What::Access, || held_directory.metadata().map(drop)),
        };
    }
}

fn ready() -> Result<()> {
    println!("ready");
    std::io::stdout().flush()
}

/// What a writer was told of what it wrote: for each page in place, or of a stream of appended bytes.
struct Journal {
    words: &'static [AtomicU64],
}

#[derive(Clone, Copy)]
struct Acknowledged {
    /// Last version of which a write was tried: one more than `accepted` after it failed.
    attempted: u64,
    /// Last version of which a write succeeded.
    accepted: u64,
    /// Last version that a sync covered.
    synced: u64,
}

impl Journal {
    fn of(world: &World, role: Role) -> Result<Self> {
        let words = shared_words(&world.state.join(format!("journal-{role:?}")), SLOTS * 3)?;
        Ok(Self { words })
    }

    fn get(&self, slot: usize) -> Acknowledged {
        let [attempted, accepted, synced] =
            [0, 1, 2].map(|n| self.words[slot * 3 + n].load(Ordering::SeqCst));
        Acknowledged {
            attempted,
            accepted,
            synced,
        }
    }

    fn set(&self, slot: usize, is: Acknowledged) {
        for (n, value) in [is.attempted, is.accepted, is.synced].into_iter().enumerate() {
            self.words[slot * 3 + n].store(value, Ordering::SeqCst);
        }
    }
}

fn slot_seed(role: Role, slot: usize, version: u64) -> u64 {
    // Its lower half says which version it is.
    if version == 0 {
        0
    } else {
        (mix((role as u64) << 32 | slot as u64) << 32) | version
    }
}

/// The bytes at `offset` of a stream.
fn fill_stream(offset: u64, bytes: &mut [u8]) {
    for (place, byte) in bytes.iter_mut().enumerate() {
        let at = offset + place as u64;
        *byte = mix(at / 8).to_ne_bytes()[(at % 8) as usize];
    }
}

/// What a writer finds.
#[derive(Default, Debug)]
struct Findings {
    /// Synced, and not there.
    lost_synced: u64,
    /// Accepted, not synced, and not there.
    lost_accepted: u64,
    /// Never written so.
    wrong: u64,
}

/// Compares a file with its journal, which says thereafter what was found.
fn verify(world: &World, role: Role, after_crash: bool) -> Result<Findings> {
    let journal = Journal::of(world, role)?;
    let path = world.written(role);
    let mut found = Findings::default();
    let say = |what: String| eprintln!("{role:?} writer: {what}");
    if role == Role::Append {
        let is = journal.get(0);
        let file = File::open(&path)?;
        let size = file.metadata()?.len();
        if size < is.synced {
            found.lost_synced += is.synced - size;
            say(format!("{size} bytes, {} were synced", is.synced));
        } else if size < is.accepted && !after_crash {
            found.lost_accepted += is.accepted - size;
            say(format!("{size} bytes, {} were accepted", is.accepted));
        }
        let (mut bytes, mut whole) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        // What came since the last look, and some of before.
        let mut at = journal.get(1).accepted.min(size).saturating_sub(1 << 20);
        while at < size {
            let count = file.read_at(&mut bytes, at)?;
            fill_stream(at, &mut whole[..count]);
            if count == 0 || bytes[..count] != whole[..count] {
                found.wrong += 1;
                say(format!(
                    "within {count} bytes at {at} of {size}: {is:?}",
                    is = (is.accepted, is.synced)
                ));
            }
            at += count.max(1) as u64;
        }
        journal.set(
            0,
            Acknowledged {
                attempted: size,
                accepted: size,
                synced: is.synced.min(size),
            },
        );
        journal.set(
            1,
            Acknowledged {
                attempted: size,
                accepted: size,
                synced: size,
            },
        );
        return Ok(found);
    }
    let bytes = fs::read(&path)?;
    for (slot, page) in bytes.chunks(PAGE).enumerate() {
        let is = journal.get(slot);
        let words = || {
            page.chunks_exact(8)
                .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
        };
        let version = words().next().map_or(0, |word| word & 0xffff_ffff);
        let is_whole = |version| {
            words()
                .enumerate()
                .all(|(n, word)| word == word_of(slot_seed(role, slot, version), n))
        };
        if !is_whole(version) || version > is.attempted {
            let either = |n, word| {
                [is.accepted, is.attempted]
                    .iter()
                    .any(|v| word == word_of(slot_seed(role, slot, *v), n))
            };
            if is.attempted == is.accepted || !words().enumerate().all(|(n, word)| either(n, word)) {
                found.wrong += 1;
                say(format!(
                    "page {slot} is of no version: {version}, {:?}",
                    (is.attempted, is.accepted, is.synced)
                ));
            }
            continue;
        }
        if version < is.synced {
            found.lost_synced += 1;
            say(format!(
                "page {slot} has version {version}, {} was synced",
                is.synced
            ));
        } else if version < is.accepted && !after_crash {
            found.lost_accepted += 1;
            say(format!(
                "page {slot} has version {version}, {} was accepted",
                is.accepted
            ));
        }
        // What failed may have come about.
        journal.set(
            slot,
            Acknowledged {
                attempted: version,
                accepted: version,
                synced: is.synced.min(version),
            },
        );
    }
    Ok(found)
}

/// What the herd tells its writers, and they it: words of a shared file.
struct Signals(&'static [AtomicU64]);

const FINDINGS: usize = 16;

impl Signals {
    fn of(world: &World) -> Result<Self> {
        shared_words(&world.state.join("signals"), 64).map(Self)
    }

    /// How often writers were told to verify.
    fn round(&self) -> &AtomicU64 {
        &self.0[0]
    }

    /// How often one has.
    fn verified(&self, writer: usize) -> &AtomicU64 {
        &self.0[1 + writer]
    }

    fn findings(&self, writer: usize, n: usize) -> &AtomicU64 {
        &self.0[FINDINGS + writer * 3 + n]
    }
}

fn write_for_ever(world: &World, role: Role, writer: usize, log: Log) -> Result<()> {
    let signals = Signals::of(world)?;
    let journal = Journal::of(world, role)?;
    let path = world.written(role);
    let mut random = Random(u64::from(process::id()) << 32);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    match role {
        Role::Append => options.append(true),
        Role::WriteDirect => options.custom_flags(c::O_DIRECT),
        _ => &mut options,
    };
    let file = options.open(&path)?;
    let mut at = ptr::null_mut();
    if role != Role::Append {
        file.set_len((SLOTS * PAGE) as u64)?;
        at = map(&file, SLOTS * PAGE, c::PROT_READ | c::PROT_WRITE, c::MAP_SHARED)?;
    }
    file.sync_all()?;
    let mut mover = Mover::new()?;
    let mut page = Box::new(Aligned([0; PAGE]));
    let mut record = vec![0; RECORD_MAX as usize];
    let mut unsynced: Vec<usize> = Vec::new();
    let mut round = signals.round().load(Ordering::SeqCst);
    ready()?;
    loop {
        let asked = signals.round().load(Ordering::SeqCst);
        if asked != round {
            let found = verify_when_lit(world, role)?;
            for (n, count) in [found.lost_synced, found.lost_accepted, found.wrong]
                .into_iter()
                .enumerate()
            {
                signals.findings(writer, n).fetch_add(count, Ordering::SeqCst);
            }
            if role == Role::Append && journal.get(0).accepted > APPENDED_MAX {
                file.set_len(0)?;
                for slot in 0..2 {
                    journal.set(
                        slot,
                        Acknowledged {
                            attempted: 0,
                            accepted: 0,
                            synced: 0,
                        },
                    );
                }
            }
            unsynced.clear();
            round = asked;
            signals.verified(writer).store(round, Ordering::SeqCst);
        }
        for _ in 0..1 + random.below(WRITES_PER_SYNC) {
            if role == Role::Append {
                let is = journal.get(0);
                let length = 1 + random.below(RECORD_MAX) as usize;
                fill_stream(is.accepted, &mut record[..length]);
                if let Ok(count) = log.time(What::Access, || (&file).write(&record[..length])) {
                    journal.set(
                        0,
                        Acknowledged {
                            accepted: is.accepted + count as u64,
                            ..is
                        },
                    );
                }
                continue;
            }
            let slot = random.below(SLOTS as u64) as usize;
            let is = journal.get(slot);
            let version = is.accepted + 1;
            journal.set(
                slot,
                Acknowledged {
                    attempted: version,
                    ..is
                },
            );
            fill_page(slot_seed(role, slot, version), &mut page.0);
            let stored = log.time(What::Access, || match role {
                // SAFETY: the page lies within the mapping, and nothing refers to it.
                Role::MapMsync => unsafe { mover.store(at.add(slot * PAGE), &page.0) },
                _ => file.write_all_at(&page.0, (slot * PAGE) as u64),
            });
            if stored.is_ok() {
                journal.set(
                    slot,
                    Acknowledged {
                        attempted: version,
                        accepted: version,
                        ..is
                    },
                );
                unsynced.push(slot);
            }
        }
        let synced = log.time(What::Sync, || match role {
            // SAFETY: the whole mapping.
            Role::MapMsync => match unsafe { c::msync(at, SLOTS * PAGE, c::MS_SYNC) } {
                0 => Ok(()),
                _ => Err(Error::last_os_error()),
            },
            _ => file.sync_all(),
        });
        if synced.is_ok() {
            if role == Role::Append {
                unsynced.push(0);
            }
            for slot in unsynced.drain(..) {
                let is = journal.get(slot);
                journal.set(
                    slot,
                    Acknowledged {
                        synced: is.accepted,
                        ..is
                    },
                );
            }
        }
    }
}

/// Verifies as soon as the mount shows something again, which is a moment after EnableKey.
fn verify_when_lit(world: &World, role: Role) -> Result<Findings> {
    let begin = now();
    loop {
        match verify(world, role, false) {
            Err(error) if now() - begin > STUCK_S / 2 * 1_000_000_000 => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(2)),
            found => return found,
        }
    }
}

struct Member {
    role: Role,
    log: Log,
    entries: Arc<Mutex<Vec<Entry>>>,
    process: Child,
}

impl Member {
    /// What it has logged since this was last asked.
    fn entries(&self) -> Vec<Entry> {
        let mut entries = lock(&self.entries);
        self.log.drain(&mut entries);
        std::mem::take(&mut entries)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps logs from getting full.
fn collect(log: Log, entries: &Mutex<Vec<Entry>>) {
    loop {
        log.drain(&mut lock(entries));
        thread::sleep(Duration::from_millis(20));
    }
}

/// When the key was disabled and enabled.
#[derive(Clone, Copy)]
struct Times {
    called: u64,
    returned: u64,
    enabled: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Before,
    During,
    Dark,
    After,
}

impl Times {
    fn phase(&self, begin: u64) -> Phase {
        match begin {
            begin if begin >= self.enabled => Phase::After,
            begin if begin >= self.returned => Phase::Dark,
            begin if begin >= self.called => Phase::During,
            _ => Phase::Before,
        }
    }
}

/// How many accesses of which kind began when, and how they ended.
type Counts = BTreeMap<(Role, What, Phase, u32), u64>;

struct Herd {
    members: Vec<Member>,
    signals: Signals,
    counts: Counts,
    /// When the command under way counts as stuck; in seconds of now(), 0 for never.
    deadline_s: Arc<AtomicU32>,
    random: Random,
}

impl Herd {
    fn start(world: &World, with_writers: bool) -> Result<Self> {
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
    fn kmsctl(&self, operation: &str) -> Result<std::result::Result<u64, String>> {
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

    fn obey(&mut self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["cycles", count] => self.cycles(count.parse().map_err(Error::other)?),
            ["revoke"] => self.revoke(),
            ["restore"] => self.restore(),
            _ => Err(Error::other(format!("'{line}' is no command"))),
        }
    }

    fn alive(&self) {
        self.deadline_s
            .store((now() / 1_000_000_000 + STUCK_S) as u32, Ordering::SeqCst);
    }

    fn sleep_ms(&mut self, least: u64, most: u64) {
        thread::sleep(Duration::from_micros(
            least * 1000 + self.random.below((most - least) * 1000),
        ));
    }

    /// Reads the logs; how many accesses succeeded that began in the dark.
    fn count(&mut self, times: Times) -> u64 {
        let mut violations = 0;
        for member in &self.members {
            for entry in member.entries() {
                let phase = times.phase(entry.begin);
                if entry.errno == 0 && entry.what == What::Access && phase == Phase::Dark {
                    violations += 1;
                    if violations <= 5 {
                        let after = (entry.begin - times.returned) / 1000;
                        eprintln!(
                            "VIOLATION: {:?}, begun {after} us after DisableKey returned",
                            member.role
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
    fn all_move_on(&mut self) {
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

    fn cycles(&mut self, count: usize) -> Result<String> {
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

    fn words(&self, which: usize) -> u64 {
        self.members
            .iter()
            .map(|member| member.log.words[which].load(Ordering::Relaxed))
            .sum()
    }

    fn dark_accesses(&self) -> u64 {
        let dark = |((_, what, phase, _), count): (&(Role, What, Phase, u32), &u64)| {
            if *what == What::Access && *phase == Phase::Dark {
                *count
            } else {
                0
            }
        };
        self.counts.iter().map(dark).sum()
    }

    fn report(&self) {
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
    fn revoke(&mut self) -> Result<String> {
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
    fn restore(&mut self) -> Result<String> {
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

fn spread(times: &[u64]) -> String {
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
fn watch(deadline_s: Arc<AtomicU32>, mut pids: Vec<(String, u32)>) {
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

fn run() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let world = World::from_env()?;
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["fill"] => world.fill(),
        ["warm"] => world.warm(),
        ["verify", when @ ("unmounted" | "crashed")] => {
            for role in WRITERS {
                let found = verify(&world, role, *when == "crashed")?;
                if found.lost_synced + found.lost_accepted + found.wrong > 0 {
                    return Err(Error::other(format!("{role:?} writer: {found:?}")));
                }
            }
            Ok(())
        }
        ["member", number] => {
            // SAFETY: takes two numbers.
            unsafe { c::prctl(c::PR_SET_PDEATHSIG, c::SIGKILL) };
            let number: usize = number.parse().map_err(Error::other)?;
            let log = Log::of(&world, number)?;
            match READERS.get(number) {
                Some(Role::Names) => look_for_ever(&world, log),
                Some(role) => read_for_ever(&world, *role, log),
                None => write_for_ever(
                    &world,
                    WRITERS[number - READERS.len()],
                    number - READERS.len(),
                    log,
                ),
            }
        }
        ["herd", members @ ("readers" | "all")] => {
            let mut herd = Herd::start(&world, *members == "all")?;
            println!("done ready");
            for line in std::io::stdin().lines() {
                let line = line?;
                if line == "end" {
                    break;
                }
                match herd.obey(&line) {
                    Ok(said) => println!("done {said}"),
                    Err(error) => println!("failed {error}"),
                }
            }
            Ok(())
        }
        _ => Err(Error::other(
            "usage: revocation fill|warm|verify unmounted|verify crashed|herd readers|herd all",
        )),
    }
}

fn main() {
    if let Err(error) = run() {
        eprintln!("revocation: {error}");
        process::exit(1);
    }
}
