//! Directories: listing while they change, counts of links, and what may be moved where.

use crate::twin::{ROOT, Record, User, compare};
use crate::world::World;
use rustix::fs::{CWD, OFlags, RawDir, RenameFlags, SeekFrom};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

#[test]
fn entries_that_stay_are_listed_once_while_others_are_removed() {
    let world = World::new();
    let dir = world.at("dir");
    fs::create_dir(&dir).unwrap();
    for number in 0..5000 {
        File::create(dir.join(format!(
            "{number} {}",
            if number % 2 == 0 { "stays" } else { "goes" }
        )))
        .unwrap();
    }
    let mut seen = BTreeSet::new();
    for (index, entry) in fs::read_dir(&dir).unwrap().enumerate() {
        let name = entry.unwrap().file_name();
        if name.as_bytes().ends_with(b"stays") {
            assert!(seen.insert(name), "listed twice");
        }
        let number = index * 2 + 1;
        if number < 5000 {
            fs::remove_file(dir.join(format!("{number} goes"))).unwrap();
        }
    }
    assert_eq!(seen.len(), 2500);
}

fn open_dir(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap()
}

/// Up to `most` names from where the descriptor stands, each with the position behind it, as telldir(3) gives it.
fn list(dir: impl AsFd, most: usize) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    // A small buffer, so that the kernel is asked often.
    let mut buffer = Vec::with_capacity(1024);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        found.push((
            entry.file_name().to_str().unwrap().to_owned(),
            entry.next_entry_cookie(),
        ));
        if found.len() == most {
            break;
        }
    }
    found
}

fn names(listed: &[(String, u64)]) -> Vec<&str> {
    listed.iter().map(|(name, _)| name.as_str()).collect()
}

fn fill(dir: &Path, kind: &str, count: usize) {
    for number in 0..count {
        File::create(dir.join(format!("{kind} {number}"))).unwrap();
    }
}

/// seekdir(3) to every position that telldir(3) gave, in any order, finds what came behind it: entries that stay neither lost
/// nor doubled, whatever was added, removed and renamed since, by this or another handle.
#[test]
fn positions_in_a_directory_stay_good_while_it_changes() {
    const STAYING: usize = 300;
    let world = World::new();
    let dir = world.at("dir");
    fs::create_dir(&dir).unwrap();
    fill(&dir, "stays", STAYING);
    fill(&dir, "goes", 200);
    fill(&dir, "moves", 100);
    let handle = open_dir(&dir);
    let listed = list(&handle, usize::MAX);
    assert_eq!(listed.len(), STAYING + 300 + 2);
    let positions: BTreeSet<_> = listed.iter().map(|(_, position)| position).collect();
    assert_eq!(
        positions.len(),
        listed.len(),
        "each entry has a position of its own"
    );

    let stays = |listed: &[(String, u64)]| -> Vec<String> {
        let staying = listed.iter().filter(|(name, _)| name.starts_with("stays"));
        staying.map(|(name, _)| name.clone()).collect()
    };
    let expected = stays(&listed);
    assert_eq!(expected.len(), STAYING);
    let check = |what: &str| {
        // From the last to the first, so that no cached stream can simply go on.
        for at in (0..listed.len()).rev().step_by(7) {
            let (behind, position) = &listed[at];
            rustix::fs::seek(&handle, SeekFrom::Start(*position)).unwrap();
            let before = stays(&listed[..=at]).len();
            let found = list(&handle, usize::MAX);
            assert_eq!(stays(&found), expected[before..], "{what}, behind '{behind}'");
            assert_eq!(
                names(&found).into_iter().collect::<BTreeSet<_>>().len(),
                found.len()
            );
        }
    };
    check("nothing changed");
    for number in 0..200 {
        fs::remove_file(dir.join(format!("goes {number}"))).unwrap();
    }
    check("some were removed");
    fill(&dir, "comes", 500);
    check("others were added");
    // Another handle reads all of it, and with it fills the kernel's cache anew.
    assert_eq!(list(open_dir(&dir), usize::MAX).len(), STAYING + 100 + 500 + 2);
    check("another handle listed it");
    for number in 0..100 {
        let name = dir.join(format!("moves {number}"));
        fs::rename(name, dir.join(format!("moved {number}"))).unwrap();
    }
    check("some were renamed");
    rustix::fs::seek(&handle, SeekFrom::Start(0)).unwrap();
    let again = list(&handle, usize::MAX);
    assert_eq!(again.len(), STAYING + 100 + 500 + 2);
    assert_eq!(stays(&again), expected);
    assert!(
        names(&again)
            .iter()
            .all(|name| !name.starts_with("goes") && !name.starts_with("moves"))
    );
}

