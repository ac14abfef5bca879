//! The engine against a filesystem of maps and vectors: the same operations, the same answers, the same tree.

use crate::reference::{Errno, Model, ModelNode, fallocate, node, read, write};
use crate::support::{DIR, FILE, Fixture, content, list, noise};
use cmkfs::engine::{
    Attr, Error, Fallocate, FileKind, Ino, NewNode, Owner, RenameFlags, Seek, SetAttr, SetXattr, Volume,
};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;

/// One step. Directories and inodes are chosen by number among those there are.
#[derive(Debug, Clone)]
enum Step {
    Make {
        dir: usize,
        name: u8,
        kind: FileKind,
    },
    Symlink {
        dir: usize,
        name: u8,
        length: usize,
    },
    Link {
        node: usize,
        dir: usize,
        name: u8,
    },
    Unlink {
        dir: usize,
        name: u8,
    },
    Rmdir {
        dir: usize,
        name: u8,
    },
    Rename {
        dir: usize,
        name: u8,
        new_dir: usize,
        new_name: u8,
        flags: RenameFlags,
    },
    Write {
        file: usize,
        offset: u64,
        length: usize,
        seed: u64,
    },
    Read {
        file: usize,
        offset: u64,
        length: usize,
    },
    Truncate {
        file: usize,
        size: u64,
    },
    Fallocate {
        file: usize,
        how: Fallocate,
        offset: u64,
        length: u64,
    },
    Copy {
        from: usize,
        from_offset: u64,
        to: usize,
        to_offset: u64,
        length: u64,
    },
    Seek {
        file: usize,
        offset: u64,
    },
    Chmod {
        node: usize,
        perm: u16,
    },
    SetXattr {
        node: usize,
        name: u8,
        length: usize,
        how: SetXattr,
    },
    RemoveXattr {
        node: usize,
        name: u8,
    },
    Fsync {
        file: usize,
    },
    /// Moves the clock, so that the background publishes and drains.
    Wait {
        seconds: u64,
    },
    /// Closes and opens.
    Reopen,
    /// Syncs everything, then opens without having closed.
    Crash,
}

/// The engine and the model side by side.
struct Pair {
    fixture: Fixture,
    volume: Option<Arc<Volume>>,
    model: Model,
    /// The engine's number of each of the model's nodes.
    inodes: Vec<Ino>,
}

fn errno<T>(result: Result<T, Error>) -> Result<T, Errno> {
    result.map_err(|error| error.errno())
}

fn name(number: u8) -> Vec<u8> {
    format!("user.{number}").into_bytes()
}

impl Pair {
    fn new() -> Self {
        let fixture = Fixture::new();
        let volume = Some(fixture.open());
        Self {
            fixture,
            volume,
            model: Model::new(),
            inodes: vec![Ino::ROOT],
        }
    }

    fn volume(&self) -> Arc<Volume> {
        Arc::clone(self.volume.as_ref().unwrap())
    }

    fn pick(&self, number: usize, wanted: impl Fn(FileKind) -> bool) -> Option<usize> {
        let all = self.model.reachable(wanted);
        (!all.is_empty()).then(|| all[number % all.len()])
    }

    fn dir(&self, number: usize) -> usize {
        self.pick(number, |kind| kind == FileKind::Directory).unwrap()
    }

    fn file(&self, number: usize) -> Option<usize> {
        self.pick(number, |kind| kind == FileKind::Regular)
    }

    fn made(&mut self, expected: Result<usize, Errno>, attr: Result<Attr, Errno>) {
        assert_eq!(attr.as_ref().map(|_| ()).map_err(|e| *e), expected.map(|_| ()));
        if let Ok(attr) = attr {
            self.inodes.push(attr.ino);
            self.volume().forget(attr.ino, 1);
        }
    }

