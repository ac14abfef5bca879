//! Names, and what they may stand for: limits, links, special files, attributes, handles that outlive names.

use crate::twin::{ROOT, Record, User, compare, errno_of};
use crate::world::World;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, XattrFlags};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

const STRANGER: User = User(1002, 1002, &[]);
const MODE: Mode = Mode::RWXU;

fn name(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// Every call that makes a name, given one too long, a path too long, a loop, and things in the way.
#[test]
fn bad_paths_are_refused_as_in_ext4() {
    compare(|dir, record| {
        fs::write(dir.join("file"), b"x").unwrap();
        fs::create_dir_all(dir.join("dir/inner")).unwrap();
        rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, MODE, 0).unwrap();
        for (target, link) in [
            ("loop b", "loop a"),
            ("loop a", "loop b"),
            ("none", "dangling"),
            ("dir", "to dir"),
            ("file", "to file"),
        ] {
            std::os::unix::fs::symlink(target, dir.join(link)).unwrap();
        }
        let deep = "dir/../".repeat((libc::PATH_MAX as usize - dir.as_os_str().len() - 8) / 7);
        let pad = libc::PATH_MAX as usize - 1 - dir.as_os_str().len() - 1 - deep.len();
        let longest = format!("{deep}{}", "n".repeat(pad));
        let too_long = format!("{longest}n");
        let (fits, over) = ("n".repeat(255), "n".repeat(256));
        let paths = [
            "",
            ".",
            "..",
            "file",
            "file/",
            "file/x",
            "file/..",
            "dir",
            "dir/",
            "dir/.",
            "dir/..",
            "dir/inner/x",
            "fifo",
            "fifo/x",
            "loop a",
            "loop a/x",
            "dangling",
            "dangling/",
            "dangling/x",
            "to dir",
            "to dir/",
            "to dir/x",
            "to file",
            "to file/",
            "none",
            "none/",
            "none/x",
            "new\nline",
            &fits,
            &over,
            &longest,
            &too_long,
        ];
        for (number, path) in paths.into_iter().enumerate() {
            let at = if path.is_empty() {
                PathBuf::new()
            } else {
                dir.join(path)
            };
            let short: String = path.chars().take(12).collect();
            let mut step = |what: &str, outcome: rustix::io::Result<()>| {
                let is_new = outcome.is_ok();
                record.outcome(format_args!("{what} {number} '{short}'"), outcome);
                is_new
            };
            let other = dir.join("file");
            let open = |flags| rustix::fs::open(&at, flags | OFlags::NONBLOCK, MODE).map(|_| ());
            step("open", open(OFlags::RDONLY));
            step("write", open(OFlags::WRONLY));
            step("directory", open(OFlags::RDONLY | OFlags::DIRECTORY));
            step("write a directory", open(OFlags::WRONLY | OFlags::DIRECTORY));
            step("not through a link", open(OFlags::RDONLY | OFlags::NOFOLLOW));
            step("path", open(OFlags::PATH | OFlags::NOFOLLOW));
            step("exclusive", open(OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL))
                .then(|| fs::remove_file(&at).unwrap());
            step(
                "create a directory",
                open(OFlags::RDONLY | OFlags::CREATE | OFlags::DIRECTORY),
            );
            step("mkdir", rustix::fs::mkdir(&at, MODE)).then(|| fs::remove_dir(&at).unwrap());
            step("mknod", rustix::fs::mknodat(CWD, &at, FileType::Fifo, MODE, 0))
                .then(|| fs::remove_file(&at).unwrap());
            step("symlink", rustix::fs::symlink("x", &at)).then(|| fs::remove_file(&at).unwrap());
            step("link", rustix::fs::link(&other, &at)).then(|| fs::remove_file(&at).unwrap());
            step("link from", rustix::fs::link(&at, dir.join("linked")))
                .then(|| fs::remove_file(dir.join("linked")).unwrap());
            step("rename to", rustix::fs::rename(dir.join("dir/inner"), &at))
                .then(|| drop(fs::rename(&at, dir.join("dir/inner"))));
            step("readlink", rustix::fs::readlink(&at, Vec::new()).map(|_| ()));
            step("stat", rustix::fs::stat(&at).map(|_| ()));
            step("lstat", rustix::fs::lstat(&at).map(|_| ()));
            step("truncate", crate::twin::truncate(&at, 1));
            step("truncate below 0", crate::twin::truncate(&at, -1));
            step("chmod", rustix::fs::chmod(&at, MODE));
            step(
                "unlink as a directory",
                rustix::fs::unlinkat(CWD, &at, AtFlags::REMOVEDIR)
                    .and_then(|()| rustix::fs::mkdir(&at, MODE)),
            );
            step("statfs", rustix::fs::statfs(&at).map(|_| ()));
            step("access", rustix::fs::access(&at, rustix::fs::Access::WRITE_OK));
            let _ = fs::create_dir(dir.join("dir/inner"));
        }
    });
}

#[test]
fn names_are_bytes() {
    let mut world = World::new();
    let mut all: Vec<Vec<u8>> = (1..=255)
        .filter(|byte| ![b'/', b'.'].contains(byte))
        .map(|byte| vec![byte])
        .collect();
    all.extend([
        b"...".to_vec(),
        b". ".to_vec(),
        b"..a".to_vec(),
        vec![0xff; 255],
        "\u{e9}".into(),
        "e\u{301}".into(),
    ]);
    for (number, bytes) in all.iter().enumerate() {
        fs::write(world.mnt().join(name(bytes)), number.to_string()).unwrap();
    }
    world.unmount();
    world.mount(&[]);
    let mut listed: Vec<_> = fs::read_dir(world.mnt())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    listed.sort();
    let mut expected: Vec<_> = all.iter().map(|bytes| name(bytes).to_owned()).collect();
    expected.sort();
    assert_eq!(listed, expected);
    for (number, bytes) in all.iter().enumerate() {
        assert_eq!(
            fs::read_to_string(world.mnt().join(name(bytes))).unwrap(),
            number.to_string()
        );
    }
}

