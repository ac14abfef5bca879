//! What must not outlive a change by someone else, and who may change what: as in ext4.

use crate::twin::{ROOT, User, compare, errno_of, truncate};
use crate::world::{World, noise};
use rustix::fs::{CWD, FallocateFlags, XattrFlags};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

const GROUP: u32 = 4321;
const OWNER: User = User(1001, 1001, &[]);
const STRANGER: User = User(1002, 1002, &[]);
const MEMBER: User = User(1003, 1003, &[GROUP]);
const CAPABILITY: &str = "security.capability";

/// CAP_NET_BIND_SERVICE, effective and permitted (vfs_cap_data of linux/capability.h, version 2).
fn net_bind_service() -> Vec<u8> {
    let words = [0x0200_0001_u32, 1 << 10, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn has_capability(path: &Path) -> bool {
    rustix::fs::getxattr(path, CAPABILITY, &mut [0; 64]).is_ok()
}

fn writable(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// A way to change a file.
type Change = (&'static str, fn(&Path) -> std::io::Result<()>);

const CHANGES: [Change; 13] = [
    ("write", |path| writable(path)?.write_all_at(b"new", 1)),
    ("append", |path| {
        std::io::Write::write_all(&mut OpenOptions::new().append(true).open(path)?, b"new")
    }),
    ("write directly", |path| {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_DIRECT);
        let page = Page([7; 4096]);
        options.open(path)?.write_all_at(&page.0, 0)
    }),
    ("write nothing", |path| {
        writable(path)?.write_at(b"", 0).map(|_| ())
    }),
    ("shorten", |path| writable(path)?.set_len(10)),
    ("lengthen", |path| writable(path)?.set_len(100_000)),
    ("open with O_TRUNC", |path| File::create(path).map(|_| ())),
    ("allocate", |path| {
        let flags = FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(writable(path)?, flags, 0, 1 << 20)?)
    }),
    ("punch", |path| {
        let flags = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        Ok(rustix::fs::fallocate(writable(path)?, flags, 0, 4096)?)
    }),
    ("zero", |path| {
        Ok(rustix::fs::fallocate(
            writable(path)?,
            FallocateFlags::ZERO_RANGE,
            0,
            4096,
        )?)
    }),
    ("copy into", |path| {
        let from = File::open(path.with_file_name("source"))?;
        rustix::fs::copy_file_range(from, None, writable(path)?, None, 5000)?;
        Ok(())
    }),
    ("chown to nobody new", |path| {
        std::os::unix::fs::chown(path, None, None)
    }),
    ("chown to the same", |path| {
        let stat = fs::metadata(path)?;
        std::os::unix::fs::chown(path, Some(stat.uid()), Some(stat.gid()))
    }),
];

#[repr(align(4096))]
struct Page([u8; 4096]);

/// Every change of content or owner, by everybody, of files with every privilege.
#[test]
fn privileges_go_as_they_do_in_ext4() {
    compare(|dir, record| {
        fs::write(dir.join("source"), [1; 5000]).unwrap();
        fs::set_permissions(dir.join("source"), fs::Permissions::from_mode(0o644)).unwrap();
        for (what, change) in CHANGES {
            for (who, user) in [
                ("root", ROOT),
                ("owner", OWNER),
                ("stranger", STRANGER),
                ("member", MEMBER),
            ] {
                for mode in [0o6777, 0o2767, 0o4666, 0o777] {
                    let path = dir.join("file");
                    fs::write(&path, [2; 5000]).unwrap();
                    std::os::unix::fs::chown(&path, Some(OWNER.0), Some(GROUP)).unwrap();
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                    rustix::fs::setxattr(&path, CAPABILITY, &net_bind_service(), XattrFlags::empty())
                        .unwrap();
                    let done = user.does(|| change(&path));
                    let step = format!("{what} by {who} with {mode:o}");
                    record.outcome(&step, errno_of(done));
                    record.stat(&step, &path);
                    // Where that is refused, the kernel has taken the capability from a file of FUSE's already.
                    if what != "chown to nobody new" {
                        record.note(format_args!("{step}: capability {}", has_capability(&path)));
                    }
                    fs::remove_file(&path).unwrap();
                }
            }
        }
    });
}

#[test]
fn a_capability_goes_with_any_write_and_with_a_change_of_owner() {
    compare(|dir, _| {
        let path = dir.join("file");
        let give = || {
            rustix::fs::setxattr(&path, CAPABILITY, &net_bind_service(), XattrFlags::empty()).unwrap();
            assert!(has_capability(&path));
        };
        fs::write(&path, [2; 5000]).unwrap();
        for (what, change) in CHANGES.iter().filter(|(what, _)| *what != "write nothing") {
            give();
            fs::write(dir.join("source"), [1; 5000]).unwrap();
            change(&path).unwrap();
            assert!(!has_capability(&path), "{what}");
        }
        give();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        fs::hard_link(&path, dir.join("other")).unwrap();
        assert!(has_capability(&path), "neither the mode nor a name is content");
    });
}

/// chmod(2) and chown(2) by everybody of what belongs to them, to their group, or to neither.
#[test]
fn modes_and_owners_change_as_in_ext4() {
    compare(|dir, record| {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        let path = dir.join("entry");
        for is_dir in [false, true] {
            for (who, user) in [("root", ROOT), ("owner", OWNER), ("member", MEMBER)] {
                for gid in [user.1, GROUP] {
                    let fresh = || {
                        if is_dir {
                            fs::create_dir(&path).unwrap()
                        } else {
                            fs::write(&path, b"").unwrap()
                        }
                        std::os::unix::fs::chown(&path, Some(user.0), Some(gid)).unwrap();
                        fs::set_permissions(&path, fs::Permissions::from_mode(0o7775)).unwrap();
                    };
                    let mut step = |what: &str, act: &(dyn Fn() -> std::io::Result<()> + Sync)| {
                        fresh();
                        let what = format!("{what} by {who} of group {gid}, directory {is_dir}");
                        record.outcome(&what, errno_of(user.does(act)));
                        record.stat(&what, &path);
                        if is_dir {
                            fs::remove_dir(&path).unwrap()
                        } else {
                            fs::remove_file(&path).unwrap()
                        }
                    };
                    step("chmod 6755", &|| {
                        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755))
                    });
                    step("chmod 2644", &|| {
                        fs::set_permissions(&path, fs::Permissions::from_mode(0o2644))
                    });
                    step("chmod 1777", &|| {
                        fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))
                    });
                    step("chgrp", &|| std::os::unix::fs::chown(&path, None, Some(GROUP)));
                    step("chown", &|| {
                        std::os::unix::fs::chown(&path, Some(STRANGER.0), None)
                    });
                    step("chown nothing", &|| std::os::unix::fs::chown(&path, None, None));
                }
            }
        }
    });
}

