//! What programs expect of a filesystem, beyond what pjdfstest covers: what goes through the page cache.

use crate::world::{World, errno, noise};
use rustix::fs::{FallocateFlags, RenameFlags, SeekFrom, XattrFlags};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::Command;

#[test]
fn a_shared_mapping_is_the_file() {
    let world = World::new();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(world.at("file"))
        .unwrap();
    file.set_len(200_000).unwrap();
    // SAFETY: the mapping is of a file that nothing truncates, and is not used after munmap.
    unsafe {
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(
            std::ptr::null_mut(),
            200_000,
            flags,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), 200_000);
        bytes.copy_from_slice(&noise(1, 200_000));
        assert_eq!(libc::msync(at, 200_000, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(at, 200_000), 0);
    }
    assert_eq!(fs::read(world.at("file")).unwrap(), noise(1, 200_000));
}

#[test]
fn data_not_written_back_is_found_by_seeking() {
    let world = World::new();
    let file = File::create(world.at("file")).unwrap();
    file.set_len(10 << 20).unwrap();
    file.write_all_at(&noise(1, 8192), 5 << 20).unwrap();
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(0)), Ok(5 << 20));
    assert_eq!(
        rustix::fs::seek(&file, SeekFrom::Hole(5 << 20)),
        Ok((5 << 20) + 8192)
    );
    assert_eq!(
        rustix::fs::seek(&file, SeekFrom::Data((5 << 20) + 8192)),
        Err(rustix::io::Errno::NXIO)
    );
    // cp --sparse goes by it.
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .args([world.at("file"), world.at("copy")])
        .status()
        .unwrap();
    assert!(copied.success());
    assert!(fs::read(world.at("copy")).unwrap() == fs::read(world.at("file")).unwrap());
}

#[test]
fn appending_and_direct_writes_of_any_alignment_are_kept() {
    let world = World::new();
    let path = world.at("file");
    let mut expected = Vec::new();
    for round in 0..50 {
        let bytes = noise(round, 777 * round as usize);
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .unwrap()
            .write_all(&bytes)
            .unwrap();
        expected.extend_from_slice(&bytes);
    }
    assert!(fs::read(&path).unwrap() == expected);
    let direct = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    for (at, length) in [(0, 4096), (4096, 8192), (100, 512), (65_535, 4098)] {
        let bytes = noise(at as u64 + 1000, length);
        direct.write_all_at(&bytes, at as u64).unwrap();
        expected[at..at + length].copy_from_slice(&bytes);
    }
    let mut got = vec![0; expected.len()];
    direct.read_exact_at(&mut got, 0).unwrap();
    assert!(got == expected && fs::read(&path).unwrap() == expected);
}

#[test]
fn an_unlinked_file_lives_as_long_as_it_is_open() {
    let world = World::new();
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(world.at("file"))
        .unwrap();
    file.write_all(&noise(1, 100_000)).unwrap();
    fs::remove_file(world.at("file")).unwrap();
    file.set_len(50_000).unwrap();
    file.write_all_at(b"still here", 60_000).unwrap();
    file.sync_all().unwrap();
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 60_010);
    assert_eq!(bytes[..50_000], noise(1, 50_000));
    assert_eq!(file.metadata().unwrap().nlink(), 0);
}

#[test]
fn renames_replace_refuse_exchange_and_leave_whiteouts() {
    let world = World::new();
    let cwd = rustix::fs::CWD;
    fs::write(world.at("one"), b"1").unwrap();
    fs::write(world.at("two"), b"2").unwrap();
    let rename = |flags| rustix::fs::renameat_with(cwd, world.at("one"), cwd, world.at("two"), flags);
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(rustix::io::Errno::EXIST));
    rename(RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(world.at("one")).unwrap(), b"2");
    rename(RenameFlags::WHITEOUT).unwrap();
    assert_eq!(fs::read(world.at("two")).unwrap(), b"2");
    let whiteout = fs::symlink_metadata(world.at("one")).unwrap();
    assert_eq!(
        (whiteout.mode() & libc::S_IFMT, whiteout.rdev()),
        (libc::S_IFCHR, 0)
    );
    fs::write(world.at("three"), b"3").unwrap();
    let open = File::open(world.at("two")).unwrap();
    fs::rename(world.at("three"), world.at("two")).unwrap();
    assert_eq!(fs::read(world.at("two")).unwrap(), b"3");
    let mut old = [0];
    open.read_exact_at(&mut old, 0).unwrap();
    assert_eq!(&old, b"2");
}

