//! Times: to the nanosecond, before 1970 and far ahead, moved by what moves them in ext4, and stored as they are shown.

use crate::twin::{Record, compare, errno_of, truncate};
use crate::world::{World, eventually};
use rustix::fs::{AtFlags, CWD, FallocateFlags, Timespec, Timestamps, XattrFlags};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// A time that no clock shows any more.
const LONG_AGO: Timespec = Timespec {
    tv_sec: 981_173_106,
    tv_nsec: 123_456_789,
};

fn set_times(path: &Path, accessed: Timespec, modified: Timespec) -> rustix::io::Result<()> {
    let times = Timestamps {
        last_access: accessed,
        last_modification: modified,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

type Times = [(i64, i64); 3];

/// A file's name, and what is done to it.
type Step = (&'static str, fn(&Path));

/// Access, modification and change.
fn times(path: &Path) -> Times {
    let stat = fs::symlink_metadata(path).unwrap();
    [
        (stat.atime(), stat.atime_nsec()),
        (stat.mtime(), stat.mtime_nsec()),
        (stat.ctime(), stat.ctime_nsec()),
    ]
}

/// Waits until the clock that files are stamped by has passed `time`.
fn wait_past(time: (i64, i64)) {
    eventually("the clock moves on", || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        (now.tv_sec, now.tv_nsec) > time
    });
}

#[test]
fn every_time_the_kernel_can_say_is_kept() {
    let mut world = World::new();
    let kinds = ["file", "dir", "symlink"];
    let seconds = [
        0,
        -1,
        -2,
        1,
        -86_401,
        i64::from(u32::MAX) + 1,
        -(1 << 40),
        1 << 40,
        i64::MAX,
        i64::MIN,
    ];
    let path = |world: &World, kind: &str, number: usize| world.at(&format!("{kind} {number}"));
    let mut expected = Vec::new();
    for (number, second) in seconds.into_iter().enumerate() {
        for kind in kinds {
            let path = path(&world, kind, number);
            match kind {
                "file" => fs::write(&path, b"content").unwrap(),
                "dir" => fs::create_dir(&path).unwrap(),
                _ => std::os::unix::fs::symlink("target", &path).unwrap(),
            }
            let time = |nanos| Timespec {
                tv_sec: second,
                tv_nsec: nanos,
            };
            set_times(&path, time(999_999_999), time(1)).unwrap();
            let [accessed, modified, _] = times(&path);
            // The kernel takes the ends of what it can say without their nanoseconds (timestamp_truncate).
            let nanos = |nanos| {
                if matches!(second, i64::MIN | i64::MAX) {
                    0
                } else {
                    nanos
                }
            };
            assert_eq!(accessed, (second, nanos(999_999_999)), "{kind}");
            assert_eq!(modified, (second, nanos(1)), "{kind}");
            expected.push((path, accessed, modified));
        }
    }
    world.unmount();
    world.mount(&[]);
    for (path, accessed, modified) in expected {
        assert_eq!(times(&path)[..2], [accessed, modified], "{}", path.display());
    }
}

#[test]
fn more_extreme_times_than_there_are_loops_stop_nothing() {
    let world = World::new();
    let time = Timespec {
        tv_sec: i64::MIN,
        tv_nsec: 0,
    };
    fs::write(world.at("file"), b"content").unwrap();
    for _ in 0..30 {
        set_times(&world.at("file"), time, time).unwrap();
    }
    assert_eq!(fs::read(world.at("file")).unwrap(), b"content");
}

#[test]
fn now_and_omitted_times() {
    compare(|dir, record| {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        };
        let omit = Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        };
        for kind in ["file", "dir", "symlink", "fifo"] {
            let path = dir.join(kind);
            make(kind, &path);
            for (accessed, modified) in [
                (now, omit),
                (omit, now),
                (now, now),
                (omit, omit),
                (LONG_AGO, omit),
                (omit, LONG_AGO),
            ] {
                let step = format!("{kind}: {} {}", accessed.tv_nsec, modified.tv_nsec);
                moved(record, &step, &[&path], || set_times(&path, accessed, modified));
            }
        }
    });
}

fn make(kind: &str, path: &Path) {
    match kind {
        "file" => fs::write(path, [1; 6000]).unwrap(),
        "dir" => fs::create_dir(path).unwrap(),
        "symlink" => std::os::unix::fs::symlink("target", path).unwrap(),
        _ => {
            let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o644));
            rustix::fs::mknodat(CWD, path, fifo, mode, 0).unwrap();
        }
    }
}