    fn apply(&mut self, step: &Step) {
        let volume = self.volume();
        match *step {
            Step::Make { dir, name: n, kind } => {
                let dir = self.dir(dir);
                let new = NewNode {
                    kind,
                    ..if kind == FileKind::Directory { DIR } else { FILE }
                };
                let got = errno(volume.make(self.inodes[dir], &name(n), &new));
                let expected = self.model.add(dir, &name(n), node(kind, new.perm, dir));
                self.made(expected, got);
            }
            Step::Symlink { dir, name: n, length } => {
                let dir = self.dir(dir);
                let target = vec![b'x'; length];
                let got = errno(volume.symlink(self.inodes[dir], &name(n), &target, 0, 0));
                let new = ModelNode {
                    target,
                    ..node(FileKind::Symlink, 0o777, dir)
                };
                let expected = self.model.add(dir, &name(n), new);
                self.made(expected, got);
            }
            Step::Link { node, dir, name: n } => {
                let node = self.pick(node, |_| true).unwrap();
                let dir = self.dir(dir);
                let got = errno(volume.link(self.inodes[node], self.inodes[dir], &name(n)));
                let expected = if self.model.is_dir(node) {
                    Err(libc::EPERM)
                } else if self.model.child(dir, &name(n)).is_ok() {
                    Err(libc::EEXIST)
                } else {
                    self.model.put((dir, &name(n)), node);
                    Ok(())
                };
                assert_eq!(got.as_ref().map(|_| ()).map_err(|e| *e), expected);
                if got.is_ok() {
                    volume.forget(self.inodes[node], 1);
                }
            }
            Step::Unlink { dir, name: n } => {
                let dir = self.dir(dir);
                let expected = match self.model.child(dir, &name(n)) {
                    Ok(child) if self.model.is_dir(child) => Err(libc::EISDIR),
                    other => other.map(|_| ()),
                };
                assert_eq!(errno(volume.unlink(self.inodes[dir], &name(n))), expected);
                if expected.is_ok() {
                    self.model.nodes[dir].children.remove(&name(n));
                }
            }
            Step::Rmdir { dir, name: n } => {
                let dir = self.dir(dir);
                let expected = match self.model.child(dir, &name(n)) {
                    Ok(child) if !self.model.is_dir(child) => Err(libc::ENOTDIR),
                    Ok(child) if !self.model.nodes[child].children.is_empty() => Err(libc::ENOTEMPTY),
                    other => other.map(|_| ()),
                };
                assert_eq!(errno(volume.rmdir(self.inodes[dir], &name(n))), expected);
                if expected.is_ok() {
                    self.model.nodes[dir].children.remove(&name(n));
                }
            }
            Step::Rename {
                dir,
                name: n,
                new_dir,
                new_name,
                flags,
            } => {
                let (dir, new_dir) = (self.dir(dir), self.dir(new_dir));
                let (from, to) = (name(n), name(new_name));
                let got = errno(volume.rename(self.inodes[dir], &from, self.inodes[new_dir], &to, flags));
                let nodes = self.model.nodes.len();
                let expected = self.model.rename((dir, &from), (new_dir, &to), flags);
                assert_eq!(got, expected);
                if self.model.nodes.len() > nodes {
                    let whiteout = volume.lookup(self.inodes[dir], &from).unwrap();
                    self.inodes.push(whiteout.ino);
                    volume.forget(whiteout.ino, 1);
                }
            }
            Step::Write {
                file,
                offset,
                length,
                seed,
            } => {
                let Some(file) = self.file(file) else { return };
                let bytes = noise(seed, length);
                assert_eq!(errno(volume.write(self.inodes[file], offset, &bytes)), Ok(length));
                write(&mut self.model.nodes[file].data, offset, &bytes);
            }
            Step::Read { file, offset, length } => {
                let Some(file) = self.file(file) else { return };
                let mut bytes = vec![0; length];
                let count = volume.read(self.inodes[file], offset, &mut bytes).unwrap();
                assert_eq!(
                    &bytes[..count],
                    read(&self.model.nodes[file].data, offset, length)
                );
            }
            Step::Truncate { file, size } => {
                let Some(file) = self.file(file) else { return };
                let set = SetAttr {
                    size: Some(size),
                    ..SetAttr::default()
                };
                assert_eq!(volume.setattr(self.inodes[file], &set).unwrap().size, size);
                self.model.nodes[file].data.resize(size as usize, 0);
            }
            Step::Fallocate {
                file,
                how,
                offset,
                length,
            } => {
                let Some(file) = self.file(file) else { return };
                volume.fallocate(self.inodes[file], how, offset, length).unwrap();
                fallocate(
                    &mut self.model.nodes[file].data,
                    how,
                    offset as usize,
                    length as usize,
                );
            }
            Step::Copy {
                from,
                from_offset,
                to,
                to_offset,
                length,
            } => {
                let (Some(from), Some(to)) = (self.file(from), self.file(to)) else {
                    return;
                };
                if from == to {
                    return;
                }
                let (source, target) = (self.inodes[from], self.inodes[to]);
                let count = volume
                    .copy_range(source, from_offset, target, to_offset, length)
                    .unwrap();
                let bytes = read(&self.model.nodes[from].data, from_offset, length as usize).to_vec();
                assert_eq!(count, bytes.len() as u64);
                if !bytes.is_empty() {
                    write(&mut self.model.nodes[to].data, to_offset, &bytes);
                }
            }
            Step::Seek { file, offset } => {
                let Some(file) = self.file(file) else { return };
                self.check_seek(&volume, file, offset);
            }
            Step::Chmod { node, perm } => {
                let node = self.pick(node, |_| true).unwrap();
                let set = SetAttr {
                    perm: Some(perm),
                    ..SetAttr::default()
                };
                assert_eq!(volume.setattr(self.inodes[node], &set).unwrap().perm, perm);
                self.model.nodes[node].perm = perm;
            }
            Step::SetXattr {
                node,
                name: n,
                length,
                how,
            } => {
                let node = self.pick(node, |_| true).unwrap();
                let value = noise(length as u64, length);
                let got = errno(volume.setxattr(self.inodes[node], &name(n), &value, how, false));
                let xattrs = &mut self.model.nodes[node].xattrs;
                let expected = match (xattrs.contains_key(&name(n)), how) {
                    (true, SetXattr::Create) => Err(libc::EEXIST),
                    (false, SetXattr::Replace) => Err(libc::ENODATA),
                    _ => {
                        xattrs.insert(name(n), value);
                        Ok(())
                    }
                };
                assert_eq!(got, expected);
            }
            Step::RemoveXattr { node, name: n } => {
                let node = self.pick(node, |_| true).unwrap();
                let expected = self.model.nodes[node]
                    .xattrs
                    .remove(&name(n))
                    .map(|_| ())
                    .ok_or(libc::ENODATA);
                assert_eq!(errno(volume.removexattr(self.inodes[node], &name(n))), expected);
            }
            Step::Fsync { file } => {
                let Some(file) = self.file(file) else { return };
                volume.fsync(self.inodes[file]).unwrap();
            }
            Step::Wait { seconds } => {
                self.fixture.clock.advance(Duration::from_secs(seconds));
            }
            Step::Reopen => {
                volume.close().unwrap();
                drop(volume);
                self.reopen();
            }
            Step::Crash => {
                for id in self.model.reachable(|_| true) {
                    volume.fsync(self.inodes[id]).unwrap();
                }
                drop(volume);
                self.reopen();
            }
        }
    }

