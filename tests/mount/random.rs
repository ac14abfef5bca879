//! Random programs, run by several users in a mount and in ext4: every outcome, and everything that stat(2) tells, alike.

use crate::twin::{ROOT, Record, User, compare, describe, errno_of, truncate};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags,
};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const STEPS: usize = 4000;
const GROUP: u32 = 3000;
const USERS: [User; 4] = [
    ROOT,
    User(1001, 1001, &[]),
    User(1002, GROUP, &[]),
    User(1003, 1003, &[GROUP, 1001]),
];
/// Descriptors kept open.
const OPEN_MAX: usize = 4;

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }

    fn mode(&mut self) -> u32 {
        let often = [
            0o644, 0o755, 0o777, 0o700, 0o666, 0o2775, 0o1777, 0o4755, 0o6777, 0o2664,
        ];
        if self.roll(3) > 0 {
            self.pick(&often)
        } else {
            self.roll(0o10000) as u32
        }
    }

    /// One to three names of few, so that they meet.
    fn path(&mut self) -> String {
        let depth = 1 + self.roll(3);
        let mut names: Vec<_> = (0..depth).map(|_| self.pick(&["a", "b", "c", "d"])).collect();
        if self.roll(12) == 0 {
            names.push(self.pick(&[".", ""]));
        }
        names.join("/")
    }

    fn id(&mut self) -> Option<u32> {
        self.pick(&[None, Some(0), Some(1001), Some(1002), Some(1003), Some(GROUP)])
    }

    fn time(&mut self) -> Timespec {
        let (secs, nanos) = self.pick(&[
            (0, rustix::fs::UTIME_NOW),
            (0, rustix::fs::UTIME_OMIT),
            (0, 0),
            (1_000_000_000, 999_999_999),
            (-1, 500),
        ]);
        Timespec {
            tv_sec: secs,
            tv_nsec: nanos,
        }
    }
}