#[test]
fn symlinks_hold_what_fits_a_path() {
    compare(|dir, record| {
        for length in [1, 59, 60, 61, 255, 1000, 4094, 4095, 4096] {
            let link = dir.join(format!("link {length}"));
            record.outcome(length, rustix::fs::symlink("t".repeat(length), &link));
            record.stat(length, &link);
            let target = fs::read_link(&link).map(|target| target.as_os_str().len()).ok();
            assert_eq!(target, (length < 4096).then_some(length));
        }
        let link = dir.join("link 60");
        record.outcome(
            "chown",
            errno_of(std::os::unix::fs::lchown(&link, Some(3), Some(4))),
        );
        record.outcome(
            "user attribute",
            rustix::fs::lsetxattr(&link, "user.a", b"x", XattrFlags::empty()),
        );
        record.outcome(
            "trusted attribute",
            rustix::fs::lsetxattr(&link, "trusted.a", b"x", XattrFlags::empty()),
        );
        record.outcome(
            "acl",
            rustix::fs::lgetxattr(&link, "system.posix_acl_access", &mut [0; 100]),
        );
        record.outcome("hard link", rustix::fs::link(&link, dir.join("hard")));
        record.stat("hard link", &dir.join("hard"));
    });
}

/// Devices, FIFOs and sockets: who may make them, and what they then are.
#[test]
fn special_files_are_as_in_ext4() {
    compare(|dir, record| {
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let kinds = [
            FileType::Fifo,
            FileType::Socket,
            FileType::CharacterDevice,
            FileType::BlockDevice,
            FileType::RegularFile,
            FileType::Directory,
            FileType::Symlink,
        ];
        for user in [ROOT, STRANGER] {
            for kind in kinds {
                for device in [0, rustix::fs::makedev(1, 3), rustix::fs::makedev(4095, 1_048_575)] {
                    let path = dir.join(format!("{kind:?} {device} {}", user.0));
                    let mode = Mode::from_raw_mode(0o4751);
                    record.outcome(
                        path.file_name().unwrap().display(),
                        user.does(|| rustix::fs::mknodat(CWD, &path, kind, mode, device)),
                    );
                    record.stat("", &path);
                }
            }
            let path = dir.join(format!("bound by {}", user.0));
            let bound = user.does(|| std::os::unix::net::UnixListener::bind(&path));
            record.stat("bound", &path);
            record.outcome(
                "bind again",
                errno_of(std::os::unix::net::UnixListener::bind(&path)),
            );
            record.outcome(
                "connect",
                errno_of(std::os::unix::net::UnixStream::connect(&path)),
            );
            record.outcome("open", errno_of(File::open(&path)));
            drop(bound);
            record.outcome(
                "connect to nobody",
                errno_of(std::os::unix::net::UnixStream::connect(&path)),
            );
        }
        let null = dir.join(format!("CharacterDevice {} 0", rustix::fs::makedev(1, 3)));
        record.outcome("read a device", errno_of(fs::read(&null)));
        record.outcome("set its size", crate::twin::truncate(&null, 5));
        let fifo = dir.join("Fifo 0 0");
        let (reader, writer) = (
            File::options().read(true).write(true).open(&fifo).unwrap(),
            File::options().append(true).open(&fifo).unwrap(),
        );
        std::io::Write::write_all(&mut &writer, b"through").unwrap();
        let mut got = [0; 7];
        std::io::Read::read_exact(&mut &reader, &mut got).unwrap();
        assert_eq!(&got, b"through");
        record.outcome("seek", rustix::fs::seek(&reader, rustix::fs::SeekFrom::Start(1)));
        record.outcome(
            "attribute",
            rustix::fs::setxattr(&fifo, "user.a", b"x", XattrFlags::empty()),
        );
        record.outcome(
            "trusted",
            rustix::fs::setxattr(&fifo, "trusted.a", b"x", XattrFlags::empty()),
        );
    });
}

/// Many names of one file, and how many of them each says there are.
#[test]
fn hard_links_are_counted_as_in_ext4() {
    compare(|dir, record: &mut Record| {
        let first = dir.join("first");
        fs::write(&first, b"content").unwrap();
        let open = File::open(&first).unwrap();
        for number in 0..50 {
            fs::hard_link(&first, dir.join(number.to_string())).unwrap();
        }
        record.stat("first", &first);
        fs::rename(dir.join("0"), dir.join("1")).unwrap();
        record.note(dir.join("0").exists());
        fs::write(dir.join("other"), b"other").unwrap();
        fs::rename(dir.join("other"), dir.join("2")).unwrap();
        fs::remove_file(&first).unwrap();
        record.stat("3", &dir.join("3"));
        for number in 0..50 {
            record.outcome(number, errno_of(fs::remove_file(dir.join(number.to_string()))));
        }
        let left = rustix::fs::fstat(&open).unwrap().st_nlink;
        assert_eq!(left, 0);
        let dir_link = fs::hard_link(dir, dir.join("dir"));
        record.outcome("of a directory", errno_of(dir_link));
    });
}
