//! Content of files: holes, reserved space, copies, every way to read and write, locks, handles.

use crate::twin::{Record, compare, describe, errno_of, truncate};
use crate::world::{World, noise};
use rustix::fs::{CWD, FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

fn opened(path: &Path, flags: i32) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags);
    options.open(path).unwrap()
}

/// Where data and holes lie, as seeking finds them.
fn map_of(file: &File) -> Vec<(u64, u64)> {
    let mut map = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap();
        map.push((data, hole));
        at = hole;
    }
    map
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |sum: u64, byte| {
        sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
    })
}

const KEEP: FallocateFlags = FallocateFlags::KEEP_SIZE;
const PUNCH: FallocateFlags = FallocateFlags::KEEP_SIZE.union(FallocateFlags::PUNCH_HOLE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE;

/// Data, holes, size and content after every step, none of which is synced.
#[test]
fn holes_and_reserved_space_are_as_in_ext4() {
    compare(|dir, record| {
        for unit in [4096, 131_072] {
            let file = opened(&dir.join(format!("file {unit}")), 0);
            // Content last: what was read of reserved space counts as data in ext4, as long as it is cached.
            let note = |record: &mut Record, what: &str| {
                record.note(format_args!(
                    "{what}: {} {:?}",
                    file.metadata().unwrap().len(),
                    map_of(&file)
                ));
            };
            let range = |record: &mut Record, what: &str, flags, at, length| {
                record.outcome(what, rustix::fs::fallocate(&file, flags, at, length));
                note(record, what);
            };
            range(record, "allocate", FallocateFlags::empty(), 0, 20 * unit);
            range(record, "allocate beyond, keep", KEEP, 30 * unit, unit);
            file.write_all_at(&noise(1, 3 * unit as usize), 5 * unit).unwrap();
            range(record, "punch nothing", PUNCH, 15 * unit, unit);
            range(record, "punch data", PUNCH, 6 * unit, unit);
            range(
                record,
                "zero, keep, over the end",
                ZERO | KEEP,
                19 * unit,
                5 * unit,
            );
            range(record, "zero over the end", ZERO, 18 * unit, 5 * unit);
            range(record, "no length", FallocateFlags::empty(), 0, 0);
            range(record, "punch and grow", FallocateFlags::PUNCH_HOLE, 0, unit);
            range(record, "too far", FallocateFlags::empty(), i64::MAX as u64, 1);
            file.write_all_at(&noise(2, 2 * unit as usize), 40 * unit)
                .unwrap();
            range(record, "punch over the end", PUNCH, 41 * unit, 100 * unit);
            file.set_len(41 * unit + 1).unwrap();
            note(record, "shortened");
            file.set_len(50 * unit).unwrap();
            note(record, "lengthened");
            let mut content = vec![0; 50 * unit as usize];
            file.read_exact_at(&mut content, 0).unwrap();
            record.note(checksum(&content));
            file.set_len(0).unwrap();
            note(record, "emptied");
            for (flags, name) in [
                (FallocateFlags::COLLAPSE_RANGE | KEEP, "collapse and keep"),
                (FallocateFlags::INSERT_RANGE | KEEP, "insert and keep"),
            ] {
                record.outcome(name, rustix::fs::fallocate(&file, flags, 0, unit));
            }
            for whence in [
                SeekFrom::Data(0),
                SeekFrom::Hole(0),
                SeekFrom::Data(u64::MAX >> 1),
                SeekFrom::Hole(10 * unit),
            ] {
                record.outcome(format_args!("seek {whence:?}"), rustix::fs::seek(&file, whence));
            }
        }
    });
}

/// Ranges of the same file and of another, over holes, ends and each other.
#[test]
fn ranges_are_copied_as_in_ext4() {
    compare(|dir, record| {
        let (from, to) = (opened(&dir.join("from"), 0), opened(&dir.join("to"), 0));
        from.write_all_at(&noise(1, 300_000), 100_000).unwrap();
        let copy = |record: &mut Record,
                    (source, mut at): (&File, u64),
                    (target, mut into): (&File, u64),
                    length| {
            let copied = rustix::fs::copy_file_range(source, Some(&mut at), target, Some(&mut into), length);
            record.note(format_args!(
                "{copied:?} {at} {into} {}",
                target.metadata().unwrap().len()
            ));
        };
        copy(record, (&from, 0), (&to, 5), 400_000);
        copy(record, (&from, 390_000), (&to, 0), 20_000);
        copy(record, (&from, 400_000), (&to, 0), 1);
        copy(record, (&from, 500_000), (&to, 0), 1);
        copy(record, (&from, 0), (&to, 700_000), 100_000);
        copy(record, (&to, 0), (&to, 1_000_000), 50_001);
        copy(record, (&to, 0), (&to, 10), 50_001);
        copy(record, (&to, 10), (&to, 10), 0);
        let end = i64::MAX as u64;
        copy(record, (&from, 0), (&to, end), 10);
        let append = OpenOptions::new().append(true).open(dir.join("to")).unwrap();
        copy(record, (&from, 0), (&append, 0), 10);
        let reader = File::open(dir.join("to")).unwrap();
        copy(record, (&from, 0), (&reader, 0), 10);
        let mut content = vec![0; to.metadata().unwrap().len() as usize];
        to.read_exact_at(&mut content, 0).unwrap();
        record.note(checksum(&content));
    });
}

/// Buffered, direct and mapped access to one file at a time see each other's bytes at once.
#[test]
fn every_way_to_a_file_sees_what_the_others_wrote() {
    let length = 300_000;
    for options in [&[][..], &["-o", "cache=none"]] {
        let mut world = World::unmounted();
        world.mount(options);
        let path = world.at("file");
        let (buffered, direct) = (opened(&path, 0), opened(&path, libc::O_DIRECT));
        let mut expected = noise(1, length);
        buffered.write_all_at(&expected, 0).unwrap();
        let mapped = options
            .is_empty()
            .then(|| Mapping::new(&buffered, length, libc::MAP_SHARED));
        for round in 0..200 {
            let bytes = noise(round, 1 + round as usize * 37 % 9000);
            let at = (round as usize * 7919) % (length - bytes.len());
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
            match (round % 3, &mapped) {
                (0, Some(mapped)) => mapped.write(at, &bytes),
                (1, _) => direct.write_all_at(&bytes, at as u64).unwrap(),
                _ => buffered.write_all_at(&bytes, at as u64).unwrap(),
            }
            let mut got = vec![0; length];
            match (round % 4, &mapped) {
                (0, Some(mapped)) => mapped.read(&mut got),
                (1 | 2, _) => direct.read_exact_at(&mut got, 0).unwrap(),
                _ => buffered.read_exact_at(&mut got, 0).unwrap(),
            }
            assert!(got == expected, "round {round} with {options:?}");
        }
        drop(mapped);
        drop((buffered, direct));
        assert!(fs::read(&path).unwrap() == expected);
        world.unmount();
    }
}

/// What is written to a private mapping stays there; what is written to the file shows in untouched pages.
#[test]
fn a_private_mapping_is_private() {
    compare(|dir, _| {
        let file = opened(&dir.join("file"), 0);
        file.write_all_at(&[1; 20_000], 0).unwrap();
        let private = Mapping::new(&file, 20_000, libc::MAP_PRIVATE);
        private.write(100, &[2; 5000]);
        file.write_all_at(&[3; 4096], 12_288).unwrap();
        let mut seen = vec![0; 20_000];
        private.read(&mut seen);
        assert_eq!([seen[99], seen[100], seen[5099], seen[12_288]], [1, 2, 2, 3]);
        drop(private);
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!([seen[99], seen[100], seen[5099], seen[12_288]], [1, 1, 1, 3]);
    });
}

struct Mapping(*mut u8, usize);

impl Mapping {
    fn new(file: &File, length: usize, flags: i32) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, of a file that no test cuts below `length`.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at.cast(), length)
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.1);
        // SAFETY: within the mapping, to which nothing refers.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at), bytes.len()) }
    }

    fn read(&self, into: &mut [u8]) {
        assert!(into.len() <= self.1);
        // SAFETY: within the mapping, to which nothing refers.
        unsafe { std::ptr::copy_nonoverlapping(self.0, into.as_mut_ptr(), into.len()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing refers to it.
        assert_eq!(unsafe { libc::munmap(self.0.cast(), self.1) }, 0);
    }
}

/// Several processes append lines to one file: every line is there once, whole.
#[test]
fn appending_processes_lose_nothing() {
    const LINES: usize = 300;
    for (options, flags) in [
        (&[][..], "append"),
        (&[], "append,direct"),
        (&["-o", "cache=none"], "append"),
    ] {
        let mut world = World::unmounted();
        world.mount(options);
        let path = world.at("log");
        File::create(&path).unwrap();
        let writers: Vec<_> = (0..6)
            .map(|writer| {
                let mut dd = Command::new("dd");
                dd.args(["bs=50", "status=none", "conv=notrunc", &format!("oflag={flags}")]);
                let mut dd = dd
                    .arg(format!("of={}", path.display()))
                    .stdin(Stdio::piped())
                    .spawn()
                    .unwrap();
                let mut lines = String::new();
                for line in 0..LINES {
                    lines.push_str(&format!("{:<49}\n", format!("{writer} {line}")));
                }
                let mut input = dd.stdin.take().unwrap();
                let feeder = std::thread::spawn(move || input.write_all(lines.as_bytes()).unwrap());
                (dd, feeder)
            })
            .collect();
        for (mut dd, feeder) in writers {
            feeder.join().unwrap();
            assert!(dd.wait().unwrap().success());
        }
        let log = fs::read_to_string(&path).unwrap();
        let mut lines: Vec<_> = log.lines().map(str::trim_end).collect();
        assert_eq!(lines.len(), 6 * LINES, "{options:?} {flags}");
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), 6 * LINES, "{options:?} {flags}");
        world.unmount();
    }
}