/// A valid ACL in the kernel's form: of the owner, a user, the group, a group, the mask, others.
fn acl(dice: &mut Dice) -> Vec<u8> {
    let mut entries = vec![(1_u16, u32::MAX), (4, u32::MAX), (32, u32::MAX)];
    if dice.roll(4) > 0 {
        entries.extend([
            (2, dice.pick(&[1001, 1002])),
            (8, dice.pick(&[GROUP, 1001])),
            (16, u32::MAX),
        ]);
    }
    entries.sort_unstable();
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend((dice.roll(8) as u16).to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// A time as both filesystems must agree on it: that it is now, or which.
fn told(secs: i64, nanos: i64) -> String {
    if secs > 1_500_000_000 {
        "now".to_owned()
    } else {
        format!("{secs}.{nanos}")
    }
}

fn tell(stat: &fs::Metadata) -> String {
    let modified = told(stat.mtime(), stat.mtime_nsec());
    let accessed = if stat.is_file() {
        told(stat.atime(), stat.atime_nsec())
    } else {
        String::new()
    };
    format!("{} at {accessed} {modified}", describe(stat))
}

fn tell_tree(record: &mut Record, dir: &Path) {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    for path in entries.collect::<BTreeSet<_>>() {
        let stat = fs::symlink_metadata(&path).unwrap();
        record.note(format_args!("  {:?} {}", path.file_name().unwrap(), tell(&stat)));
        for name in ["system.posix_acl_access", "system.posix_acl_default", "user.x"] {
            let mut value = [0; 200];
            if let Ok(length) = rustix::fs::lgetxattr(&path, name, &mut value) {
                record.note(format_args!("    {name} {:?}", &value[..length]));
            }
        }
        if stat.is_dir() {
            tell_tree(record, &path);
        }
    }
}

/// One step that works on names; what it was, and what came of it.
fn step(dice: &mut Dice, dir: &Path, open: &mut Vec<File>) -> (String, rustix::io::Result<()>) {
    let user = dice.pick(&USERS);
    let (name, other) = (dice.path(), dice.path());
    let (path, to): (PathBuf, PathBuf) = (dir.join(&name), dir.join(&other));
    let mode = Mode::from_raw_mode(dice.mode());
    let kind = dice.roll(20);
    let (what, outcome) = match kind {
        0..=2 => {
            let access = dice.pick(&[OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR, OFlags::RDWR]);
            let mut flags =
                access | OFlags::NONBLOCK | dice.pick(&[OFlags::CREATE, OFlags::CREATE, OFlags::empty()]);
            flags |= dice.pick(&[
                OFlags::empty(),
                OFlags::EXCL & flags,
                OFlags::TRUNC,
                OFlags::NOFOLLOW,
                OFlags::APPEND,
            ]);
            if flags.contains(OFlags::CREATE) && dice.roll(4) == 0 {
                flags |= OFlags::EXCL;
            }
            let length = dice.pick(&[0, 10, 5000, 40_000]);
            let opened = user.does(|| rustix::fs::openat(CWD, &path, flags, mode));
            let outcome = opened.map(|file| {
                let file = File::from(file);
                let is_file = file.metadata().unwrap().is_file();
                if is_file && access != OFlags::RDONLY {
                    user.does(|| file.write_all_at(&vec![7; length], 3).unwrap());
                }
                if is_file {
                    open.push(file);
                }
            });
            (format!("open {flags:?} {length}"), outcome)
        }
        3 => ("mkdir".to_owned(), user.does(|| rustix::fs::mkdir(&path, mode))),
        4 => {
            let kind = dice.pick(&[
                FileType::Fifo,
                FileType::Socket,
                FileType::CharacterDevice,
                FileType::RegularFile,
            ]);
            (
                format!("mknod {kind:?}"),
                user.does(|| rustix::fs::mknodat(CWD, &path, kind, mode, 259)),
            )
        }
        5 => {
            // Nothing leads out of the directory.
            let target = dice.pick(&["a", "b", "b/c", "d/a", "none", "."]);
            (
                format!("symlink to {target}"),
                user.does(|| rustix::fs::symlink(target, &path)),
            )
        }
        6 => (
            format!("link to {other}"),
            user.does(|| rustix::fs::link(&path, &to)),
        ),
        7 => ("unlink".to_owned(), user.does(|| rustix::fs::unlink(&path))),
        8 => ("rmdir".to_owned(), user.does(|| rustix::fs::rmdir(&path))),
        9..=11 => {
            // Without WHITEOUT: ext4 moves the directory's times even where it then refuses.
            let flags = [
                RenameFlags::empty(),
                RenameFlags::empty(),
                RenameFlags::NOREPLACE,
                RenameFlags::EXCHANGE,
            ];
            let flags = dice.pick(&flags);
            (
                format!("rename to {other} {flags:?}"),
                user.does(|| rustix::fs::renameat_with(CWD, &path, CWD, &to, flags)),
            )
        }
        12 => (
            format!("chmod {mode:?}"),
            user.does(|| rustix::fs::chmod(&path, mode)),
        ),
        13 => {
            // Neither is a case of its own (privileges.rs): of what is no regular file the kernel does not tell us.
            let (uid, gid) = (dice.id(), dice.id().or(Some(GROUP)));
            let does = user.does(|| std::os::unix::fs::lchown(&path, uid, gid));
            (format!("chown {uid:?} {gid:?}"), errno_of(does))
        }
        14 => {
            // To the size a file has, ext4 moves its times, and others, FUSE among them, do not.
            let length = dice.pick(&[0, 1, 5000, 40_000, 200_000]);
            let same = fs::metadata(&path).is_ok_and(|stat| stat.len() == length as u64);
            let length = length + i64::from(same);
            (
                format!("truncate {length}"),
                user.does(|| truncate(&path, length)),
            )
        }
        15 => {
            let times = Timestamps {
                last_access: dice.time(),
                last_modification: dice.time(),
            };
            let follow = dice.pick(&[AtFlags::empty(), AtFlags::SYMLINK_NOFOLLOW]);
            let outcome = user.does(|| rustix::fs::utimensat(CWD, &path, &times, follow));
            (
                format!(
                    "times {} {}",
                    times.last_access.tv_sec, times.last_modification.tv_sec
                ),
                outcome,
            )
        }
        16 => {
            let name = dice.pick(&["system.posix_acl_access", "system.posix_acl_default"]);
            let acl = acl(dice);
            let outcome = user.does(|| rustix::fs::lsetxattr(&path, name, &acl, XattrFlags::empty()));
            (format!("set {name} {acl:?}"), outcome)
        }
        17 => {
            let name = dice.pick(&[
                "user.x",
                "trusted.x",
                "system.posix_acl_access",
                "system.posix_acl_default",
            ]);
            let outcome = match dice.roll(3) {
                0 => user.does(|| rustix::fs::lremovexattr(&path, name)),
                1 => user.does(|| rustix::fs::lgetxattr(&path, name, &mut [0; 200]).map(drop)),
                _ if name.starts_with("system") => Ok(()),
                _ => user.does(|| rustix::fs::lsetxattr(&path, name, b"v", XattrFlags::empty())),
            };
            (format!("attribute {name}"), outcome)
        }
        18 => {
            let how = dice.pick(&[
                rustix::fs::Access::READ_OK,
                rustix::fs::Access::WRITE_OK,
                rustix::fs::Access::EXEC_OK,
            ]);
            // By the effective user: the real one is what access(2) goes by.
            (
                format!("access {how:?}"),
                user.does(|| rustix::fs::accessat(CWD, &path, how, AtFlags::EACCESS)),
            )
        }
        _ => {
            let listed = user.does(|| {
                fs::read_dir(&path).map(|entries| {
                    entries
                        .map(|entry| entry.unwrap().file_name())
                        .collect::<BTreeSet<_>>()
                })
            });
            (
                format!("list {:?}", listed.as_ref().ok()),
                errno_of(listed.map(drop)),
            )
        }
    };
    (format!("{} {name}: {what} {mode:?}", user.0), outcome)
}

/// One step that works on an open file, which may have lost its name.
fn step_on_open(dice: &mut Dice, open: &mut Vec<File>) -> (String, rustix::io::Result<()>) {
    let (user, at) = (dice.pick(&USERS), dice.roll(open.len()));
    let file = &open[at];
    let (offset, length) = (
        dice.pick(&[0, 100, 4096, 30_000, 150_000]),
        dice.pick(&[1, 100, 4096, 20_000]),
    );
    let what = dice.roll(6);
    let outcome = match what {
        0 => errno_of(user.does(|| file.write_all_at(&vec![9; length as usize], offset))),
        1 => errno_of(user.does(|| file.set_len(offset))),
        2 => {
            let mode = Mode::from_raw_mode(dice.mode());
            user.does(|| rustix::fs::fchmod(file, mode))
        }
        3 => {
            let flags = dice.pick(&[
                FallocateFlags::empty(),
                FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
                FallocateFlags::ZERO_RANGE,
            ]);
            user.does(|| rustix::fs::fallocate(file, flags, offset, length))
        }
        4 => errno_of(user.does(|| std::os::unix::fs::fchown(file, Some(user.0), None))),
        _ => {
            drop(open.swap_remove(at));
            return (format!("close {at}"), Ok(()));
        }
    };
    let stat = file.metadata().unwrap();
    (
        format!(
            "{} open {at}: {what} {offset} {length}, now {}",
            user.0,
            tell(&stat)
        ),
        outcome,
    )
}

fn run(seed: u64) {
    compare(|dir, record| {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut open = Vec::new();
        for number in 0..STEPS {
            let (what, outcome) = if !open.is_empty() && dice.roll(4) == 0 {
                step_on_open(&mut dice, &mut open)
            } else {
                step(&mut dice, dir, &mut open)
            };
            record.outcome(format_args!("{seed}/{number} {what}"), outcome);
            while open.len() > OPEN_MAX {
                open.remove(0);
            }
            if number % 50 == 49 {
                tell_tree(record, dir);
            }
        }
        drop(open);
        for entry in walk(dir) {
            let content = if entry.is_symlink() || !entry.is_file() {
                Vec::new()
            } else {
                fs::read(&entry).unwrap()
            };
            let sum = content.iter().fold(7_u64, |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
            });
            record.note(format_args!("{:?}: {sum:x}", entry.strip_prefix(dir).unwrap()));
        }
    });
}

fn walk(dir: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_symlink() && path.is_dir() {
            all.extend(walk(&path));
        }
        all.insert(path);
    }
    all
}

#[test]
fn random_programs_see_what_ext4_shows_1() {
    run(1);
}

#[test]
fn random_programs_see_what_ext4_shows_2() {
    run(2);
}

#[test]
fn random_programs_see_what_ext4_shows_3() {
    run(3);
}
