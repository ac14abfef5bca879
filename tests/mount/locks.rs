//! Locks: the kernel's own, between open files and between processes.

use crate::twin::compare;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

/// flock(2) and fcntl(2) locks of two open files. (The second kind belongs to processes; F_OFD_SETLK, which meets it, to open
/// files.)
#[test]
fn locks_exclude_each_other_as_in_ext4() {
    use rustix::fs::FlockOperation::{
        NonBlockingLockExclusive, NonBlockingLockShared, NonBlockingUnlock, Unlock,
    };
    compare(|dir, record| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let opened = || options.open(dir.join("file")).unwrap();
        let (one, other) = (opened(), opened());
        one.set_len(100).unwrap();
        let of_process = |from, length, kind: i32| {
            let lock = range_lock(from, length, kind);
            // SAFETY: the lock outlives the call.
            unsafe { libc::fcntl(one.as_raw_fd(), libc::F_SETLK, &raw const lock) }
        };
        let of_file = |from, length, kind: i32| {
            let lock = range_lock(from, length, kind);
            // SAFETY: the lock outlives the call.
            unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }
        };
        for operation in [
            NonBlockingLockShared,
            NonBlockingLockExclusive,
            Unlock,
            NonBlockingUnlock,
        ] {
            record.outcome(
                format_args!("one: {operation:?}"),
                rustix::fs::flock(&one, operation),
            );
            for operation in [NonBlockingLockShared, NonBlockingLockExclusive, Unlock] {
                record.outcome(
                    format_args!("other: {operation:?}"),
                    rustix::fs::flock(&other, operation),
                );
            }
        }
        for (kind, from, length) in [
            (libc::F_RDLCK, 0, 50),
            (libc::F_WRLCK, 20, 10),
            (libc::F_UNLCK, 0, 0),
        ] {
            record.note(of_process(from, length, kind));
            for (kind, from, length) in [
                (libc::F_RDLCK, 0, 10),
                (libc::F_WRLCK, 0, 10),
                (libc::F_WRLCK, 25, 1),
                (libc::F_WRLCK, 50, 0),
            ] {
                record.note(format_args!(
                    "{kind} {from} {length}: {}",
                    of_file(from, length, kind)
                ));
            }
            assert_eq!(of_file(0, 0, libc::F_UNLCK), 0);
        }
        // Closing any descriptor of the file drops the locks of the process.
        assert_eq!(of_process(0, 10, libc::F_WRLCK), 0);
        drop(File::open(dir.join("file")).unwrap());
        assert_eq!(of_file(0, 10, libc::F_WRLCK), 0);
    });
}

fn range_lock(from: i64, length: i64, kind: i32) -> libc::flock {
    // SAFETY: all zeros is a lock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = from;
    lock.l_len = length;
    lock
}
