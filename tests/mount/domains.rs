//! Subtrees under keys of their own, in one mount.

use crate::revocation::mapped_page_is_readable;
use crate::world::{World, errno, eventually, noise};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

const SIZE: usize = 1 << 20;

/// A mounted volume with two subtrees, `one` and `two`, with a file each.
struct Tenants {
    world: World,
    one: String,
    two: String,
}

impl Tenants {
    fn new() -> Self {
        Self::of(World::without_volume())
    }

    fn of(mut world: World) -> Self {
        world.create_volume();
        world.mount(&[]);
        let [one, two] = ["one", "two"].map(|name| {
            let key = world.create_key();
            fs::create_dir(world.at(name)).unwrap();
            set_key(&world, name, &key);
            fs::write(world.at(name).join("file"), noise(1, SIZE)).unwrap();
            key
        });
        fs::write(world.at("outside"), b"outside").unwrap();
        Self { world, one, two }
    }

    fn key(&self, operation: &str, key: &str) {
        self.world.kmsctl(&[operation, "--key-id", key]).unwrap();
    }

    fn domains(&self) -> Vec<Value> {
        let status = self
            .world
            .cmkfs_ok(&["status", "--json", self.world.mnt().to_str().unwrap()]);
        let status: Value = serde_json::from_str(&status).unwrap();
        status["domains"].as_array().unwrap().clone()
    }
}

fn set_key(world: &World, name: &str, key: &str) {
    world.cmkfs_ok(&["setkey", world.at(name).to_str().unwrap(), "--key-id", key]);
}

fn is_readable(path: &Path) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes == noise(1, SIZE))
}

#[test]
fn a_disabled_key_darkens_its_subtree_and_no_other() {
    let tenants = Tenants::new();
    let world = &tenants.world;
    let (one, two) = (world.at("one/file"), world.at("two/file"));
    let (open, sibling) = (File::open(&one).unwrap(), File::open(&two).unwrap());
    assert!(is_readable(&one) && is_readable(&two));
    assert!(mapped_page_is_readable(&open) && mapped_page_is_readable(&sibling));

    tenants.key("disable-key", &tenants.one);
    assert_eq!(errno(open.read_at(&mut [0; 16], 0)), libc::EKEYREVOKED);
    assert!(!mapped_page_is_readable(&open));
    for path in ["one", "one/file", "one/none"] {
        assert_eq!(errno(fs::metadata(world.at(path))), libc::EKEYREVOKED, "{path}");
    }
    assert_eq!(errno(fs::read_dir(world.at("one"))), libc::EKEYREVOKED);
    assert_eq!(errno(fs::write(world.at("one/new"), b"x")), libc::EKEYREVOKED);
    assert_eq!(errno(fs::remove_dir(world.at("one"))), libc::EKEYREVOKED);
    assert_eq!(
        errno(fs::rename(world.at("one"), world.at("x"))),
        libc::EKEYREVOKED
    );
    // It is there, and that is all.
    let mut listed: Vec<_> = fs::read_dir(world.mnt())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    listed.sort();
    assert_eq!(listed, ["one", "outside", "two"]);
    rustix::fs::statvfs(world.mnt()).unwrap();
    // All else goes on, what is cached and what is not.
    assert!(mapped_page_is_readable(&sibling));
    assert!(is_readable(&two));
    fs::write(world.at("two/new"), b"new").unwrap();
    fs::write(world.at("new"), b"new").unwrap();
    File::open(world.at("two/new")).unwrap().sync_all().unwrap();
    let domains = tenants.domains();
    let shown = |index: usize| (&domains[index]["path"], &domains[index]["key_state"]);
    assert_eq!(shown(0), (&"/".into(), &"live".into()));
    assert_eq!(shown(1), (&"/one".into(), &"revoked".into()));
    assert_eq!(shown(2), (&"/two".into(), &"live".into()));
    assert_eq!(domains[2]["inodes"], 3);

    tenants.key("enable-key", &tenants.one);
    eventually("the subtree is there again", || {
        open.read_at(&mut [0; 16], 0).is_ok()
    });
    assert!(is_readable(&one) && mapped_page_is_readable(&open));
}

