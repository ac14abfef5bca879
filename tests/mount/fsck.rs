//! `cmkfs fsck`: what it says, how it exits, and that it changes nothing unless told to.

use crate::world::{World, noise};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

fn fsck(world: &World, options: &[&str]) -> (i32, String) {
    let volume = world.volume();
    let arguments = [&["fsck", volume.to_str().unwrap()], options].concat();
    let output = world.cmkfs(&arguments);
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

/// The volume with a directory, a small file and a large one, unmounted.
fn made() -> World {
    let mut world = World::new();
    fs::create_dir(world.at("dir")).unwrap();
    fs::write(world.at("dir/small"), noise(1, 5000)).unwrap();
    fs::write(world.at("dir/large"), noise(2, 300_000)).unwrap();
    world.unmount();
    world
}

fn slot_file(world: &World) -> PathBuf {
    let data = world.volume().join("data");
    let mut shards = fs::read_dir(data).unwrap().map(|shard| shard.unwrap().path());
    let file = shards.find_map(|shard| fs::read_dir(shard).unwrap().next());
    file.unwrap().unwrap().path()
}

/// Every file of a volume, with its content.
fn snapshot(dir: &Path, into: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            snapshot(&path, into);
        } else {
            into.insert(path.clone(), fs::read(path).unwrap());
        }
    }
}

#[test]
fn a_clean_volume_is_said_to_be_and_left_as_it_is() {
    let world = made();
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    snapshot(&world.volume(), &mut before);
    let (status, said) = fsck(&world, &[]);
    assert_eq!(status, 0, "{said}");
    assert!(
        said.trim_end()
            .ends_with("4 inodes, 2 directories, 2 files, 76 blocks: clean"),
        "{said}"
    );
    let (status, said) = fsck(&world, &["--scrub", "--json"]);
    assert_eq!(status, 0);
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["clean"], true);
    assert_eq!(report["scrubbed_blocks"], 76);
    snapshot(&world.volume(), &mut after);
    assert!(before == after);
}

#[test]
fn a_volume_whose_daemon_was_killed_is_consistent() {
    let mut world = World::new();
    for number in 0..50 {
        let file = File::create(world.at(&format!("file {number}"))).unwrap();
        file.write_all_at(&noise(number, 3000 * number as usize), 0)
            .unwrap();
        if number % 2 == 0 {
            file.sync_all().unwrap();
        }
    }
    world.end_mount(libc::SIGKILL);
    let (status, said) = fsck(&world, &["--scrub", "--repair"]);
    assert!(status < 4, "{said}");
    assert_eq!(fsck(&world, &["--scrub"]).0, 0);
}

#[test]
fn a_damaged_block_is_told_by_the_path_of_its_file() {
    let world = made();
    let file = File::options()
        .read(true)
        .write(true)
        .open(slot_file(&world))
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 9000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 9000).unwrap();
    assert_eq!(fsck(&world, &[]).0, 0);
    let (status, said) = fsck(&world, &["--scrub"]);
    assert_eq!(status, 4);
    assert!(said.starts_with("/dir/large (inode "), "{said}");
    assert!(
        said.contains("block 2 of inode") && said.contains("[block]"),
        "{said}"
    );
    let (status, said) = fsck(&world, &["--scrub", "--json"]);
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((status, report["left"].as_u64()), (4, Some(1)));
    assert_eq!(report["problems"][0]["path"], "/dir/large");
}

#[test]
fn what_leaked_is_given_back_when_asked_for() {
    let world = made();
    let file = File::options().write(true).open(slot_file(&world)).unwrap();
    file.write_all_at(&noise(3, 4096), 10 << 20).unwrap();
    assert_eq!(fsck(&world, &[]).0, 4);
    let (status, said) = fsck(&world, &["--repair"]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("repaired: /dir/large"), "{said}");
    assert_eq!(fsck(&world, &["--scrub"]).0, 0);
}

#[test]
fn what_cannot_be_checked_is_one_line_and_a_status_of_its_own() {
    let mut world = World::new();
    let (status, said) = fsck(&world, &[]);
    assert_eq!(status, 8);
    assert!(
        said.contains("is mounted already") && said.lines().count() == 1,
        "{said}"
    );
    world.unmount();
    assert_eq!(fsck(&world, &["--scrubb"]).0, 16);
    world.with_key("disable-key");
    let (status, said) = fsck(&world, &[]);
    assert_eq!(status, 8);
    assert!(
        said.contains("the key is disabled") && said.lines().count() == 1,
        "{said}"
    );
    assert_eq!(world.cmkfs(&["fsck", "/nowhere"]).status.code(), Some(8));
}
