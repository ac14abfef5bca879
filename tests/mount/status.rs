//! `cmkfs status`, going to the background, and ending by signal.

use crate::world::{World, eventually};
use serde_json::Value;

fn status(world: &World, path: &std::path::Path) -> Value {
    serde_json::from_str(&world.cmkfs_ok(&["status", "--json", path.to_str().unwrap()])).unwrap()
}

#[test]
fn status_tells_of_a_mount_by_either_path_and_of_a_volume_at_rest() {
    let mut world = World::new();
    std::fs::write(world.at("file"), b"content").unwrap();
    for path in [world.mnt(), world.volume()] {
        let status = status(&world, &path);
        assert_eq!(status["mounted"], true);
        assert_eq!(status["key_state"], "live");
        assert_eq!(status["inodes"], 2);
    }
    world.unmount();
    let at_rest = status(&world, &world.volume());
    assert_eq!(at_rest["mounted"], false);
    assert!(at_rest["cmk_arn"].as_str().unwrap().contains(&world.key));
}

#[test]
fn a_mount_in_the_background_answers_when_the_command_returns() {
    let world = World::unmounted();
    let (volume, mnt) = (world.volume(), world.mnt());
    world.cmkfs_ok(&["mount", volume.to_str().unwrap(), mnt.to_str().unwrap()]);
    std::fs::write(world.at("file"), b"content").unwrap();
    world.cmkfs_ok(&["umount", mnt.to_str().unwrap()]);
    assert!(!world.is_mounted());
    // The volume was released: it can be mounted at once.
    world.cmkfs_ok(&["mount", volume.to_str().unwrap(), mnt.to_str().unwrap()]);
    assert_eq!(std::fs::read(world.at("file")).unwrap(), b"content");
    world.cmkfs_ok(&["umount", mnt.to_str().unwrap()]);
}

#[test]
fn a_signal_unmounts_and_stores_everything() {
    let mut world = World::new();
    for (round, signal) in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP]
        .into_iter()
        .enumerate()
    {
        std::fs::write(world.at("file"), vec![round as u8; 300_000]).unwrap();
        let status = world.end_mount(signal);
        assert!(status.success(), "{status:?}: {}", world.log());
        eventually("the mount is gone", || !world.is_mounted());
        world.mount(&[]);
        assert_eq!(
            std::fs::read(world.at("file")).unwrap(),
            vec![round as u8; 300_000]
        );
    }
}

#[test]
fn a_second_signal_leaves_alone_what_lay_below() {
    let mut world = World::unmounted();
    rustix::mount::mount(
        "none",
        world.mnt(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    world.mount(&[]);
    let busy = std::fs::File::create(world.at("file")).unwrap();
    world.signal_mount(libc::SIGTERM);
    eventually("the busy mount has left the tree", || !world.is_mounted());
    world.signal_mount(libc::SIGTERM);
    eventually("the second signal was heard", || {
        world.log().contains("not there to be unmounted")
    });
    drop(busy);
    let mnt = world.mnt();
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let is_tmpfs = |line: &str| line.contains(mnt.to_str().unwrap()) && line.contains(" tmpfs ");
    let still_there = table.lines().any(is_tmpfs);
    crate::world::detach(&mnt);
    assert!(still_there);
}

#[test]
fn a_mount_that_is_also_elsewhere_is_said_not_to_have_ended() {
    let mut world = World::new();
    std::fs::create_dir(world.at("dir")).unwrap();
    let elsewhere = world.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    rustix::mount::mount_bind(world.at("dir"), &elsewhere).unwrap();
    let output = world.cmkfs(&["umount", world.mnt().to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("elsewhere") && said.lines().count() == 1,
        "{said}"
    );
    rustix::mount::unmount(&elsewhere, rustix::mount::UnmountFlags::empty()).unwrap();
    let status = world.wait_for_mount();
    assert!(status.success(), "{status:?}: {}", world.log());
}

#[test]
fn with_too_few_descriptors_a_mount_fails_and_does_not_hang() {
    let world = World::unmounted();
    let mut failed = 0;
    for limit in 12..48 {
        let script = format!("ulimit -n {limit}; exec timeout 60 \"$@\"");
        let output = std::process::Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(crate::program::program("cmkfs"))
            .args(["--socket".as_ref(), world.path("kmsd.sock").as_os_str()])
            .arg("mount")
            .args([world.volume(), world.mnt()])
            .output()
            .unwrap();
        if output.status.success() {
            world.cmkfs_ok(&["umount", world.mnt().to_str().unwrap()]);
        } else {
            assert_eq!(output.status.code(), Some(1), "with {limit}: {output:?}");
            failed += 1;
        }
        eventually("nothing is mounted", || !world.is_mounted());
    }
    assert!(failed > 0);
}

#[test]
fn a_read_only_mount_refuses_changes() {
    let mut world = World::new();
    std::fs::write(world.at("file"), b"content").unwrap();
    world.unmount();
    world.mount(&["-o", "ro"]);
    assert_eq!(std::fs::read(world.at("file")).unwrap(), b"content");
    assert_eq!(
        crate::world::errno(std::fs::write(world.at("file"), b"x")),
        libc::EROFS
    );
    world.unmount();
}