#[test]
fn the_volume_s_own_key_darkens_every_subtree() {
    let tenants = Tenants::new();
    let world = &tenants.world;
    let open = File::open(world.at("one/file")).unwrap();
    assert!(is_readable(&world.at("one/file")) && mapped_page_is_readable(&open));
    world.with_key("disable-key");
    assert_eq!(errno(open.read_at(&mut [0; 16], 0)), libc::EKEYREVOKED);
    assert!(!mapped_page_is_readable(&open));
    assert_eq!(errno(fs::read(world.at("two/file"))), libc::EKEYREVOKED);
    world.with_key("enable-key");
    eventually("all is there again", || {
        ["one/file", "two/file"]
            .iter()
            .all(|path| is_readable(&world.at(path)))
    });
}

#[test]
fn one_key_for_two_subtrees_darkens_both() {
    let tenants = Tenants::new();
    let world = &tenants.world;
    fs::create_dir(world.at("three")).unwrap();
    set_key(world, "three", &tenants.one);
    fs::write(world.at("three/file"), noise(1, SIZE)).unwrap();
    tenants.key("disable-key", &tenants.one);
    for path in ["one/file", "three/file"] {
        assert_eq!(errno(fs::read(world.at(path))), libc::EKEYREVOKED, "{path}");
    }
    assert!(is_readable(&world.at("two/file")));
    tenants.key("enable-key", &tenants.one);
    eventually("both are there again", || {
        is_readable(&world.at("one/file")) && is_readable(&world.at("three/file"))
    });
}

/// Each session answers for its own domain, to the kmsd that it finds.
#[test]
fn subtrees_are_revoked_alone_by_a_kmsd_that_was_started_anew() {
    let mut tenants = Tenants::new();
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        tenants.world.stop_kmsd(signal);
        tenants.world.start_kmsd();
        let world = &tenants.world;
        tenants.key("disable-key", &tenants.one);
        assert_eq!(errno(fs::read(world.at("one/file"))), libc::EKEYREVOKED);
        assert!(is_readable(&world.at("two/file")), "{}", world.log());
        tenants.key("disable-key", &tenants.two);
        assert_eq!(errno(fs::read(world.at("two/file"))), libc::EKEYREVOKED);
        assert_eq!(fs::read(world.at("outside")).unwrap(), b"outside");
        for key in [&tenants.one, &tenants.two] {
            tenants.key("enable-key", key);
        }
        eventually("both are there again", || {
            is_readable(&world.at("one/file")) && is_readable(&world.at("two/file"))
        });
    }
    tenants.world.unmount();
}

/// A mount that does not let go of one subtree is ended as a whole.
#[test]
fn a_stopped_mount_shows_nothing_of_a_revoked_subtree() {
    let mut world = World::without_volume();
    world.create_volume();
    world.mount(&["-o", "drain_max_ms=100"]);
    let key = world.create_key();
    fs::create_dir(world.at("one")).unwrap();
    set_key(&world, "one", &key);
    let path = world.at("one/file");
    fs::write(&path, noise(1, SIZE)).unwrap();
    let open = File::open(&path).unwrap();
    open.sync_all().unwrap();
    assert!(is_readable(&path));
    world.signal_mount(libc::SIGSTOP);
    world.kmsctl(&["disable-key", "--key-id", &key]).unwrap();
    assert!(open.read_at(&mut [0; 16], 0).is_err());
    assert!(world.wait_for_mount().code().is_none());
    drop(open);
    world.clear_mountpoint();
    world.kmsctl(&["enable-key", "--key-id", &key]).unwrap();
    world.mount(&[]);
    assert!(is_readable(&path));
}

