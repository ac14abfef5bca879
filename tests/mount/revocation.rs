//! A key that is disabled, scheduled for deletion, and enabled again under a mounted volume.

use crate::world::{World, errno, eventually, noise};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;

const SIZE: usize = 1 << 20;

/// How many entries a directory shows.
fn list(dir: &std::path::Path) -> std::io::Result<usize> {
    fs::read_dir(dir)?.try_fold(0, |count, entry| entry.map(|_| count + 1))
}

fn refused<T>(result: std::io::Result<T>) -> bool {
    errno(result) == libc::EKEYREVOKED
}

/// Reads the first byte of a shared mapping in a child, which a SIGBUS ends.
pub fn mapped_page_is_readable(file: &File) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: the child makes async-signal-safe calls alone, and reads one byte of a mapping of its own.
    unsafe {
        match libc::fork() {
            0 => {
                let at = libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                );
                if at == libc::MAP_FAILED {
                    libc::_exit(2);
                }
                std::hint::black_box(std::ptr::read_volatile(at.cast::<u8>()));
                libc::_exit(0);
            }
            child => {
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                status == 0
            }
        }
    }
}

#[test]
fn a_disabled_key_refuses_everything_and_an_enabled_one_brings_it_back_without_a_remount() {
    let mut world = World::new();
    let bytes = noise(1, SIZE);
    fs::create_dir(world.at("dir")).unwrap();
    fs::write(world.at("dir/file"), &bytes).unwrap();
    fs::write(world.at("other"), b"other").unwrap();
    std::os::unix::fs::symlink("dir/file", world.at("link")).unwrap();
    let mut open = File::open(world.at("dir/file")).unwrap();
    let writer = File::options().write(true).open(world.at("other")).unwrap();
    for _ in 0..4 {
        assert_eq!(
            (list(&world.mnt()).unwrap(), list(&world.at("dir")).unwrap()),
            (3, 1)
        );
    }
    // Everything is in the kernel's caches now, and this write in nothing else.
    assert_eq!(fs::read(world.at("link")).unwrap(), bytes);
    assert!(mapped_page_is_readable(&open));
    writer.write_all_at(b"late!", 0).unwrap();

    world.with_key("disable-key");
    assert!(refused(open.read_at(&mut [0; 16], 0)));
    assert!(refused(open.read_at(&mut [0; 16], (SIZE - 16) as u64)));
    assert!(!mapped_page_is_readable(&open));
    assert!(refused(open.read(&mut [0; 16])));
    assert!(refused(open.metadata()));
    assert!(refused(fs::metadata(world.at("dir/file"))));
    assert!(refused(File::open(world.at("other"))));
    assert!(refused(fs::read_link(world.at("link"))));
    assert!(refused(list(&world.at("dir"))) && refused(list(&world.mnt())));
    assert!(refused(fs::metadata(world.mnt())));
    assert!(refused(fs::write(world.at("new"), b"x")));
    assert!(refused(writer.sync_all()));
    // What tells nothing of it goes on.
    rustix::fs::statvfs(world.mnt()).unwrap();

    world.with_key("enable-key");
    eventually("the open file can be read again", || {
        open.read_at(&mut [0; 16], 0).is_ok()
    });
    assert_eq!(fs::read(world.at("link")).unwrap(), bytes);
    assert!(mapped_page_is_readable(&open));
    assert_eq!(fs::read(world.at("other")).unwrap(), b"late!");
    fs::write(world.at("new"), b"x").unwrap();
    drop((open, writer));
    world.unmount();
}

#[test]
fn a_key_pending_deletion_refuses_like_a_disabled_one() {
    let world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    world
        .kmsctl(&[
            "schedule-key-deletion",
            "--key-id",
            &world.key,
            "--pending-window-in-days",
            "7",
            "--yes",
        ])
        .unwrap();
    assert!(refused(fs::read(world.at("file"))));
    world.with_key("cancel-key-deletion");
    if fs::read(world.at("file")).is_err() {
        world.kmsctl(&["enable-key", "--key-id", &world.key]).ok();
    }
    eventually("the file can be read again", || {
        fs::read(world.at("file")).is_ok_and(|bytes| bytes == b"content")
    });
}

#[test]
fn a_mount_can_be_ended_while_its_key_is_disabled() {
    let mut world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    world.with_key("disable-key");
    assert!(refused(fs::read(world.at("file"))));
    world.unmount();
    world.with_key("enable-key");
    world.mount(&[]);
    assert_eq!(fs::read(world.at("file")).unwrap(), b"content");
}

#[test]
fn a_key_that_was_disabled_while_kmsd_was_started_anew_is_noticed() {
    let mut world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    world.stop_kmsd(libc::SIGKILL);
    world.start_kmsd();
    // Nothing that this mount does asks the new kmsd for a key.
    world.with_key("disable-key");
    assert!(refused(fs::read(world.at("file"))));
    world.with_key("enable-key");
    eventually("the file can be read again", || {
        fs::read(world.at("file")).is_ok()
    });
}

