//! A tree with something of everything, and a check that never takes wrong data for right.

use crate::support::{DIR, FILE, content, list, noise};
use cmkfs::engine::{Error, Fallocate, FileKind, Ino, NewNode, SetAttr, SetXattr, Volume};

/// The content of each regular file, by name.
pub fn expected_files() -> Vec<(&'static str, Vec<u8>)> {
    let mut sparse = vec![0; 700_000];
    sparse[300_000..310_000].copy_from_slice(&noise(5, 10_000));
    let mut rewritten = noise(6, 400_000);
    rewritten[100_000..104_500].copy_from_slice(&noise(7, 4500));
    let mut punched = noise(8, 500_000);
    punched[130_000..300_000].fill(0);
    let mut cut = noise(9, 200_000);
    cut.truncate(70_001);
    vec![
        ("empty", Vec::new()),
        ("tiny", noise(1, 10)),
        ("small", noise(2, 9000)),
        ("inline", noise(3, 32_768)),
        ("large", noise(4, 1_000_000)),
        ("sparse", sparse),
        ("rewritten", rewritten),
        ("punched", punched),
        ("cut", cut),
    ]
}

const TARGET: &[u8] = b"some/where/else";
const XATTR: &[u8] = b"user.note";

/// Makes the tree in an empty volume.
pub fn make(volume: &Volume) {
    let dir = volume
        .make(Ino::ROOT, b"files", &NewNode { perm: 0o751, ..DIR })
        .unwrap()
        .ino;
    for (name, bytes) in expected_files() {
        let ino = volume.make(dir, name.as_bytes(), &FILE).unwrap().ino;
        match name {
            "sparse" => {
                volume.write(ino, 300_000, &bytes[300_000..310_000]).unwrap();
                volume
                    .setattr(
                        ino,
                        &SetAttr {
                            size: Some(700_000),
                            ..SetAttr::default()
                        },
                    )
                    .unwrap();
            }
            "rewritten" => {
                volume.write(ino, 0, &noise(6, 400_000)).unwrap();
                volume.fsync(ino).unwrap();
                volume.write(ino, 100_000, &bytes[100_000..104_500]).unwrap();
            }
            "punched" => {
                volume.write(ino, 0, &noise(8, 500_000)).unwrap();
                volume
                    .fallocate(ino, Fallocate::PunchHole, 130_000, 170_000)
                    .unwrap();
            }
            "cut" => {
                volume.write(ino, 0, &noise(9, 200_000)).unwrap();
                volume.fsync(ino).unwrap();
                volume
                    .setattr(
                        ino,
                        &SetAttr {
                            size: Some(70_001),
                            ..SetAttr::default()
                        },
                    )
                    .unwrap();
            }
            _ => {
                volume.write(ino, 0, &bytes).unwrap();
            }
        }
        volume.fsync(ino).unwrap();
    }
    let tiny = volume.lookup(dir, b"tiny").unwrap().ino;
    volume.link(tiny, Ino::ROOT, b"linked").unwrap();
    volume
        .setxattr(tiny, XATTR, &noise(10, 3000), SetXattr::Any, false)
        .unwrap();
    volume.symlink(Ino::ROOT, b"symlink", TARGET, 3, 4).unwrap();
    let node = NewNode {
        kind: FileKind::CharDevice,
        perm: 0o620,
        umask: 0,
        uid: 1,
        gid: 2,
        rdev: 0x0103,
    };
    volume.make(Ino::ROOT, b"device", &node).unwrap();
}

/// Compares what can be read with what [`make`] made: each answer is right, or an error. How many errors.
pub fn check(volume: &Volume) -> usize {
    let mut errors = 0;
    let mut ok = |result: Result<(), Error>| errors += usize::from(result.is_err());
    ok(check_root(volume));
    for (name, bytes) in expected_files() {
        ok(check_file(volume, name, &bytes));
    }
    ok(check_others(volume));
    errors
}

fn check_root(volume: &Volume) -> Result<(), Error> {
    let names: Vec<_> = list(volume, Ino::ROOT)?
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, [b"device".as_slice(), b"files", b"linked", b"symlink"]);
    let dir = volume.lookup(Ino::ROOT, b"files")?;
    assert_eq!((dir.perm, dir.kind, dir.nlink), (0o751, FileKind::Directory, 2));
    let mut expected: Vec<_> = expected_files()
        .into_iter()
        .map(|(name, _)| name.as_bytes().to_vec())
        .collect();
    expected.sort();
    let names: Vec<_> = list(volume, dir.ino)?.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, expected);
    Ok(())
}

fn check_file(volume: &Volume, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let dir = volume.lookup(Ino::ROOT, b"files")?;
    let attr = volume.lookup(dir.ino, name.as_bytes())?;
    assert_eq!(attr.size, bytes.len() as u64, "size of {name}");
    // Block by block, so that one damaged block does not keep the others from being compared.
    for (index, expected) in bytes.chunks(4096).enumerate() {
        let mut got = vec![0xa5; expected.len()];
        if let Ok(count) = volume.read(attr.ino, index as u64 * 4096, &mut got) {
            assert!(
                count == expected.len() && got == expected,
                "block {index} of {name}"
            );
        }
    }
    content(volume, attr.ino).map(|got| assert!(got == bytes, "{name}"))
}

fn check_others(volume: &Volume) -> Result<(), Error> {
    let symlink = volume.lookup(Ino::ROOT, b"symlink")?;
    assert_eq!((symlink.uid, symlink.gid), (3, 4));
    assert_eq!(volume.readlink(symlink.ino)?, TARGET);
    let device = volume.lookup(Ino::ROOT, b"device")?;
    assert_eq!(
        (device.kind, device.perm, device.rdev),
        (FileKind::CharDevice, 0o620, 0x0103)
    );
    let linked = volume.lookup(Ino::ROOT, b"linked")?;
    assert_eq!(linked.nlink, 2);
    assert_eq!(volume.listxattr(linked.ino)?, [XATTR]);
    assert_eq!(volume.getxattr(linked.ino, XATTR)?, noise(10, 3000));
    Ok(())
}
