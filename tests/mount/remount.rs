//! A tree of every kind, through unmount and the restart of both daemons.

use crate::world::{World, noise};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// All that stat(2) and the content tell, by path.
fn describe(dir: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            let content = if stat.is_file() {
                let bytes = fs::read(&path).unwrap();
                format!(
                    "{:?}",
                    bytes
                        .iter()
                        .fold(bytes.len() as u64, |sum, byte| sum.wrapping_mul(31)
                            + u64::from(*byte))
                )
            } else if stat.is_symlink() {
                format!("{:?}", fs::read_link(&path).unwrap())
            } else {
                String::new()
            };
            let mut value = [0; 100];
            let xattr = rustix::fs::lgetxattr(&path, "user.note", &mut value);
            all.insert(
                name,
                format!(
                    "mode {:o} nlink {} owner {}:{} size {} rdev {} ino {} mtime {}.{} xattr {:?} {content}",
                    stat.mode(),
                    stat.nlink(),
                    stat.uid(),
                    stat.gid(),
                    if stat.is_dir() { 0 } else { stat.size() },
                    stat.rdev(),
                    stat.ino(),
                    stat.mtime(),
                    stat.mtime_nsec(),
                    xattr.map(|length| value[..length].to_vec()),
                ),
            );
            if stat.is_dir() {
                dirs.push(path);
            }
        }
    }
    all
}

#[test]
fn a_tree_of_every_kind_is_the_same_after_both_daemons_were_restarted() {
    let mut world = World::new();
    for dir in 0..10_u64 {
        let dir_path = world.at(&format!("dir {dir}"));
        fs::create_dir(&dir_path).unwrap();
        for number in 0..30 {
            let seed = dir * 30 + number;
            let path = dir_path.join(format!("file {number}"));
            fs::write(&path, noise(seed, (seed * seed * 13 % 300_000) as usize)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o400 + (seed as u32 % 0o377))).unwrap();
        }
    }
    let first = world.at("dir 0/file 29");
    rustix::fs::setxattr(&first, "user.note", b"a note", rustix::fs::XattrFlags::empty()).unwrap();
    fs::hard_link(&first, world.at("hard link")).unwrap();
    std::os::unix::fs::symlink("dir 1/file 1", world.at("symlink")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        world.at("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o640),
        0,
    )
    .unwrap();
    std::os::unix::fs::chown(world.at("dir 2/file 3"), Some(12), Some(34)).unwrap();
    fs::set_permissions(world.at("dir 3"), fs::Permissions::from_mode(0o3711)).unwrap();
    let sparse = File::create(world.at("sparse")).unwrap();
    sparse.set_len(3 << 30).unwrap();
    sparse.write_all_at(b"in the middle", 1 << 30).unwrap();
    sparse.set_len(5_000_000).unwrap();
    sparse.write_all_at(b"near the start", 1_000_000).unwrap();
    let times = fs::FileTimes::new()
        .set_modified(std::time::UNIX_EPOCH - std::time::Duration::new(86_400, 123_456_789));
    sparse.set_times(times).unwrap();
    drop(sparse);

    let before = describe(&world.mnt());
    assert_eq!(before.len(), 10 + 300 + 4);
    world.unmount();
    world.stop_kmsd(libc::SIGTERM);
    world.start_kmsd();
    world.mount(&[]);
    let after = describe(&world.mnt());
    assert!(after.keys().eq(before.keys()));
    for (path, described) in &before {
        assert_eq!(&after[path], described, "{path}");
    }
    assert!(
        before["sparse"].contains("mtime -86401.876543211"),
        "{}",
        before["sparse"]
    );
    world.unmount();
}
