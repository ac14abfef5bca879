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