    fn reopen(&mut self) {
        self.volume = None;
        self.fixture.assert_consistent();
        self.volume = Some(self.fixture.open());
        self.check_tree();
    }

    /// Data may be more than what was written, never less, and holes read as zeros.
    fn check_seek(&self, volume: &Volume, file: usize, offset: u64) {
        let (ino, data) = (self.inodes[file], &self.model.nodes[file].data);
        let size = data.len() as u64;
        match errno(volume.seek(ino, offset, Seek::Data)) {
            Ok(at) => {
                assert!((offset..size).contains(&at));
                assert!(data[offset as usize..at as usize].iter().all(|byte| *byte == 0));
            }
            Err(error) => {
                assert_eq!(error, libc::ENXIO);
                assert!(data.iter().skip(offset as usize).all(|byte| *byte == 0));
            }
        }
        match errno(volume.seek(ino, offset, Seek::Hole)) {
            Ok(at) => assert!((offset..=size).contains(&at)),
            Err(error) => assert!(error == libc::ENXIO && offset >= size),
        }
    }

    fn check_tree(&self) {
        let volume = self.volume();
        let all = self.model.reachable(|_| true);
        // Those that were unlinked count until the background has reclaimed them.
        assert!((all.len() as u64..=self.inodes.len() as u64).contains(&volume.status().inodes));
        for id in all {
            let (ino, expected) = (self.inodes[id], &self.model.nodes[id]);
            let attr = volume.getattr(ino).unwrap();
            assert_eq!(
                (attr.kind, attr.perm, attr.nlink),
                (expected.kind, expected.perm, self.model.nlink(id))
            );
            match expected.kind {
                FileKind::Regular => {
                    assert_eq!(attr.size, expected.data.len() as u64);
                    assert!(
                        content(&volume, ino).unwrap() == expected.data,
                        "content of node {id}"
                    );
                    self.check_seek(&volume, id, 0);
                }
                FileKind::Symlink => assert_eq!(volume.readlink(ino).unwrap(), expected.target),
                FileKind::Directory => {
                    let children = expected.children.iter();
                    let mut children: Vec<_> =
                        children.map(|(n, id)| (n.clone(), self.inodes[*id])).collect();
                    children.sort();
                    assert_eq!(list(&volume, ino).unwrap(), children);
                }
                _ => {}
            }
            let mut names = volume.listxattr(ino).unwrap();
            names.sort();
            assert!(names.iter().eq(expected.xattrs.keys()));
            for (name, value) in &expected.xattrs {
                assert_eq!(&volume.getxattr(ino, name).unwrap(), value);
            }
        }
    }
}