/// Two handles in the same directory, a few entries each in turn, while a third party changes it between every two reads.
#[test]
fn handles_in_one_directory_do_not_disturb_each_other() {
    let world = World::new();
    let dir = world.at("dir");
    fs::create_dir(&dir).unwrap();
    fill(&dir, "stays", 400);
    fill(&dir, "goes", 200);
    let handles = [open_dir(&dir), open_dir(&dir), open_dir(&dir)];
    let mut places = [0; 3];
    let mut seen: [BTreeMap<String, usize>; 3] = Default::default();
    let mut done = [false; 3];
    let mut round = 0;
    while done.contains(&false) {
        for (at, handle) in handles.iter().enumerate() {
            rustix::fs::seek(handle, SeekFrom::Start(places[at])).unwrap();
            let some = list(handle, 5 + 9 * at);
            done[at] = some.is_empty();
            for (name, position) in some {
                *seen[at].entry(name).or_default() += 1;
                places[at] = position;
            }
        }
        if round < 200 {
            fs::remove_file(dir.join(format!("goes {round}"))).unwrap();
        }
        fill(&dir, &format!("comes {round}"), 1);
        round += 1;
        assert!(round < 5000);
        if round > 200 {
            break;
        }
    }
    for (at, handle) in handles.iter().enumerate() {
        rustix::fs::seek(handle, SeekFrom::Start(places[at])).unwrap();
        for (name, _) in list(handle, usize::MAX) {
            *seen[at].entry(name).or_default() += 1;
        }
    }
    for seen in seen {
        assert!(seen.values().all(|count| *count == 1), "doubled");
        assert_eq!(seen.keys().filter(|name| name.starts_with("stays")).count(), 400);
    }
}

/// Every kind of move between directories and files, and what it leaves of names and counts.
#[test]
fn moves_are_allowed_refused_and_counted_as_in_ext4() {
    compare(|dir, record| {
        let flags = [
            RenameFlags::empty(),
            RenameFlags::NOREPLACE,
            RenameFlags::EXCHANGE,
            RenameFlags::WHITEOUT,
        ];
        let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
        let names = [
            "file",
            "link",
            "empty",
            "full",
            "full/inner",
            "full/inner/deep",
            "symlink",
            "none",
            "full/none",
            "full/.",
        ];
        for flags in flags
            .into_iter()
            .chain([both, RenameFlags::EXCHANGE | RenameFlags::WHITEOUT])
        {
            for from in names {
                for to in names {
                    let top = dir.join("top");
                    fs::create_dir(&top).unwrap();
                    fs::write(top.join("file"), b"file").unwrap();
                    fs::hard_link(top.join("file"), top.join("link")).unwrap();
                    fs::create_dir(top.join("empty")).unwrap();
                    fs::create_dir_all(top.join("full/inner/deep")).unwrap();
                    std::os::unix::fs::symlink("full", top.join("symlink")).unwrap();
                    // The kernel remembers all of them, and that some are not there.
                    for name in names {
                        drop(fs::symlink_metadata(top.join(name)));
                    }
                    let moved = rustix::fs::renameat_with(CWD, top.join(from), CWD, top.join(to), flags);
                    record.outcome(format_args!("{from} to {to}, {flags:?}"), moved);
                    note_tree(record, dir, &top);
                    fs::remove_dir_all(&top).unwrap();
                }
            }
        }
    });
}

