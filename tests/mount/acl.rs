//! POSIX ACLs: enforced, in agreement with the mode, inherited.

use crate::world::World;
use rustix::fs::XattrFlags;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const OWNING_GROUP: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;
/// Someone who owns nothing here.
const STRANGER: u32 = 1234;
const STRANGERS_GROUP: u32 = 4321;

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let entry = |(tag, perm, id): &(u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [
        &2_u32.to_le_bytes()[..],
        &entries.iter().flat_map(entry).collect::<Vec<u8>>(),
    ]
    .concat()
}

fn set(path: &Path, name: &str, entries: &[(u16, u16, u32)]) {
    rustix::fs::setxattr(path, name, &acl(entries), XattrFlags::empty()).unwrap();
}

fn get(path: &Path, name: &str) -> Result<Vec<u8>, rustix::io::Errno> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::getxattr(path, name, &mut value)?;
    value.truncate(length);
    Ok(value)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// Whether a command succeeds as a user.
fn may(uid: u32, gid: u32, script: &str, path: &Path) -> bool {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(path).uid(uid).gid(gid);
    command.stderr(std::process::Stdio::null());
    command.status().unwrap().success()
}

const READ: &str = "cat \"$1\" >/dev/null";
const WRITE: &str = "echo x >> \"$1\"";

#[test]
fn a_named_user_and_a_named_group_get_what_the_mask_lets_through() {
    let world = World::new();
    let path = world.at("file");
    fs::write(&path, b"content").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!may(STRANGER, STRANGER, READ, &path));
    set(
        &path,
        ACCESS,
        &[
            (OWNER, 6, NO_ID),
            (USER, 6, STRANGER),
            (OWNING_GROUP, 0, NO_ID),
            (GROUP, 4, STRANGERS_GROUP),
            (MASK, 6, NO_ID),
            (OTHER, 0, NO_ID),
        ],
    );
    assert_eq!(mode(&path), 0o660);
    assert!(may(STRANGER, STRANGER, READ, &path) && may(STRANGER, STRANGER, WRITE, &path));
    assert!(may(1, STRANGERS_GROUP, READ, &path) && !may(1, STRANGERS_GROUP, WRITE, &path));
    assert!(!may(1, 1, READ, &path));
    // The group's digit of the mode is the mask.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(may(STRANGER, STRANGER, READ, &path) && !may(STRANGER, STRANGER, WRITE, &path));
    let mut changed = get(&path, ACCESS).unwrap();
    assert_eq!(&changed.split_off(4 + 4 * 8)[..4], &[0x10, 0, 4, 0]);
    // Without it the mode stays.
    rustix::fs::removexattr(&path, ACCESS).unwrap();
    assert_eq!(mode(&path), 0o640);
    assert!(!may(STRANGER, STRANGER, READ, &path));
    assert_eq!(get(&path, ACCESS), Err(rustix::io::Errno::NODATA));
    // To remove none is none removed.
    rustix::fs::removexattr(&path, ACCESS).unwrap();
}

#[test]
fn an_acl_that_a_mode_says_is_the_mode() {
    let world = World::new();
    let path = world.at("file");
    fs::write(&path, b"content").unwrap();
    set(
        &path,
        ACCESS,
        &[(OWNER, 7, NO_ID), (OWNING_GROUP, 5, NO_ID), (OTHER, 1, NO_ID)],
    );
    assert_eq!(mode(&path), 0o751);
    assert_eq!(get(&path, ACCESS), Err(rustix::io::Errno::NODATA));
    let refused = rustix::fs::setxattr(
        &path,
        DEFAULT,
        &acl(&[(OWNER, 7, NO_ID), (OWNING_GROUP, 5, NO_ID), (OTHER, 1, NO_ID)]),
        XattrFlags::empty(),
    );
    assert_eq!(refused, Err(rustix::io::Errno::ACCESS));
    let refused = rustix::fs::setxattr(&path, ACCESS, &acl(&[(OWNER, 7, NO_ID)]), XattrFlags::empty());
    assert_eq!(refused, Err(rustix::io::Errno::INVAL));
}

#[test]
fn what_is_made_below_a_directory_has_its_default_acl_and_no_umask() {
    let mut world = World::new();
    let (plain, dir) = (world.at("plain"), world.at("dir"));
    fs::create_dir(&plain).unwrap();
    fs::create_dir(&dir).unwrap();
    let make = "umask 077; : > \"$1/file\" && mkdir \"$1/below\"";
    assert!(may(0, 0, make, &plain));
    let default = [
        (OWNER, 7, NO_ID),
        (USER, 7, STRANGER),
        (OWNING_GROUP, 5, NO_ID),
        (MASK, 7, NO_ID),
        (OTHER, 0, NO_ID),
    ];
    set(&dir, DEFAULT, &default);
    let (file, below) = (dir.join("file"), dir.join("below"));
    assert!(may(0, 0, make, &dir));

    assert_eq!(
        (mode(&plain.join("file")), mode(&plain.join("below"))),
        (0o600, 0o700)
    );
    assert_eq!(mode(&file), 0o660);
    assert_eq!(mode(&below), 0o770);
    assert!(may(STRANGER, STRANGER, WRITE, &file));
    let entries = |perms: [u16; 5]| {
        let mut entries = default;
        for (entry, perm) in entries.iter_mut().zip(perms) {
            entry.1 = perm;
        }
        acl(&entries)
    };
    world.unmount();
    world.mount(&[]);
    assert_eq!(get(&file, ACCESS), Ok(entries([6, 7, 5, 6, 0])));
    assert_eq!(get(&below, ACCESS), Ok(entries([7, 7, 5, 7, 0])));
    assert_eq!(get(&below, DEFAULT), Ok(acl(&default)));
    assert_eq!(get(&file, DEFAULT), Err(rustix::io::Errno::NODATA));
}

#[test]
fn sgid_goes_when_an_owner_outside_the_group_sets_an_acl() {
    let world = World::new();
    for (gid, expected) in [(1, 0o0754), (STRANGER, 0o2754), (STRANGERS_GROUP, 0o2754)] {
        let path = world.at(&format!("file-{gid}"));
        fs::write(&path, b"").unwrap();
        std::os::unix::fs::chown(&path, Some(STRANGER), Some(gid)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o2777)).unwrap();
        // In a group by membership, too.
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={STRANGER}"));
        command.arg(format!("--regid={STRANGER}"));
        command.arg(format!("--groups={STRANGERS_GROUP}"));
        command.args(["setfacl", "-m", "u::7,g::5,o::4"]).arg(&path);
        assert!(command.status().unwrap().success());
        assert_eq!(mode(&path), expected);
    }
}
