//! Bad input: one clear line, exit status 1, nothing changed.

use crate::world::World;
use std::fs;
use std::path::Path;
use std::process::Output;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The one line that a failing command wrote.
fn one_line(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("cmkfs: "), "{said}");
    said
}

fn mount_fails(world: &World, volume: &Path, mountpoint: &Path) -> String {
    let said = one_line(&world.cmkfs(&["mount", text(volume), text(mountpoint)]));
    assert!(!world.is_mounted());
    let in_foreground = one_line(&world.cmkfs(&["mount", "--foreground", text(volume), text(mountpoint)]));
    assert!(
        in_foreground.ends_with(&said["cmkfs: ".len()..]),
        "{in_foreground}{said}"
    );
    said
}

#[test]
fn a_second_mount_of_a_volume_is_refused() {
    let world = World::new();
    let other = world.path("other");
    fs::create_dir(&other).unwrap();
    let said = one_line(&world.cmkfs(&["mount", text(&world.volume()), text(&other)]));
    assert!(said.contains("mounted already"), "{said}");
    fs::write(world.at("file"), b"the first mount goes on").unwrap();
}

#[test]
fn a_missing_kmsd_is_named_with_its_socket() {
    let mut world = World::unmounted();
    world.stop_kmsd(libc::SIGTERM);
    let said = mount_fails(&world, &world.volume(), &world.mnt());
    assert!(said.contains("kmsd.sock") && said.contains("start it"), "{said}");
    let fresh = world.path("fresh");
    one_line(&world.cmkfs(&["create", text(&fresh), "--key-id", &world.key]));
    assert!(!fresh.exists());
}

#[test]
fn a_disabled_or_unknown_key_makes_and_mounts_nothing() {
    let world = World::unmounted();
    world.with_key("disable-key");
    let said = mount_fails(&world, &world.volume(), &world.mnt());
    assert!(said.contains("disabled"), "{said}");
    let fresh = world.path("fresh");
    let said = one_line(&world.cmkfs(&["create", text(&fresh), "--key-id", &world.key]));
    assert!(said.contains("disabled") && !fresh.exists(), "{said}");
    let said = one_line(&world.cmkfs(&["create", text(&fresh), "--key-id", "alias/nobody"]));
    assert!(said.contains("alias/nobody") && !fresh.exists(), "{said}");
}

#[test]
fn what_is_no_volume_is_not_mounted() {
    let world = World::unmounted();
    let empty = world.path("empty");
    fs::create_dir(&empty).unwrap();
    assert!(mount_fails(&world, &empty, &world.mnt()).contains("no cmkfs volume"));
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    assert!(mount_fails(&world, &world.path("missing"), &world.mnt()).contains("missing"));
}

#[test]
fn a_volume_of_a_later_version_is_not_mounted() {
    let world = World::unmounted();
    let superblock = world.volume().join("superblock");
    let mut bytes = fs::read(&superblock).unwrap();
    bytes[8..12].copy_from_slice(&3_u32.to_be_bytes());
    fs::write(&superblock, bytes).unwrap();
    let said = mount_fails(&world, &world.volume(), &world.mnt());
    assert!(
        said.contains("version 3") && said.contains("newer cmkfs"),
        "{said}"
    );
}

#[test]
fn a_superblock_with_another_key_in_it_is_refused() {
    let world = World::unmounted();
    let other = world.kmsctl(&["create-key"]).unwrap();
    let other = other["KeyMetadata"]["KeyId"].as_str().unwrap();
    let superblock = world.volume().join("superblock");
    let bytes = fs::read(&superblock).unwrap();
    let at = bytes
        .windows(world.key.len())
        .position(|window| window == world.key.as_bytes())
        .unwrap();
    let mut changed = bytes.clone();
    changed[at..at + other.len()].copy_from_slice(other.as_bytes());
    fs::write(&superblock, changed).unwrap();
    assert!(mount_fails(&world, &world.volume(), &world.mnt()).contains("superblock was changed"));
    fs::write(&superblock, bytes).unwrap();
    world.cmkfs_ok(&["mount", text(&world.volume()), text(&world.mnt())]);
    world.cmkfs_ok(&["umount", text(&world.mnt())]);
}

#[test]
fn bad_mount_points_and_options_are_named() {
    let world = World::unmounted();
    assert!(mount_fails(&world, &world.volume(), &world.path("nowhere")).contains("nowhere"));
    let file = world.path("file");
    fs::write(&file, b"").unwrap();
    assert!(mount_fails(&world, &world.volume(), &file).contains("no directory"));
    let inside = world.volume().join("data");
    assert!(mount_fails(&world, &world.volume(), &inside).contains("inside"));
    let (volume, mnt) = (world.volume(), world.mnt());
    let said = one_line(&world.cmkfs(&["mount", "-o", "ro,bogus", text(&volume), text(&mnt)]));
    assert!(said.contains("'bogus'"), "{said}");
}

#[test]
fn a_volume_is_made_in_an_empty_directory_only() {
    let world = World::without_volume();
    let dir = world.path("occupied");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), b"mine").unwrap();
    let said = one_line(&world.cmkfs(&["create", text(&dir), "--key-id", &world.key]));
    assert!(said.contains("not empty"), "{said}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn only_a_mount_of_ours_is_unmounted() {
    let world = World::unmounted();
    let said = one_line(&world.cmkfs(&["umount", text(&world.mnt())]));
    assert!(said.contains("no cmkfs volume is mounted"), "{said}");
}

#[test]
fn a_busy_mount_stays() {
    let mut world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    let open = fs::File::open(world.at("file")).unwrap();
    let said = one_line(&world.cmkfs(&["umount", text(&world.mnt())]));
    assert!(said.contains("in use"), "{said}");
    assert_eq!(fs::read(world.at("file")).unwrap(), b"content");
    drop(open);
    world.unmount();
}