/// Offsets and sizes at and around the boundaries that the format has: blocks, the inline limit, chunks.
fn position() -> impl Strategy<Value = u64> {
    let boundary = prop_oneof![
        Just(0_u64),
        Just(4096),
        Just(8192),
        Just(32768),
        Just(131_072),
        Just(262_144)
    ];
    prop_oneof![
        (boundary.clone(), 0_u64..3).prop_map(|(at, by)| (at + by).saturating_sub(1)),
        boundary,
        0_u64..400_000,
        0_u64..20_000,
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        1_u64..200,
        1_u64..9000,
        Just(4096),
        Just(131_072),
        position().prop_map(|at| at.max(1))
    ]
}

fn rename_flags() -> impl Strategy<Value = RenameFlags> {
    (
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.25),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(no_replace, exchange, whiteout)| RenameFlags {
            no_replace,
            exchange,
            whiteout: whiteout.then(Owner::default),
        })
}

fn allocation() -> impl Strategy<Value = Fallocate> {
    prop_oneof![
        any::<bool>().prop_map(|keep_size| Fallocate::Allocate { keep_size }),
        Just(Fallocate::PunchHole),
        any::<bool>().prop_map(|keep_size| Fallocate::ZeroRange { keep_size }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0_u8..6;
    let pick = 0_usize..8;
    let kind = prop_oneof![
        4 => Just(FileKind::Regular),
        3 => Just(FileKind::Directory),
        1 => Just(FileKind::Fifo),
    ];
    let how = prop_oneof![
        Just(SetXattr::Any),
        Just(SetXattr::Create),
        Just(SetXattr::Replace)
    ];
    prop_oneof![
        6 => (pick.clone(), n.clone(), kind).prop_map(|(dir, name, kind)| Step::Make { dir, name, kind }),
        1 => (pick.clone(), n.clone(), 1_usize..4096)
            .prop_map(|(dir, name, length)| Step::Symlink { dir, name, length }),
        2 => (pick.clone(), pick.clone(), n.clone()).prop_map(|(node, dir, name)| Step::Link { node, dir, name }),
        2 => (pick.clone(), n.clone()).prop_map(|(dir, name)| Step::Unlink { dir, name }),
        1 => (pick.clone(), n.clone()).prop_map(|(dir, name)| Step::Rmdir { dir, name }),
        4 => (pick.clone(), n.clone(), pick.clone(), n.clone(), rename_flags())
            .prop_map(|(dir, name, new_dir, new_name, flags)| Step::Rename { dir, name, new_dir, new_name, flags }),
        12 => (pick.clone(), position(), length(), any::<u64>())
            .prop_map(|(file, offset, length, seed)| Step::Write { file, offset, length: length as usize, seed }),
        6 => (pick.clone(), position(), length())
            .prop_map(|(file, offset, length)| Step::Read { file, offset, length: length as usize }),
        3 => (pick.clone(), position()).prop_map(|(file, size)| Step::Truncate { file, size }),
        3 => (pick.clone(), allocation(), position(), length())
            .prop_map(|(file, how, offset, length)| Step::Fallocate { file, how, offset, length }),
        1 => (pick.clone(), position(), pick.clone(), position(), length())
            .prop_map(|(from, from_offset, to, to_offset, length)|
                Step::Copy { from, from_offset, to, to_offset, length }),
        2 => (pick.clone(), position()).prop_map(|(file, offset)| Step::Seek { file, offset }),
        1 => (pick.clone(), 0_u16..0o2000).prop_map(|(node, perm)| Step::Chmod { node, perm }),
        2 => (pick.clone(), n.clone(), 0_usize..5000, how)
            .prop_map(|(node, name, length, how)| Step::SetXattr { node, name, length, how }),
        1 => (pick.clone(), n).prop_map(|(node, name)| Step::RemoveXattr { node, name }),
        3 => pick.prop_map(|file| Step::Fsync { file }),
        2 => (0_u64..12).prop_map(|seconds| Step::Wait { seconds }),
        1 => Just(Step::Reopen),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn every_step_has_the_models_outcome(steps in prop::collection::vec(step(), 1..120)) {
        let mut pair = Pair::new();
        for step in &steps {
            pair.apply(step);
        }
        pair.check_tree();
        pair.apply(&Step::Reopen);
    }
}

/// Cases to run: `PROPTEST_CASES`, or a number that keeps the suite short.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(48)
}
