//! A few operations on a few files, some of them persisting: most bugs of crash safety need no more than three and one
//! fsync(2) (Mohan et al., OSDI 2018).

use crate::disk::{Disk, Image, Recorded};
use crate::machine::{Daemon, Machine};
use crate::oracle::{History, NEVER, Op, Violation, failed};
use crate::random::Random;
use rustix::fs::{CWD, FallocateFlags, RenameFlags};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Where files may be.
pub const PATHS: [&str; 6] = ["A", "B", "d/C", "d/D", "e/E", "e/F"];
const DIRECTORIES: [&str; 3] = ["", "d", "e"];
const STEPS_MAX: u64 = 24;

/// The files there are in the beginning.
fn initial() -> [(&'static str, Vec<u8>); 2] {
    [
        ("A", Random::new(100).bytes(9000)),
        ("d/C", Random::new(101).bytes(300_000)),
    ]
}

pub fn prepare(mnt: &Path) {
    fs::create_dir(mnt.join("d")).unwrap();
    fs::create_dir(mnt.join("e")).unwrap();
    for (path, data) in initial() {
        fs::write(mnt.join(path), data).unwrap();
    }
}

/// Runs a random workload on what a disk holds; what was done, and what reached the disk. What cannot be done on what an earlier
/// cut left is a violation like any other.
pub fn run(base: &Arc<Image>, random: &mut Random) -> Result<(History, Recorded), Violation> {
    let machine = Machine::boot(Disk::new(Arc::clone(base)))?;
    let history = run_on(&machine, random);
    let recorded = machine.disk.recorded(Arc::clone(base));
    machine.shut_down();
    Ok((history?, recorded))
}

fn run_on(machine: &Machine, random: &mut Random) -> Result<History, Violation> {
    machine.start_kmsd()?;
    machine.mount()?;
    let mut history = History::beginning_with(machine.observe()?);
    for _ in 0..4 + random.below(STEPS_MAX) {
        let op = choose(&history, random);
        let start = machine.disk.position();
        perform(machine, &op).map_err(|error| failed(format!("{op:?}: {error}")))?;
        history.note(op, start, machine.disk.position());
    }
    // Some of what was not synced is written by timers.
    if random.one_in(2) {
        std::thread::sleep(std::time::Duration::from_millis(random.below(400)));
    }
    Ok(history)
}

/// Runs a random workload on a machine that is up, and kills one of its daemons before or during an operation.
pub fn run_until_killed(machine: &Machine, victim: Daemon, random: &mut Random) -> History {
    let mut history = History::beginning_with(machine.observe().unwrap());
    let before = random.below(STEPS_MAX);
    for _ in 0..before {
        let op = choose(&history, random);
        perform(machine, &op).unwrap();
        history.note(op, 0, 0);
    }
    let mut op = choose(&history, random);
    // Who writes through a mapping of a mount that is dead gets SIGBUS.
    while matches!(op, Op::Mmap(..)) {
        op = choose(&history, random);
    }
    let delay = std::time::Duration::from_micros(random.below(3000));
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(delay);
            machine.kill(victim);
        });
        perform(machine, &op)
    });
    let end = if outcome.is_ok() { 0 } else { NEVER };
    history.note(op, 0, end);
    history
}

fn range(random: &mut Random) -> (u64, usize) {
    let offset = *random.pick(&[0, 1, 4095, 4096, 9000, 32_768, 40_000, 131_072, 200_000]);
    let length = *random.pick(&[1, 100, 4096, 5000, 8192, 33_000, 131_072, 140_000]);
    (offset, length)
}