/// Notes which times of each path `act` moved. The access times that reading moves are no part of it: a mount has none.
fn moved<T>(record: &mut Record, step: &str, paths: &[&Path], act: impl FnOnce() -> rustix::io::Result<T>) {
    for path in paths.iter().filter(|path| path.symlink_metadata().is_ok()) {
        set_times(path, LONG_AGO, LONG_AGO).unwrap();
        wait_past(times(path)[2]);
    }
    let stats = || {
        paths
            .iter()
            .map(|path| path.symlink_metadata().ok().map(|_| times(path)))
    };
    let before: Vec<_> = stats().collect();
    record.outcome(step, act());
    for ((path, before), after) in paths.iter().zip(before).zip(stats()) {
        let moved = match (before, after) {
            (Some(before), Some(after)) => format!("{:?}", [1, 2].map(|at| before[at] != after[at])),
            (before, after) => format!("there: {} {}", before.is_some(), after.is_some()),
        };
        record.note(format_args!("{step}: {:?} {moved}", path.file_name().unwrap()));
    }
}

/// Every operation, and which modification and change times it moves, of what it works on and of the directory.
#[test]
fn operations_move_the_times_that_they_move_in_ext4() {
    compare(|dir, record| {
        let (file, other, sub) = (dir.join("file"), dir.join("other"), dir.join("sub"));
        make("file", &file);
        make("dir", &sub);
        let open = || OpenOptions::new().read(true).write(true).open(&file).unwrap();
        let mut of_file = |step: &str, act: &dyn Fn() -> std::io::Result<()>| {
            moved(record, step, &[&file, dir], || errno_of(act()));
        };
        of_file("write", &|| open().write_all_at(b"x", 3));
        of_file("write nothing", &|| open().write_all_at(b"", 3));
        of_file("append", &|| {
            OpenOptions::new().append(true).open(&file)?.write_all(b"x")
        });
        of_file("read", &|| open().read_exact_at(&mut [0; 100], 0));
        of_file("shorten", &|| Ok(truncate(&file, 5000)?));
        of_file("lengthen", &|| Ok(truncate(&file, 50_000)?));
        of_file("ftruncate to the same", &|| open().set_len(50_000));
        of_file("open with O_TRUNC", &|| File::create(&file).map(|_| ()));
        of_file("open the empty with O_TRUNC", &|| File::create(&file).map(|_| ()));
        of_file("open with O_CREAT", &|| {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&file)
                .map(|_| ())
        });
        of_file("allocate more", &|| {
            Ok(rustix::fs::fallocate(open(), FallocateFlags::empty(), 0, 60_000)?)
        });
        of_file("allocate what is there", &|| {
            Ok(rustix::fs::fallocate(open(), FallocateFlags::empty(), 0, 10)?)
        });
        of_file("allocate beyond", &|| {
            Ok(rustix::fs::fallocate(
                open(),
                FallocateFlags::KEEP_SIZE,
                1 << 20,
                10,
            )?)
        });
        let punch = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        of_file("punch", &|| Ok(rustix::fs::fallocate(open(), punch, 0, 8192)?));
        of_file("zero", &|| {
            Ok(rustix::fs::fallocate(
                open(),
                FallocateFlags::ZERO_RANGE,
                0,
                8192,
            )?)
        });
        of_file("chmod", &|| {
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))
        });
        of_file("chmod to the same", &|| {
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))
        });
        of_file("chown", &|| std::os::unix::fs::chown(&file, Some(1), Some(1)));
        of_file("chown nothing", &|| std::os::unix::fs::chown(&file, None, None));
        of_file("set an attribute", &|| {
            Ok(rustix::fs::setxattr(&file, "user.a", b"1", XattrFlags::empty())?)
        });
        of_file("remove an attribute", &|| {
            Ok(rustix::fs::removexattr(&file, "user.a")?)
        });
        of_file("remove no attribute", &|| {
            Ok(rustix::fs::removexattr(&file, "user.a")?)
        });
        of_file("sync", &|| open().sync_all());
        of_file("copy into", &|| {
            rustix::fs::copy_file_range(open(), Some(&mut 0), open(), Some(&mut 30_000), 20_000)?;
            Ok(())
        });
        of_file("write into a mapping", &|| store_in_mapping(&open()));

        let mut names = |step: &str, act: &dyn Fn() -> std::io::Result<()>| {
            moved(record, step, &[&file, &other, dir, &sub], || errno_of(act()));
        };
        names("link", &|| fs::hard_link(&file, &other));
        names("link to a taken name", &|| fs::hard_link(&file, &other));
        names("unlink one of two", &|| fs::remove_file(&other));
        names("rename", &|| fs::rename(&file, &other));
        names("rename back", &|| fs::rename(&other, &file));
        names("rename into", &|| fs::rename(&file, sub.join("file")));
        names("rename out of", &|| fs::rename(sub.join("file"), &file));
        names("rename to itself", &|| fs::rename(&file, &file));
        names("create", &|| File::create(&other).map(|_| ()));
        names("rename over", &|| fs::rename(&other, &file));
        names("create below", &|| File::create(sub.join("file")).map(|_| ()));
        names("make a directory below", &|| fs::create_dir(sub.join("dir")));
        names("remove a directory below", &|| fs::remove_dir(sub.join("dir")));
        names("remove one that is not empty", &|| fs::remove_dir(&sub));
        names("make a symlink", &|| std::os::unix::fs::symlink("x", &other));
        names("read a symlink", &|| fs::read_link(&other).map(|_| ()));
        let exchange = rustix::fs::RenameFlags::EXCHANGE;
        names("exchange", &|| {
            Ok(rustix::fs::renameat_with(CWD, &file, CWD, &other, exchange)?)
        });
        names("exchange across", &|| {
            Ok(rustix::fs::renameat_with(
                CWD,
                &file,
                CWD,
                sub.join("file"),
                exchange,
            )?)
        });
        names("chmod a directory", &|| {
            fs::set_permissions(&sub, fs::Permissions::from_mode(0o700))
        });
        let open_file = open();
        names("unlink the last", &|| fs::remove_file(&file));
        record.note(format_args!(
            "links left {}",
            open_file.metadata().unwrap().nlink()
        ));
    });
}