#[test]
fn a_destroyed_key_gives_the_space_of_its_subtree_back_and_leaves_the_others() {
    let mut tenants = Tenants::of(World::with_drill_clock());
    let world = &tenants.world;
    for number in 0..20 {
        fs::write(world.at(&format!("one/{number}")), noise(number, SIZE)).unwrap();
    }
    let large = File::options().write(true).open(world.at("one/file")).unwrap();
    large.write_all_at(&noise(3, SIZE), 8 << 20).unwrap();
    large.sync_all().unwrap();
    let held = File::open(world.at("one/file")).unwrap();
    let used = || {
        let mut sum = 0;
        for shard in fs::read_dir(world.volume().join("data")).unwrap() {
            for file in fs::read_dir(shard.unwrap().path()).unwrap() {
                sum += file
                    .unwrap()
                    .metadata()
                    .map_or(0, |metadata| metadata.blocks() * 512);
            }
        }
        sum
    };
    rustix::fs::fsync(File::open(world.at("two/file")).unwrap()).unwrap();
    assert!(used() > 10 << 20);
    world
        .kmsctl(&[
            "schedule-key-deletion",
            "--key-id",
            &tenants.one,
            "--pending-window-in-days",
            "7",
            "--yes",
        ])
        .unwrap();
    assert_eq!(errno(fs::read(world.at("one/file"))), libc::EKEYREVOKED);
    world.kmsctl(&["advance-clock", "--seconds", "691200"]).unwrap();
    assert_eq!(world.state_of_key(&tenants.one), "Destroyed");
    for path in ["one", "one/file"] {
        eventually("it is destroyed for the mount, too", || {
            errno(fs::metadata(world.at(path))) == libc::ENOKEY
        });
    }
    assert_eq!(errno(held.read_at(&mut [0; 16], 0)), libc::ENOKEY);
    eventually("its space is given back", || used() < 4 << 20);
    assert!(is_readable(&world.at("two/file")));
    let domains = tenants.domains();
    assert_eq!(
        (&domains[1]["key_state"], &domains[1]["inodes"]),
        (&"erased".into(), &0.into())
    );
    drop((held, large));
    tenants.world.unmount();

    let fsck = tenants
        .world
        .cmkfs(&["fsck", "--scrub", tenants.world.volume().to_str().unwrap()]);
    let said = String::from_utf8(fsck.stdout).unwrap();
    assert_eq!(fsck.status.code(), Some(0), "{said}");
    assert!(
        said.contains("/one: key domain 1") && said.contains("erased"),
        "{said}"
    );
    assert!(said.ends_with("clean\n"), "{said}");
    // It is known without its key, and its name goes when that is wanted.
    tenants.world.mount(&[]);
    let world = &tenants.world;
    assert_eq!(errno(fs::metadata(world.at("one"))), libc::ENOKEY);
    assert_eq!(errno(fs::remove_dir(world.at("one"))), libc::ENOKEY);
    let (one, two) = (world.at("one"), world.at("two"));
    assert!(!world.cmkfs(&["rmkey", two.to_str().unwrap()]).status.success());
    world.cmkfs_ok(&["rmkey", one.to_str().unwrap()]);
    assert_eq!(errno(fs::metadata(&one)), libc::ENOENT);
    assert!(is_readable(&two.join("file")));
    fs::create_dir(&one).unwrap();
    set_key(world, "one", &world.create_key());
    fs::write(one.join("file"), b"another").unwrap();
    tenants.world.unmount();
}

#[test]
fn kmsd_knows_what_depends_on_each_key() {
    let mut tenants = Tenants::new();
    let dependants = |world: &World, key: &str| {
        let described = world.kmsctl(&["describe-key", "--key-id", key]).unwrap();
        described["Dependants"].as_array().unwrap().clone()
    };
    let world = &tenants.world;
    eventually("the first report of each is there", || {
        [&world.key, &tenants.one, &tenants.two]
            .iter()
            .all(|key| dependants(world, key).len() == 1)
    });
    for (key, domain) in [(&world.key, 0), (&tenants.one, 1), (&tenants.two, 2)] {
        let [only] = &dependants(world, key)[..] else {
            panic!("more than one")
        };
        assert_eq!(only["Domain"], domain);
        assert_eq!(only["Location"], world.volume().to_str().unwrap());
        assert_eq!(only["Mounted"], true);
        assert!(only["Files"].as_u64().unwrap() >= 1);
    }
    fs::remove_dir_all(world.at("one")).unwrap();
    eventually("nothing depends on the key any more", || {
        dependants(world, &tenants.one).is_empty()
    });
    // What was stored is counted when the volume is mounted again.
    tenants.world.unmount();
    let world = &tenants.world;
    assert_eq!(dependants(world, &tenants.two)[0]["Mounted"], false);
    let refused = world.kmsctl(&[
        "schedule-key-deletion",
        "--key-id",
        &tenants.two,
        "--pending-window-in-days",
        "7",
    ]);
    let said = refused.unwrap_err();
    assert!(
        said.contains("1 key domain of 1 volume") && said.contains("--yes"),
        "{said}"
    );
    assert_eq!(world.state_of_key(&tenants.two), "Enabled");
    tenants.world.mount(&[]);
    let world = &tenants.world;
    eventually("its content is counted", || {
        dependants(world, &tenants.two)[0]["Bytes"].as_u64().unwrap() >= SIZE as u64
    });
}