/// A directory with the sgid bit gives its group to what is made in it, and the bit to directories.
#[test]
fn the_group_of_a_directory_is_inherited_as_in_ext4() {
    compare(|dir, record| {
        for (mode, gid) in [(0o777, GROUP), (0o2777, GROUP), (0o3777, 0)] {
            let parent = dir.join(format!("parent {mode:o} {gid}"));
            fs::create_dir(&parent).unwrap();
            std::os::unix::fs::chown(&parent, None, Some(gid)).unwrap();
            fs::set_permissions(&parent, fs::Permissions::from_mode(mode)).unwrap();
            for (who, user) in [("root", ROOT), ("stranger", STRANGER), ("member", MEMBER)] {
                let path = |what: &str| parent.join(format!("{what} of {who}"));
                let modes = [0o644, 0o2755, 0o2644, 0o6775, 0o1777].map(rustix::fs::Mode::from_raw_mode);
                for asked in modes {
                    user.does(|| {
                        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
                        rustix::fs::openat(CWD, path(&format!("file {asked:?}")), flags, asked).unwrap();
                        rustix::fs::mkdirat(CWD, path(&format!("dir {asked:?}")), asked).unwrap();
                        let fifo = rustix::fs::FileType::Fifo;
                        rustix::fs::mknodat(CWD, path(&format!("fifo {asked:?}")), fifo, asked, 0).unwrap();
                    });
                    for what in ["file", "dir", "fifo"] {
                        let path = path(&format!("{what} {asked:?}"));
                        record.stat(path.strip_prefix(dir).unwrap().display(), &path);
                    }
                }
                user.does(|| std::os::unix::fs::symlink("target", path("symlink")).unwrap());
                record.stat(format_args!("symlink {mode:o} {who}"), &path("symlink"));
            }
        }
    });
}

/// Who may remove and rename what in a directory with the sticky bit, and in one without.
#[test]
fn sticky_directories_keep_what_belongs_to_others() {
    compare(|dir, record| {
        for (mode, dir_owner) in [(0o1777, ROOT), (0o1777, OWNER), (0o777, ROOT), (0o755, ROOT)] {
            let place = dir.join("place");
            fs::create_dir(&place).unwrap();
            std::os::unix::fs::chown(&place, Some(dir_owner.0), None).unwrap();
            fs::set_permissions(&place, fs::Permissions::from_mode(mode)).unwrap();
            for (who, user) in [("owner", OWNER), ("stranger", STRANGER)] {
                for file_owner in [OWNER, STRANGER, MEMBER] {
                    let (file, sub, other) = (place.join("file"), place.join("sub"), place.join("other"));
                    let fresh = || {
                        fs::write(&file, b"").unwrap();
                        fs::create_dir(&sub).unwrap();
                        fs::write(&other, b"").unwrap();
                        for (path, owner) in [(&file, file_owner), (&sub, file_owner), (&other, STRANGER)] {
                            std::os::unix::fs::chown(path, Some(owner.0), Some(owner.1)).unwrap();
                        }
                    };
                    let mut step = |what: &str, act: &(dyn Fn() -> rustix::io::Result<()> + Sync)| {
                        fresh();
                        let what = format!(
                            "{what} by {who} of {}'s, {mode:o} of {}",
                            file_owner.0, dir_owner.0
                        );
                        record.outcome(what, user.does(act));
                        for path in [&file, &sub, &other, &place.join("moved")] {
                            let removed = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
                            record.note(format_args!("left: {}", removed.is_ok()));
                        }
                    };
                    let exchange = rustix::fs::RenameFlags::EXCHANGE;
                    step("unlink", &|| rustix::fs::unlink(&file));
                    step("rmdir", &|| rustix::fs::rmdir(&sub));
                    step("rename", &|| rustix::fs::rename(&file, place.join("moved")));
                    step("rename a directory", &|| {
                        rustix::fs::rename(&sub, place.join("moved"))
                    });
                    step("replace", &|| rustix::fs::rename(&other, &file));
                    step("exchange", &|| {
                        rustix::fs::renameat_with(CWD, &other, CWD, &file, exchange)
                    });
                    step("link", &|| rustix::fs::link(&file, place.join("moved")));
                }
            }
            fs::remove_dir(&place).unwrap();
        }
    });
}

