//! Extended attributes: in every namespace, by everybody, as in ext4.

use crate::twin::{ROOT, User, compare};
use rustix::fs::XattrFlags;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const STRANGER: User = User(1002, 1002, &[]);

/// Every namespace, on files and directories, by root and by others.
#[test]
fn attributes_are_as_in_ext4() {
    compare(|dir, record| {
        let longest = format!("user.{}", "n".repeat(250));
        let too_long = format!("{longest}n");
        let names = [
            "user.a",
            "trusted.a",
            "security.a",
            "system.a",
            "other.a",
            "user.",
            "user",
            "",
            &longest,
            &too_long,
        ];
        for is_dir in [false, true] {
            let path = dir.join(format!("{is_dir}"));
            if is_dir {
                fs::create_dir(&path).unwrap()
            } else {
                File::create(&path).map(drop).unwrap()
            }
            for mode in [0o666, 0o1777, 0o444] {
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
                for user in [ROOT, STRANGER] {
                    for name in names {
                        let short = &name[..name.len().min(12)];
                        let mut step = |what: &str, act: &(dyn Fn() -> rustix::io::Result<usize> + Sync)| {
                            let done = user.does(act);
                            record.note(format_args!(
                                "{what} {short} {} by {} mode {mode:o}: {done:?}",
                                name.len(),
                                user.0
                            ));
                        };
                        let set =
                            |value: &[u8], flags| rustix::fs::setxattr(&path, name, value, flags).map(|()| 0);
                        step("replace", &|| set(b"none", XattrFlags::REPLACE));
                        step("create", &|| set(b"value", XattrFlags::CREATE));
                        step("create again", &|| set(b"value", XattrFlags::CREATE));
                        step("set nothing", &|| set(b"", XattrFlags::empty()));
                        step("get", &|| rustix::fs::getxattr(&path, name, &mut [0; 100]));
                        step("set", &|| set(b"longer value", XattrFlags::empty()));
                        step("get too much", &|| rustix::fs::getxattr(&path, name, &mut [0; 5]));
                        step("size", &|| rustix::fs::getxattr(&path, name, &mut [0; 0]));
                        step("list", &|| rustix::fs::listxattr(&path, &mut [0; 0]));
                        step("list too much", &|| rustix::fs::listxattr(&path, &mut [0; 2]));
                        step("remove", &|| rustix::fs::removexattr(&path, name).map(|()| 0));
                        step("remove again", &|| {
                            rustix::fs::removexattr(&path, name).map(|()| 0)
                        });
                    }
                }
            }
        }
    });
}

#[test]
fn attributes_of_the_trusted_are_shown_to_root_alone() {
    compare(|dir, record| {
        let path = dir.join("file");
        fs::write(&path, b"").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        for name in ["user.plain", "trusted.secret", "security.mark"] {
            rustix::fs::setxattr(&path, name, b"value", XattrFlags::empty()).unwrap();
        }
        for user in [ROOT, STRANGER] {
            record.note(format_args!("{:?}", user.does(|| listed(&path))));
            for name in ["user.plain", "trusted.secret", "security.mark"] {
                let get = user.does(|| rustix::fs::getxattr(&path, name, &mut [0; 10]));
                record.outcome(format_args!("get {name} by {}", user.0), get);
                let set = user.does(|| rustix::fs::setxattr(&path, name, b"other", XattrFlags::empty()));
                record.outcome(format_args!("set {name} by {}", user.0), set);
            }
        }
    });
}

fn listed(path: &Path) -> Vec<String> {
    let mut buffer = [0; 1000];
    let length = rustix::fs::llistxattr(path, &mut buffer).unwrap();
    let names = buffer[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut names: Vec<_> = names
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}
