//! Records that somebody put back as they once were, through a real mount and the programs that an operator has.

use crate::world::{World, errno, eventually};
use rocksdb::{DB, IteratorMode, Options};
use serde_json::Value;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;

const FAMILIES: [&str; 2] = ["meta", "content"];

/// The records of inodes, by their keys.
fn records(world: &World) -> Vec<(Vec<u8>, Vec<u8>)> {
    let db = database(world);
    let rows = db.iterator_cf(db.cf_handle("meta").unwrap(), IteratorMode::Start);
    let rows = rows.map(|row| row.unwrap());
    rows.filter(|(key, _)| key.get(2) == Some(&b'I'))
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

fn database(world: &World) -> DB {
    DB::open_cf(&Options::default(), world.volume().join("meta"), FAMILIES).unwrap()
}

fn verification(world: &World) -> String {
    let status = world.cmkfs_ok(&["status", "--json", world.mnt().to_str().unwrap()]);
    let status: Value = serde_json::from_str(&status).unwrap();
    status["domains"][0]["verification"]["state"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn a_record_put_back_is_told_and_the_volume_takes_no_changes_until_it_is_accepted() {
    let mut world = World::without_volume();
    world.create_volume();
    world.mount(&[]);
    fs::write(world.at("secret"), b"for the owner").unwrap();
    fs::set_permissions(world.at("secret"), Permissions::from_mode(0o644)).unwrap();
    world.unmount();
    let open = records(&world);
    world.mount(&["-o", "verify=full"]);
    assert_eq!(verification(&world), "matches");
    fs::set_permissions(world.at("secret"), Permissions::from_mode(0o600)).unwrap();
    world.unmount();
    // Whoever has the storage puts the mode back.
    let db = database(&world);
    for (key, value) in open {
        db.put_cf(db.cf_handle("meta").unwrap(), key, value).unwrap();
    }
    db.flush_wal(true).unwrap();
    drop(db);

    let (volume, mnt) = (world.volume(), world.mnt());
    let (volume, mnt) = (volume.to_str().unwrap(), mnt.to_str().unwrap());
    let refused = world.cmkfs(&["mount", volume, mnt, "-o", "verify=full"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && !world.is_mounted());
    assert!(
        said.contains("is not what was last written") && said.lines().count() == 1,
        "{said}"
    );

    world.mount(&[]);
    eventually("the verification differs", || verification(&world) == "differs");
    assert_eq!(errno(File::create(world.at("new"))), libc::EROFS);
    assert_eq!(fs::read(world.at("secret")).unwrap(), b"for the owner");
    assert!(
        world.log().contains("not what was last written"),
        "{}",
        world.log()
    );
    assert!(world.cmkfs_ok(&["status", mnt]).contains("DIFFERS"));
    world.unmount();

    let found = world.cmkfs(&["fsck", "--repair", volume]);
    assert_eq!(found.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&found.stdout).contains("[root]"));
    assert_eq!(
        world.cmkfs(&["fsck", "--accept-records", volume]).status.code(),
        Some(16)
    );
    let accepted = world.cmkfs(&["fsck", "--repair", "--accept-records", volume]);
    assert_eq!(accepted.status.code(), Some(1), "{accepted:?}");
    world.mount(&["-o", "verify=full"]);
    assert_eq!(
        fs::metadata(world.at("secret")).unwrap().permissions().mode() & 0o777,
        0o644
    );
    fs::write(world.at("new"), b"new").unwrap();
}

fn copy_volume(world: &World, name: &str) -> String {
    let to = world.path(name);
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([world.volume(), to.clone()])
        .status()
        .unwrap();
    assert!(copied.success());
    to.to_str().unwrap().to_owned()
}

fn put_back(world: &World, copy: &str) {
    fs::remove_dir_all(world.volume()).unwrap();
    fs::rename(copy, world.volume()).unwrap();
}

#[test]
fn a_volume_put_back_as_a_whole_is_refused_until_it_is_taken_in_and_kmsd_records_that() {
    let mut world = World::without_volume();
    world.create_volume();
    world.mount(&[]);
    fs::write(world.at("kept"), b"kept").unwrap();
    world.unmount();
    let old = copy_volume(&world, "old");
    world.mount(&[]);
    fs::write(world.at("lost"), b"lost").unwrap();
    world.unmount();
    let new = copy_volume(&world, "new");
    put_back(&world, &old);
    let (volume, mnt) = (world.volume(), world.mnt());
    let (volume, mnt) = (volume.to_str().unwrap(), mnt.to_str().unwrap());
    let mount = |world: &World| {
        let refused = world.cmkfs(&["mount", volume, mnt]);
        assert!(!refused.status.success() && !world.is_mounted());
        String::from_utf8_lossy(&refused.stderr).into_owned()
    };
    let said = mount(&world);
    assert!(
        said.contains("older than its last known state") && said.contains("operations missing"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1);
    // It can be looked at all the same.
    assert_eq!(world.cmkfs(&["fsck", volume]).status.code(), Some(0));

    world.mount(&["--accept-restore"]);
    assert_eq!(fs::read(world.at("kept")).unwrap(), b"kept");
    assert!(!world.at("lost").exists());
    fs::write(world.at("after"), b"after").unwrap();
    // A kmsd that was started anew knows it, and the mount goes on telling.
    world.stop_kmsd(libc::SIGKILL);
    world.start_kmsd();
    eventually("the mount is live again", || {
        fs::write(world.at("more"), b"more").is_ok()
    });
    world.unmount();
    world.mount(&[]);
    assert_eq!(fs::read(world.at("after")).unwrap(), b"after");
    world.unmount();
    let log = fs::read(world.keystore().join("audit.log")).unwrap();
    let name = b"AcceptRestore";
    assert!(log.windows(name.len()).any(|window| window == name));

    // What was the volume before is none any more.
    put_back(&world, &new);
    let said = mount(&world);
    assert!(
        said.contains("older than its last known state")
            || said.contains("is not the one that was mounted last"),
        "{said}"
    );
}