#[test]
fn a_mount_that_is_revoked_by_hand_is_dark_without_kmsd_until_that_is_undone() {
    let mut world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    let open = File::open(world.at("file")).unwrap();
    world.stop_kmsd(libc::SIGKILL);
    let mnt = world.mnt().to_str().unwrap().to_owned();
    world.cmkfs_ok(&["revoke", &mnt]);
    assert!(refused(open.read_at(&mut [0; 7], 0)));
    assert!(refused(fs::read(world.at("file"))));
    world.start_kmsd();
    world.cmkfs_ok(&["revoke", &mnt]);
    assert!(refused(fs::read(world.at("file"))));
    world.cmkfs_ok(&["revoke", "--undo", &mnt]);
    eventually("the file can be read again", || {
        fs::read(world.at("file")).is_ok_and(|bytes| bytes == b"content")
    });
    let elsewhere = world.cmkfs(&["revoke", world.path("").to_str().unwrap()]);
    assert!(!elsewhere.status.success());
    assert!(String::from_utf8_lossy(&elsewhere.stderr).contains("no cmkfs volume is mounted"));
}

/// Database, slot and audit log all put back: kmsd alone cannot see it.
#[test]
fn a_keystore_put_back_whole_is_refused_by_a_volume_that_knew_more() {
    let mut world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    world.unmount();
    world.stop_kmsd(libc::SIGTERM);
    let old = world.path("old");
    copy(&world.keystore(), &old);
    world.start_kmsd();
    world.mount(&[]);
    world.with_key("disable-key");
    world.with_key("enable-key");
    // The volume notes it with what it stores.
    eventually("the volume is live", || {
        fs::write(world.at("file"), b"more").is_ok()
    });
    world.unmount();
    world.stop_kmsd(libc::SIGTERM);
    fs::remove_dir_all(world.keystore()).unwrap();
    copy(&old, &world.keystore());
    world.start_kmsd();
    let (volume, mnt) = (world.volume(), world.mnt());
    let (volume, mnt) = (volume.to_str().unwrap(), mnt.to_str().unwrap());
    let refused = world.cmkfs(&["mount", volume, mnt]);
    assert!(!refused.status.success());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("knows less than this volume has seen"), "{said}");
    assert_eq!(said.lines().count(), 1);
    world.mount(&["-o", "accept_kms_restore"]);
    assert_eq!(fs::read(world.at("file")).unwrap(), b"more");
    world.unmount();
    // From then on it is what counts.
    world.mount(&[]);
}

#[test]
fn a_kmsd_started_with_an_older_keystore_darkens_the_mount() {
    let mut world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    // Whatever it is that kmsd has written by now.
    world.stop_kmsd(libc::SIGTERM);
    let old = world.path("old");
    copy(&world.keystore(), &old);
    world.start_kmsd();
    world.with_key("disable-key");
    world.with_key("enable-key");
    eventually("the file can be read again", || {
        fs::read(world.at("file")).is_ok()
    });
    world.stop_kmsd(libc::SIGTERM);
    fs::remove_dir_all(world.keystore()).unwrap();
    copy(&old, &world.keystore());
    world.start_kmsd();
    eventually("the mount refuses that kmsd", || {
        errno(fs::read(world.at("file"))) == libc::EKEYREJECTED
    });
}

/// Copies a keystore, whose one directory is the database.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[test]
fn a_log_that_nobody_reads_any_more_does_not_keep_the_volume_readable() {
    let mut world = World::unmounted();
    // Every request is logged: the pipe is full at once.
    let (stands_still, log) = std::io::pipe().unwrap();
    world.mount_with_log(&[], log.into());
    fs::write(world.at("file"), b"content").unwrap();
    for reader in [Some(stands_still), None] {
        world.with_key("disable-key");
        assert!(refused(fs::read(world.at("file"))));
        world.with_key("enable-key");
        eventually("the file can be read again", || {
            fs::read(world.at("file")).is_ok()
        });
        drop(reader);
    }
    world.unmount();
}

#[test]
fn a_request_that_waits_for_a_silent_kmsd_does_not_hold_up_the_revocation() {
    const FILES: usize = 20;
    let mut world = World::new();
    for number in 0..FILES {
        fs::write(world.at(&format!("file-{number}")), b"content").unwrap();
    }
    // Their keys are nowhere but with kmsd.
    world.unmount();
    world.mount(&[]);
    // It answers, and needs no kmsd to begin with any more.
    fs::metadata(world.mnt()).unwrap();
    world.signal_kmsd(libc::SIGSTOP);
    std::thread::scope(|scope| {
        let (began, threads) = std::sync::mpsc::channel();
        let readers: Vec<_> = (0..FILES)
            .map(|number| {
                let (path, began) = (world.at(&format!("file-{number}")), began.clone());
                scope.spawn(move || {
                    // SAFETY: takes nothing.
                    began.send(unsafe { libc::gettid() }).unwrap();
                    fs::read(path)
                })
            })
            .collect();
        for thread in threads.iter().take(FILES) {
            let waits_in = format!("/proc/self/task/{thread}/wchan");
            eventually("a request waits for kmsd", || {
                // On a slow host it may have given kmsd up, and be gone.
                fs::read_to_string(&waits_in).map_or(true, |at| at == "request_wait_answer")
            });
        }
        world.signal_kmsd(libc::SIGCONT);
        world.with_key("disable-key");
        for number in 0..FILES {
            assert!(refused(fs::read(world.at(&format!("file-{number}")))));
        }
        for reader in readers {
            match reader.join().unwrap() {
                Ok(content) => assert_eq!(content, b"content"),
                // The latter if this host was slow, and it gave kmsd up.
                Err(error) => assert!(matches!(
                    error.raw_os_error(),
                    Some(libc::EKEYREVOKED | libc::EKEYEXPIRED)
                )),
            }
        }
    });
    world.with_key("enable-key");
    eventually("the files can be read again", || {
        (0..FILES).all(|number| fs::read(world.at(&format!("file-{number}"))).is_ok())
    });
    world.unmount();
}