/// docs/format.md: files end where the kernel's own numbers do.
#[test]
fn offsets_reach_as_far_as_the_kernel_counts() {
    const END: u64 = i64::MAX as u64;
    let mut world = World::new();
    let file = opened(&world.at("file"), 0);
    for (number, at) in [
        1 << 31,
        1 << 32,
        1 << 44,
        1 << 50,
        1 << 60,
        (1 << 62) + 12_345,
        END - 5,
    ]
    .into_iter()
    .enumerate()
    {
        file.write_all_at(&[number as u8 + 1; 5], at).unwrap();
        file.sync_all().unwrap();
    }
    file.write_all_at(&noise(1, 300_000), 1 << 61).unwrap();
    file.sync_all().unwrap();
    assert_eq!(file.metadata().unwrap().len(), END);
    assert!(file.write_at(b"x", END).is_err() && file.set_len(END).is_ok());
    drop(file);
    world.unmount();
    world.mount(&[]);
    let file = opened(&world.at("file"), 0);
    assert_eq!(file.metadata().unwrap().len(), END);
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, (1 << 62) + 12_345).unwrap();
    assert_eq!(bytes, [6; 5]);
    let mut bytes = vec![0; 300_000];
    file.read_exact_at(&mut bytes, 1 << 61).unwrap();
    assert!(bytes == noise(1, 300_000));
    assert_eq!(
        rustix::fs::seek(&file, SeekFrom::Data((1 << 61) + 400_000)),
        Ok((1 << 62) + 12_345 - (12_345 % 4096))
    );
    truncate(&world.at("file"), 1 << 61).unwrap();
    assert_eq!(map_of(&file).len(), 5);
    drop(file);
    world.unmount();
    let said = world.cmkfs(&["fsck", "--scrub", world.volume().to_str().unwrap()]);
    assert!(said.status.success(), "{said:?}");
}