/// What everything in a directory is, in the order of names; and the directory itself.
fn note_tree(record: &mut Record, above: &Path, dir: &Path) {
    record.stat(dir.strip_prefix(above).unwrap().display(), dir);
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    for path in entries.collect::<BTreeSet<_>>() {
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            note_tree(record, above, &path);
        } else {
            record.stat(path.strip_prefix(above).unwrap().display(), &path);
        }
    }
}

/// A directory that was removed while it was open, or someone's working directory, is empty and takes nothing in.
#[test]
fn a_removed_directory_is_as_in_ext4() {
    compare(|dir, record| {
        let gone = dir.join("gone");
        fs::create_dir(&gone).unwrap();
        let handle = open_dir(&gone);
        fs::remove_dir(&gone).unwrap();
        let stat = rustix::fs::fstat(&handle).unwrap();
        record.note(format_args!("links {} mode {:o}", stat.st_nlink, stat.st_mode));
        let mode = rustix::fs::Mode::from_raw_mode(0o700);
        record.outcome("mkdir", rustix::fs::mkdirat(&handle, "new", mode));
        record.outcome(
            "create",
            rustix::fs::openat(&handle, "new", OFlags::CREATE | OFlags::WRONLY, mode),
        );
        record.outcome("up", rustix::fs::openat(&handle, "..", OFlags::DIRECTORY, mode));
        record.outcome(
            "itself",
            rustix::fs::openat(&handle, ".", OFlags::DIRECTORY, mode),
        );
        record.outcome(
            "link",
            rustix::fs::linkat(
                CWD,
                "/proc/self/exe",
                &handle,
                "new",
                rustix::fs::AtFlags::empty(),
            ),
        );
        record.outcome("chmod", rustix::fs::fchmod(&handle, mode));
        fs::write(dir.join("file"), b"").unwrap();
        record.outcome(
            "move into",
            rustix::fs::renameat(CWD, dir.join("file"), &handle, "new"),
        );
        record.outcome("sync", rustix::fs::fsync(&handle));
        let mut buffer = Vec::with_capacity(1024);
        let first = RawDir::new(&handle, buffer.spare_capacity_mut())
            .next()
            .map(|entry| entry.map(|_| ()));
        record.outcome("list", first.unwrap_or(Ok(())));
        record.stat("above", dir);
    });
}

/// A whiteout is made by whom renames, where the name was.
#[test]
fn whiteouts_belong_to_whom_renamed_as_in_ext4() {
    compare(|dir, record| {
        for (mode, acl) in [(0o777, None), (0o2777, None), (0o777, Some("d:u:1001:rwx"))] {
            let place = dir.join("place");
            fs::create_dir(&place).unwrap();
            std::os::unix::fs::chown(&place, None, Some(4321)).unwrap();
            fs::set_permissions(&place, fs::Permissions::from_mode(mode)).unwrap();
            if let Some(acl) = acl {
                let set = std::process::Command::new("setfacl")
                    .args(["-m", acl])
                    .arg(&place)
                    .status();
                assert!(set.unwrap().success());
            }
            for user in [ROOT, User(1001, 1001, &[])] {
                fs::write(place.join("file"), b"").unwrap();
                std::os::unix::fs::chown(place.join("file"), Some(7), Some(8)).unwrap();
                let (from, to) = (place.join("file"), place.join("moved"));
                let moved =
                    user.does(|| rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::WHITEOUT));
                record.outcome(user.0, moved);
                record.stat("whiteout", &from);
                record.stat("moved", &to);
                let acl = rustix::fs::getxattr(&from, "system.posix_acl_access", &mut [0; 200]);
                record.note(format_args!("{acl:?}"));
                fs::remove_file(from).unwrap();
                fs::remove_file(to).unwrap();
            }
            fs::remove_dir(&place).unwrap();
        }
    });
}
