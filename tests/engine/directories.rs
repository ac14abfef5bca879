//! Large directories, listed while they change, and names of every kind.

use crate::support::{DIR, FILE, Fixture, list};
use cmkfs::engine::{Cookie, Error, Ino, RenameFlags, Taken};
use std::collections::BTreeSet;

#[test]
fn entries_that_stay_are_listed_once_while_others_come_and_go() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let dir = volume.make(Ino::ROOT, b"dir", &DIR).unwrap().ino;
    for number in 0..20_000 {
        let made = volume
            .make(dir, format!("stays {number}").as_bytes(), &DIR)
            .unwrap();
        volume.forget(made.ino, 1);
        if number % 10 == 0 {
            volume
                .make(dir, format!("goes {number}").as_bytes(), &DIR)
                .unwrap();
        }
    }
    let mut seen = BTreeSet::new();
    let mut from = Cookie::START;
    let mut round = 0;
    loop {
        let mut taken = 0;
        let mut last = None;
        volume
            .readdir(dir, from, &mut |entry| {
                if taken == 500 {
                    return Taken::Full;
                }
                taken += 1;
                if entry.name.starts_with(b"stays") {
                    assert!(seen.insert(entry.name.to_vec()), "listed twice");
                }
                last = Some(entry.cookie);
                Taken::Yes
            })
            .unwrap();
        let Some(last) = last else { break };
        from = last;
        for number in (0..1000)
            .map(|number| (round * 1000 + number) * 10)
            .take_while(|number| *number < 20_000)
        {
            volume.rmdir(dir, format!("goes {number}").as_bytes()).unwrap();
            volume
                .make(dir, format!("comes {number}").as_bytes(), &DIR)
                .unwrap();
        }
        round += 1;
    }
    assert_eq!(seen.len(), 20_000);
}

#[test]
fn listing_with_attributes_counts_what_was_taken() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let mut inodes = Vec::new();
    for number in 0..300 {
        let ino = volume
            .make(Ino::ROOT, format!("file {number}").as_bytes(), &FILE)
            .unwrap()
            .ino;
        volume.forget(ino, 1);
        inodes.push(ino);
    }
    let mut taken = Vec::new();
    volume
        .readdirplus(Ino::ROOT, Cookie::START, &mut |entry, attr| {
            if taken.len() == 200 {
                return Taken::Full;
            }
            assert_eq!(Some(entry.ino), attr.map(|attr| attr.ino));
            if entry.name != b"." && entry.name != b".." {
                taken.push((entry.name.to_vec(), entry.ino));
            }
            Taken::Yes
        })
        .unwrap();
    assert_eq!(taken.len(), 200);
    for number in 0..300 {
        volume
            .unlink(Ino::ROOT, format!("file {number}").as_bytes())
            .unwrap();
    }
    // Those that were taken live until they are forgotten, the others go.
    crate::support::eventually(|| volume.status().inodes == 201);
    for (_, ino) in &taken {
        assert_eq!(volume.getattr(*ino).unwrap().nlink, 0);
        volume.forget(*ino, 1);
    }
    crate::support::eventually(|| volume.status().inodes == 1);
}

#[test]
fn names_are_any_bytes_up_to_255() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let all: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    for name in [all.as_slice(), &[0xff; 255], b" ", b"...", b"\n"] {
        let ino = volume.make(Ino::ROOT, name, &DIR).unwrap().ino;
        assert_eq!(volume.lookup(Ino::ROOT, name).unwrap().ino, ino);
    }
    assert_eq!(list(&volume, Ino::ROOT).unwrap().len(), 5);
    for (name, errno) in [
        (vec![b'x'; 256], libc::ENAMETOOLONG),
        (Vec::new(), libc::EINVAL),
        (b"a/b".to_vec(), libc::EINVAL),
        (b"a\0b".to_vec(), libc::EINVAL),
        (b".".to_vec(), libc::EINVAL),
    ] {
        assert_eq!(volume.make(Ino::ROOT, &name, &DIR), Err(Error::Posix(errno)));
    }
}

#[test]
fn a_removed_directory_takes_no_new_names() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    let dir = volume.make(Ino::ROOT, b"dir", &DIR).unwrap().ino;
    volume.make(Ino::ROOT, b"file", &FILE).unwrap();
    volume.rmdir(Ino::ROOT, b"dir").unwrap();
    assert_eq!(volume.make(dir, b"new", &FILE), Err(Error::Posix(libc::ENOENT)));
    let moved = volume.rename(Ino::ROOT, b"file", dir, b"file", RenameFlags::default());
    assert_eq!(moved, Err(Error::Posix(libc::ENOENT)));
    assert_eq!(list(&volume, dir).unwrap(), []);
}

#[test]
fn the_kernel_finds_an_inode_of_any_kind_by_its_number() {
    let fixture = Fixture::new();
    let volume = fixture.open();
    for node in [FILE, DIR] {
        let name = format!("{:?}", node.kind);
        let ino = volume.make(Ino::ROOT, name.as_bytes(), &node).unwrap().ino;
        assert_eq!(volume.lookup(ino, b".").unwrap().ino, ino);
    }
    assert_eq!(
        volume.lookup(Ino(1 << 40), b".").unwrap_err().errno(),
        libc::ESTALE
    );
}