#[test]
fn space_is_reserved_punched_zeroed_and_copied() {
    let world = World::new();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(world.at("file"))
        .unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    assert!(file.metadata().unwrap().blocks() >= 2048);
    let mut expected = noise(1, 1 << 20);
    file.write_all_at(&expected, 0).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 100_000, 300_000).unwrap();
    expected[100_000..400_000].fill(0);
    rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 500_001, 5).unwrap();
    expected[500_001..500_006].fill(0);
    assert!(fs::read(world.at("file")).unwrap() == expected);
    let copy = File::create(world.at("copy")).unwrap();
    let mut from = 0;
    let mut to = 0;
    while from < 1 << 20 {
        let left = (1 << 20) - from as usize;
        assert!(rustix::fs::copy_file_range(&file, Some(&mut from), &copy, Some(&mut to), left).unwrap() > 0);
    }
    assert!(fs::read(world.at("copy")).unwrap() == expected);
    let unsupported = rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096);
    assert_eq!(unsupported, Err(rustix::io::Errno::OPNOTSUPP));
}

#[test]
fn extended_attributes_are_kept() {
    let world = World::new();
    let path = world.at("file");
    fs::write(&path, b"").unwrap();
    let value = noise(1, 60_000);
    rustix::fs::setxattr(&path, "user.large", &value, XattrFlags::CREATE).unwrap();
    assert_eq!(
        rustix::fs::setxattr(&path, "user.large", b"", XattrFlags::CREATE),
        Err(rustix::io::Errno::EXIST)
    );
    assert_eq!(
        rustix::fs::setxattr(&path, "user.none", b"", XattrFlags::REPLACE),
        Err(rustix::io::Errno::NODATA)
    );
    rustix::fs::setxattr(&path, "trusted.other", b"x", XattrFlags::empty()).unwrap();
    let mut got = vec![0; 65_536];
    let length = rustix::fs::getxattr(&path, "user.large", &mut got).unwrap();
    assert!(got[..length] == value);
    let length = rustix::fs::listxattr(&path, &mut got).unwrap();
    let names: BTreeSet<_> = got[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    assert_eq!(
        names,
        BTreeSet::from([b"user.large".as_slice(), b"trusted.other"])
    );
    rustix::fs::removexattr(&path, "user.large").unwrap();
    assert_eq!(
        rustix::fs::getxattr(&path, "user.large", &mut got),
        Err(rustix::io::Errno::NODATA)
    );
    let other = rustix::fs::setxattr(&path, "system.other", b"x", XattrFlags::empty());
    assert_eq!(other, Err(rustix::io::Errno::OPNOTSUPP));
}

#[test]
fn a_copy_that_preserves_everything_has_the_mode() {
    let world = World::new();
    let source = world.path("source");
    fs::write(&source, b"content").unwrap();
    fs::set_permissions(&source, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(
        Command::new("cp")
            .arg("-a")
            .args([&source, &world.at("copy")])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(fs::metadata(world.at("copy")).unwrap().mode() & 0o7777, 0o644);
}

#[test]
fn names_of_255_bytes_of_any_kind_and_not_one_more() {
    let world = World::new();
    let name = |length: usize| std::ffi::OsString::from(std::ffi::OsStr::from_bytes(&vec![0xfe; length]));
    fs::write(world.mnt().join(name(255)), b"x").unwrap();
    assert_eq!(fs::read(world.mnt().join(name(255))).unwrap(), b"x");
    assert_eq!(
        errno(File::create(world.mnt().join(name(256)))),
        libc::ENAMETOOLONG
    );
    let space = rustix::fs::statvfs(world.mnt()).unwrap();
    assert_eq!(space.f_namemax, 255);
    assert!(space.f_bavail > 0 && space.f_bavail <= space.f_blocks);
}

#[test]
fn without_the_page_cache_everything_still_works() {
    let mut world = World::unmounted();
    world.mount(&["-o", "cache=none"]);
    let bytes = noise(1, 500_001);
    fs::write(world.at("file"), &bytes).unwrap();
    assert!(fs::read(world.at("file")).unwrap() == bytes);
    assert!(
        Command::new("cp")
            .args([world.at("file"), world.at("copy")])
            .status()
            .unwrap()
            .success()
    );
    assert!(fs::read(world.at("copy")).unwrap() == bytes);
    world.unmount();
}

#[test]
fn a_large_copy_within_the_mount_is_whole() {
    let world = World::new();
    let bytes = noise(1, 20 << 20);
    fs::write(world.at("from"), &bytes).unwrap();
    let copied = fs::copy(world.at("from"), world.at("to")).unwrap();
    assert_eq!(copied, bytes.len() as u64);
    assert!(fs::read(world.at("to")).unwrap() == bytes);
}
