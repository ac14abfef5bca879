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
fn sigterm_unmounts_and_stores_everything() {
    let mut world = World::new();
    std::fs::write(world.at("file"), vec![7; 300_000]).unwrap();
    let status = world.end_mount(libc::SIGTERM);
    assert!(status.success(), "{status:?}: {}", world.log());
    eventually("the mount is gone", || !world.is_mounted());
    world.mount(&[]);
    assert_eq!(std::fs::read(world.at("file")).unwrap(), vec![7; 300_000]);
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