#[test]
fn a_file_without_a_name_takes_every_change() {
    compare(|dir, record| {
        let path = dir.join("file");
        let file = opened(&path, 0);
        file.write_all_at(&noise(1, 100_000), 0).unwrap();
        fs::remove_file(&path).unwrap();
        record.outcome(
            "chmod",
            rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o640)),
        );
        record.outcome(
            "chown",
            errno_of(std::os::unix::fs::fchown(&file, Some(7), Some(8))),
        );
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(7, 8));
        record.outcome("truncate", errno_of(file.set_len(70_000)));
        record.outcome("allocate", rustix::fs::fallocate(&file, KEEP, 0, 200_000));
        record.outcome("punch", rustix::fs::fallocate(&file, PUNCH, 0, 20_000));
        let set = rustix::fs::fsetxattr(&file, "user.a", b"value", rustix::fs::XattrFlags::empty());
        record.outcome("set an attribute", set);
        record.note(format_args!(
            "{:?}",
            rustix::fs::fgetxattr(&file, "user.a", &mut [0; 10])
        ));
        record.outcome("times", errno_of(file.set_times(times)));
        record.outcome("sync", errno_of(file.sync_all()));
        let stat = file.metadata().unwrap();
        record.note(describe(&stat));
        record.note(format_args!("{} {}", stat.mtime(), stat.mtime_nsec()));
        let proc = format!("/proc/self/fd/{}", file.as_raw_fd());
        record.outcome(
            "open again",
            rustix::fs::open(&proc, OFlags::RDONLY, rustix::fs::Mode::empty()),
        );
        let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
        record.outcome(
            "name again",
            rustix::fs::linkat(CWD, &proc, CWD, dir.join("again"), follow),
        );
    });
}

/// README.md: what the transport has no request for is refused as such.
#[test]
fn a_file_that_never_had_a_name_is_not_there() {
    let world = World::new();
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    for _ in 0..2 {
        let made = rustix::fs::open(world.mnt(), flags, rustix::fs::Mode::from_raw_mode(0o600));
        assert_eq!(made.err(), Some(Errno::OPNOTSUPP));
    }
    assert_eq!(fs::read_dir(world.mnt()).unwrap().count(), 0);
}