#[test]
fn a_program_that_runs_is_not_written() {
    compare(|dir, _| {
        let program = dir.join("program");
        fs::copy("/usr/bin/cat", &program).unwrap();
        let mut running = Command::new(&program)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let refused = [
            errno_of(writable(&program)).err(),
            errno_of(File::create(&program)).err(),
            truncate(&program, 0).err(),
        ];
        let renamed = fs::rename(&program, dir.join("other"));
        drop(running.stdin.take());
        assert!(running.wait().unwrap().success());
        assert_eq!(refused, [Some(rustix::io::Errno::TXTBSY); 3]);
        renamed.unwrap();
        let writer = writable(&dir.join("other")).unwrap();
        let started = Command::new(dir.join("other")).spawn();
        assert_eq!(errno_of(started.map(|_| ())), Err(rustix::io::Errno::TXTBSY));
        drop(writer);
    });
}

#[test]
fn suid_and_sgid_go_with_a_strangers_write_and_with_a_change_of_owner() {
    let world = World::new();
    let path = world.at("file");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let privileged = || {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        assert_eq!(mode(), 0o6777);
    };
    let as_nobody = |script: &str| {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(script)
            .arg("sh")
            .arg(&path)
            .uid(65_534)
            .gid(65_534);
        assert!(command.status().unwrap().success());
    };
    fs::write(&path, b"content").unwrap();
    privileged();
    as_nobody("echo more >> \"$1\"");
    assert_eq!(mode(), 0o777);
    privileged();
    as_nobody(": > \"$1\"");
    assert_eq!(mode(), 0o777);
    privileged();
    std::os::unix::fs::chown(&path, Some(1), Some(1)).unwrap();
    assert_eq!(mode(), 0o777);
}

/// A program that prints its effective uid, owned by root, suid, and writable for everybody.
fn suid_program(world: &World, name: &str) -> std::path::PathBuf {
    let path = world.at(name);
    fs::copy("/usr/bin/id", &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4777)).unwrap();
    path
}

/// Runs a command as a user without rights; what it printed.
fn as_stranger(command: &mut Command) -> String {
    let output = command.uid(65_533).gid(65_533).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn what_a_stranger_changed_does_not_run_with_its_owners_rights() {
    let world = World::new();
    fs::set_permissions(world.mnt(), fs::Permissions::from_mode(0o777)).unwrap();
    let who = |program: &std::path::Path| as_stranger(Command::new(program).arg("-u"));
    let program = suid_program(&world, "untouched");
    assert_eq!(who(&program), "0");

    // Nothing asks for the mode between the change and the execution.
    let program = suid_program(&world, "written");
    as_stranger(
        Command::new("dd")
            .args([
                "if=/usr/bin/id",
                "bs=1k",
                "count=1",
                "conv=notrunc",
                "status=none",
            ])
            .arg(format!("of={}", program.display())),
    );
    assert_eq!(who(&program), "65533");

    let program = suid_program(&world, "zeroed");
    let length = fs::metadata(&program).unwrap().len();
    as_stranger(
        Command::new("fallocate")
            .args(["--keep-size", "--offset", &length.to_string(), "--length", "4096"])
            .arg(&program),
    );
    assert_eq!(who(&program), "65533");
    assert_eq!(fs::metadata(&program).unwrap().mode() & 0o7777, 0o777);
}

#[test]
fn a_copy_within_the_mount_clears_suid() {
    let world = World::new();
    fs::write(world.at("from"), noise(1, 20_000)).unwrap();
    fs::set_permissions(world.at("from"), fs::Permissions::from_mode(0o666)).unwrap();
    let to = suid_program(&world, "to");
    let (from, to) = (
        File::open(world.at("from")).unwrap(),
        File::options().write(true).open(to).unwrap(),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the system call itself, not libc's wrapper, changes the credentials of this thread alone.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1_i64, 65_533_i64, -1_i64) };
            assert_eq!(changed, 0);
            let copied = rustix::fs::copy_file_range(&from, None, &to, None, 20_000);
            assert_eq!(copied, Ok(20_000));
        });
    });
    assert_eq!(to.metadata().unwrap().mode() & 0o7777, 0o777);
}