fn choose(history: &History, random: &mut Random) -> Op {
    let (there, free): (Vec<&str>, Vec<&str>) = PATHS.iter().partition(|path| history.exists(path));
    let some = |random: &mut Random| (*random.pick(&there)).to_owned();
    loop {
        let can_add = !free.is_empty();
        let can_remove = there.len() > 1;
        return match random.below(24) {
            0 | 1 if can_add => Op::Create((*random.pick(&free)).to_owned()),
            2..=6 => {
                let (offset, length) = range(random);
                let data = random.bytes(length);
                let is_sync = random.one_in(4);
                Op::Write {
                    path: some(random),
                    offset,
                    data,
                    is_sync,
                }
            }
            7 => {
                let (offset, length) = range(random);
                Op::Truncate(some(random), (offset + length as u64) / 2)
            }
            8 => {
                let (offset, length) = range(random);
                Op::Punch(some(random), offset, length as u64)
            }
            9 | 10 => Op::Fsync(some(random)),
            11 => Op::Fdatasync(some(random)),
            12 | 13 => Op::SyncDir((*random.pick(&DIRECTORIES)).to_owned()),
            14 if can_add => Op::Link(some(random), (*random.pick(&free)).to_owned()),
            15 if can_remove => Op::Unlink(some(random)),
            16..=18 => {
                let (from, to) = (some(random), (*random.pick(&PATHS)).to_owned());
                if history.is_same(&from, &to) {
                    continue;
                }
                Op::Rename(from, to)
            }
            19 if can_remove => {
                let (one, other) = (some(random), some(random));
                if history.is_same(&one, &other) {
                    continue;
                }
                Op::Exchange(one, other)
            }
            20 => {
                let path = some(random);
                let size = history.content(&path).len();
                if size == 0 {
                    continue;
                }
                let offset = random.below(size as u64) as usize;
                let length = (size - offset).min(5000);
                Op::Mmap(path, offset, random.bytes(length))
            }
            21 => Op::Key(random.one_in(2)),
            _ => continue,
        };
    }
}

/// Fails if a daemon that it needs died.
fn perform(machine: &Machine, op: &Op) -> std::io::Result<()> {
    let mnt = machine.mnt();
    let writer = |path: &str| OpenOptions::new().read(true).write(true).open(mnt.join(path));
    match op {
        Op::Create(path) => File::create_new(mnt.join(path)).map(drop),
        Op::Write {
            path,
            offset,
            data,
            is_sync,
        } => {
            let mut options = OpenOptions::new();
            options.write(true);
            if *is_sync {
                options.custom_flags(libc::O_SYNC);
            }
            options.open(mnt.join(path))?.write_all_at(data, *offset)
        }
        Op::Truncate(path, size) => writer(path)?.set_len(*size),
        Op::Punch(path, offset, length) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(writer(path)?, flags, *offset, *length)?)
        }
        Op::Fsync(path) => writer(path)?.sync_all(),
        Op::Fdatasync(path) => writer(path)?.sync_data(),
        Op::SyncDir(path) => File::open(mnt.join(path))?.sync_all(),
        Op::Link(from, to) => fs::hard_link(mnt.join(from), mnt.join(to)),
        Op::Unlink(path) => fs::remove_file(mnt.join(path)),
        Op::Rename(from, to) => fs::rename(mnt.join(from), mnt.join(to)),
        Op::Exchange(one, other) => {
            let (one, other) = (mnt.join(one), mnt.join(other));
            Ok(rustix::fs::renameat_with(
                CWD,
                one,
                CWD,
                other,
                RenameFlags::EXCHANGE,
            )?)
        }
        Op::Mmap(path, offset, data) => {
            write_through_mapping(&writer(path)?, *offset, data);
            Ok(())
        }
        Op::Key(is_enabled) => {
            let operation = if *is_enabled { "enable-key" } else { "disable-key" };
            let done = machine.kmsctl(&[operation, "--key-id", "alias/other"]);
            done.map(drop)
                .map_err(|violation| std::io::Error::other(violation.to_string()))
        }
    }
}

fn write_through_mapping(file: &File, offset: usize, data: &[u8]) {
    let length = offset + data.len();
    // SAFETY: nothing truncates the file while it is mapped, and the mapping is not used after munmap.
    unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(
            std::ptr::null_mut(),
            length,
            access,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        std::slice::from_raw_parts_mut(at.cast::<u8>(), length)[offset..].copy_from_slice(data);
        assert_eq!(libc::msync(at, length, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(at, length), 0);
    }
}