#[test]
fn a_subtree_that_was_dark_when_the_volume_was_mounted_comes_to_light() {
    let mut tenants = Tenants::new();
    tenants.key("disable-key", &tenants.one);
    tenants.world.unmount();
    let fsck = tenants
        .world
        .cmkfs(&["fsck", tenants.world.volume().to_str().unwrap()]);
    let said = String::from_utf8(fsck.stdout).unwrap();
    assert!(fsck.status.success() && said.contains("not checked"), "{said}");
    tenants.world.mount(&[]);
    let world = &tenants.world;
    assert_eq!(errno(fs::read(world.at("one/file"))), libc::EKEYREVOKED);
    assert!(is_readable(&world.at("two/file")));
    tenants.key("enable-key", &tenants.one);
    eventually("the subtree is there", || is_readable(&world.at("one/file")));
    // It is watched as the others are.
    tenants.key("disable-key", &tenants.one);
    assert_eq!(errno(fs::read(world.at("one/file"))), libc::EKEYREVOKED);
    tenants.world.unmount();
}

#[test]
fn programs_move_and_copy_between_subtrees_as_between_filesystems() {
    let tenants = Tenants::new();
    let world = &tenants.world;
    let (from, to) = (world.at("one/file"), world.at("two/moved"));
    assert_eq!(errno(fs::rename(&from, &to)), libc::EXDEV);
    assert_eq!(errno(fs::hard_link(&from, &to)), libc::EXDEV);
    let moved = std::process::Command::new("mv")
        .args([&from, &to])
        .status()
        .unwrap();
    assert!(moved.success() && is_readable(&to) && !from.exists());
    fs::copy(&to, &from).unwrap();
    assert!(is_readable(&from));
    fs::rename(world.at("one"), world.at("renamed")).unwrap();
    assert!(is_readable(&world.at("renamed/file")));
    assert_eq!(tenants.domains()[1]["path"], "/renamed");
    fs::create_dir(world.at("empty")).unwrap();
    assert_eq!(errno(fs::rename(world.at("empty"), world.at("two"))), libc::EBUSY);
    assert_eq!(fs::canonicalize(world.at("renamed/../two/moved")).unwrap(), to);
    fs::remove_dir_all(world.at("renamed")).unwrap();
    assert_eq!(tenants.domains().len(), 2);
}

#[test]
fn setkey_says_why_it_does_nothing_and_does_nothing() {
    let tenants = Tenants::new();
    let world = &tenants.world;
    fs::create_dir_all(world.at("one/below")).unwrap();
    fs::create_dir_all(world.at("full/entry")).unwrap();
    fs::create_dir(world.at("plain")).unwrap();
    fs::set_permissions(world.at("plain"), PermissionsExt::from_mode(0o2711)).unwrap();
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();
    let disabled = world.create_key();
    tenants.key("disable-key", &disabled);
    let cases = [
        (world.at("one/below"), &tenants.two, "do not nest"),
        (world.at("one"), &tenants.two, "already"),
        (world.at("full"), &tenants.two, "not empty"),
        (world.at("outside"), &tenants.two, "Not a directory"),
        (world.at("none"), &tenants.two, "No such file"),
        (world.mnt(), &tenants.two, "root of a volume"),
        (outside, &tenants.two, "no mounted cmkfs volume"),
        (world.at("plain"), &disabled, "disabled"),
        (world.at("plain"), &"no such key".to_owned(), "no such key"),
    ];
    for (path, key, why) in cases {
        let refused = world.cmkfs(&["setkey", path.to_str().unwrap(), "--key-id", key]);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(
            said.contains(why) && said.lines().count() == 1,
            "{path:?}: {said}"
        );
    }
    assert_eq!(tenants.domains().len(), 3);
    // Nor did any of it cost the directory anything.
    set_key(world, "plain", &tenants.two);
    let made = fs::metadata(world.at("plain")).unwrap();
    assert_eq!(made.permissions().mode() & 0o7777, 0o2711);
    assert_eq!(fs::metadata(world.at("plain/..")).unwrap().ino(), 1);
}