fn store_in_mapping(file: &File) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let (length, access) = (4096, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: the page is the file's, which nothing truncates meanwhile, and is not used after munmap.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            length,
            access,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>().write_volatile(9);
        assert_eq!(libc::msync(at, length, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(at, length), 0);
    }
    Ok(())
}

/// The kernel keeps times of its own for what it caches: they must not differ from those that are stored.
#[test]
fn the_times_that_were_shown_are_there_after_a_remount() {
    let mut world = World::new();
    let path = |world: &World, name: &str| world.at(name);
    let steps: [Step; 10] = [
        ("written", |path| {
            OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .write_all(b"x")
                .unwrap()
        }),
        ("resized", |path| truncate(path, 70_000).unwrap()),
        ("not resized", |path| truncate(path, 6000).unwrap()),
        ("truncated", |path| File::create(path).map(|_| ()).unwrap()),
        ("allocated", |path| {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            rustix::fs::fallocate(file, FallocateFlags::empty(), 0, 90_000).unwrap();
        }),
        ("moded", |path| {
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap()
        }),
        ("owned", |path| {
            std::os::unix::fs::chown(path, Some(5), Some(5)).unwrap()
        }),
        ("not owned", |path| {
            std::os::unix::fs::chown(path, None, None).unwrap()
        }),
        ("linked", |path| {
            fs::hard_link(path, path.with_file_name("link")).unwrap()
        }),
        ("attributed", |path| {
            rustix::fs::setxattr(path, "user.a", b"1", XattrFlags::empty()).unwrap()
        }),
    ];
    for (name, _) in steps {
        make("file", &path(&world, name));
        set_times(&path(&world, name), LONG_AGO, LONG_AGO).unwrap();
    }
    wait_past(times(&path(&world, steps[9].0))[2]);
    for (name, act) in steps {
        act(&path(&world, name));
    }
    fs::rename(path(&world, "link"), path(&world, "renamed")).unwrap();
    let before = steps.map(|(name, _)| times(&path(&world, name)));
    world.unmount();
    world.mount(&[]);
    for ((name, _), before) in steps.iter().zip(before) {
        assert_eq!(times(&path(&world, name)), before, "{name}");
    }
}
