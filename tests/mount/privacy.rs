//! What lies on storage is noise; and what it costs to keep it so.

use crate::world::{World, noise};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Contents that could be recognized from any part of them.
fn secrets() -> Vec<(String, Vec<u8>)> {
    (0..20_u64)
        .map(|number| {
            let name = format!("name-of-secret-{number:02}-{:08x}", number * 0x0123_4567);
            let line = format!("content of secret {number:02}, known to nobody else. ");
            (name, line.repeat(1 + 400 * number as usize).into_bytes())
        })
        .collect()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files
}

/// How many needles lie in the files, or in their names.
fn found(dirs: &[PathBuf], needles: &[Vec<u8>]) -> usize {
    let mut count = 0;
    for path in dirs.iter().flat_map(|dir| files_below(dir)) {
        let mut bytes = match fs::read(&path) {
            // The database removes files while it is open.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            bytes => bytes.unwrap(),
        };
        bytes.extend_from_slice(path.as_os_str().as_encoded_bytes());
        count += needles.iter().filter(|needle| contains(&bytes, needle)).count();
    }
    count
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| *byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[test]
fn no_name_and_no_content_lies_on_storage() {
    let mut world = World::new();
    let mut needles = vec![
        b"target-of-a-symlink".to_vec(),
        b"user.attribute-name".to_vec(),
        b"attribute-value".to_vec(),
    ];
    for (name, content) in secrets() {
        fs::write(world.at(&name), &content).unwrap();
        needles.push(name.into_bytes());
        // Sixteen bytes are enough to recognize it by.
        needles.push(content[..16].to_vec());
        needles.push(content[content.len() / 2 + 3..][..16].to_vec());
    }
    std::os::unix::fs::symlink("target-of-a-symlink", world.at("symlink")).unwrap();
    let file = world.at(&secrets()[0].0);
    rustix::fs::setxattr(
        &file,
        "user.attribute-name",
        b"attribute-value",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let control = world.path("control");
    fs::create_dir(&control).unwrap();
    for (index, needle) in needles.iter().enumerate() {
        fs::write(
            control.join(index.to_string()),
            [&noise(1, 1000), needle.as_slice(), b"behind"].concat(),
        )
        .unwrap();
    }
    assert!(
        found(&[control], &needles) >= needles.len(),
        "the search finds what is there"
    );

    fs::rename(&file, world.at("renamed")).unwrap();
    fs::rename(world.at("renamed"), &file).unwrap();
    let dirs = [world.volume(), world.keystore()];
    fs::File::open(&file).unwrap().sync_all().unwrap();
    assert_eq!(found(&dirs, &needles), 0, "while mounted");
    world.unmount();
    assert_eq!(found(&dirs, &needles), 0, "at rest");
    let log = world.log().into_bytes();
    assert!(
        !log.is_empty() && !needles.iter().any(|needle| contains(&log, needle)),
        "in the log"
    );
}

#[test]
fn ten_thousand_new_files_cost_at_most_a_hundred_calls_of_the_kms() {
    let mut world = World::new();
    let before = world.key_calls();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let dir = world.at(&format!("thread {thread}"));
            scope.spawn(move || {
                fs::create_dir(&dir).unwrap();
                for number in 0..2500 {
                    let mut file = fs::File::create_new(dir.join(format!("file {number}"))).unwrap();
                    file.write_all(b"content").unwrap();
                }
            });
        }
    });
    let calls = world.key_calls() - before;
    assert!(calls <= 100, "{calls} calls");
    world.unmount();
}
