//! The host's ext4 as the measure: what a program sees there, it sees in a mount.

use crate::world::World;
use std::ffi::CString;
use std::fmt::Display;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// EXT4_SUPER_MAGIC of linux/magic.h.
const EXT4: u64 = 0xef53;
const DIFFERENCES_SHOWN: usize = 30;

/// What happened in a directory, a line for each step.
#[derive(Default)]
pub struct Record(Vec<String>);

impl Record {
    pub fn note(&mut self, line: impl Display) {
        self.0.push(line.to_string());
    }

    /// Notes whether something succeeded, or why not.
    pub fn outcome<T>(&mut self, what: impl Display, result: rustix::io::Result<T>) {
        let said = result.map_or_else(|errno| errno.to_string(), |_| "done".to_owned());
        self.note(format_args!("{what}: {said}"));
    }

    /// Notes what lstat(2) tells that does not differ between filesystems.
    pub fn stat(&mut self, what: impl Display, path: &Path) {
        match fs::symlink_metadata(path) {
            Ok(stat) => self.note(format_args!("{what}: {}", describe(&stat))),
            Err(error) => self.note(format_args!("{what}: {}", error.raw_os_error().unwrap())),
        }
    }
}

pub fn describe(stat: &fs::Metadata) -> String {
    format!(
        "mode {:o} links {} owner {}:{} size {} device {}",
        stat.mode(),
        stat.nlink(),
        stat.uid(),
        stat.gid(),
        if stat.is_dir() { 0 } else { stat.size() },
        stat.rdev(),
    )
}

/// Has `act` done in an empty directory of the mount and in one of the host's ext4, and wants the same lines. Where the
/// host's scratch directory lies on something else, `act` still runs in the mount, with what it asserts itself.
pub fn compare_in(world: &World, act: impl Fn(&Path, &mut Record)) {
    let run = |place: &Path| {
        fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
        let dir = place.join("tree");
        fs::create_dir(&dir).unwrap();
        let mut record = Record::default();
        act(&dir, &mut record);
        record.0
    };
    let host = tempfile::tempdir().unwrap();
    let is_ext4 = rustix::fs::statfs(host.path()).unwrap().f_type as u64 == EXT4;
    eprintln!("in ext4: {is_ext4}");
    let wanted = is_ext4.then(|| run(host.path()));
    eprintln!("in the mount:");
    let dir = tempfile::tempdir_in(world.mnt()).unwrap();
    let got = run(dir.path());
    let Some(wanted) = wanted else { return };
    let differ: Vec<_> = (wanted.iter().zip(&got))
        .filter(|(wanted, got)| wanted != got)
        .collect();
    for (wanted, got) in differ.iter().take(DIFFERENCES_SHOWN) {
        eprintln!("ext4:  {wanted}\nmount: {got}");
    }
    assert!(
        differ.is_empty() && wanted.len() == got.len(),
        "{} lines differ",
        differ.len()
    );
}

/// The same in a mount of its own.
pub fn compare(act: impl Fn(&Path, &mut Record)) {
    let mut world = World::new();
    compare_in(&world, act);
    world.unmount();
}

/// Someone who acts: user, group and other groups.
#[derive(Debug, Clone, Copy)]
pub struct User(pub u32, pub u32, pub &'static [u32]);

pub const ROOT: User = User(0, 0, &[]);

impl User {
    /// Acts with this user's rights and no others, on a thread of its own.
    pub fn does<T: Send>(self, act: impl FnOnce() -> T + Send) -> T {
        if self.0 == 0 {
            return act();
        }
        let Self(uid, gid, groups) = self;
        let become_user = || {
            // SAFETY: the system calls themselves, not libc's wrappers, change the credentials of this thread alone; the
            // list outlives its call.
            let changed = unsafe {
                [
                    libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()),
                    libc::syscall(libc::SYS_setresgid, gid, gid, gid),
                    libc::syscall(libc::SYS_setresuid, uid, uid, uid),
                ]
            };
            assert_eq!(changed, [0; 3]);
        };
        let worker = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                become_user();
                act()
            });
            worker.join()
        });
        worker.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The errno of a failed operation of std's.
pub fn errno_of<T>(result: std::io::Result<T>) -> rustix::io::Result<T> {
    result.map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap())
}

/// truncate(2), which rustix has not.
pub fn truncate(path: &Path, length: i64) -> rustix::io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a string with a NUL that outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), length) } {
        0 => Ok(()),
        _ => errno_of(Err(std::io::Error::last_os_error())),
    }
}
