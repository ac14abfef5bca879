//! The work of scale.sh: std only, built by plain rustc, so that a shell's own cost is not measured.
//!
//! `scale create|list|stat|remove DIR FILES DIRECTORIES` makes FILES small files, spread over DIRECTORIES below DIR, reads those
//! directories, stats every file by its name, or removes all. Each wants every file to be there once and to be what it was
//! made, and fails otherwise.
use std::fs::{self, File};
use std::io::{Error, Result, Write};
use std::path::{Path, PathBuf};
use std::{env, process, thread};

/// Files are made, looked at and removed by this many threads, each with its own.
const THREADS: usize = 4;

struct Tree {
    root: PathBuf,
    files: usize,
    directories: usize,
}

impl Tree {
    fn directory(&self, number: usize) -> PathBuf {
        self.root.join(format!("d{number:04}"))
    }

    fn file(&self, number: usize) -> PathBuf {
        self.directory(number % self.directories).join(name(number))
    }

    /// Has `act` done with every file.
    fn each(&self, act: fn(&Path, usize) -> Result<()>) -> Result<()> {
        let work = |first| {
            let mut numbers = (first..self.files).step_by(THREADS);
            numbers.try_for_each(|number| act(&self.file(number), number))
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|first| scope.spawn(move || work(first))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("a worker panicked"))
        })
    }

    fn directories(&self, act: impl Fn(&Path) -> Result<()>) -> Result<()> {
        (0..self.directories).try_for_each(|number| act(&self.directory(number)))
    }

    fn list(&self) -> Result<()> {
        let mut seen = vec![false; self.files];
        for directory in 0..self.directories {
            for entry in fs::read_dir(self.directory(directory))? {
                let name = entry?.file_name();
                let number = name.to_str().and_then(|name| name.strip_prefix("file-")?.parse::<usize>().ok());
                let number = number.filter(|number| number % self.directories == directory);
                let Some(place) = number.and_then(|number| seen.get_mut(number)) else {
                    return Err(Error::other(format!("{name:?} was never made")));
                };
                if std::mem::replace(place, true) {
                    return Err(Error::other(format!("{name:?} is listed twice")));
                }
            }
        }
        match seen.iter().filter(|seen| !**seen).count() {
            0 => Ok(()),
            lost => Err(Error::other(format!("{lost} of {} files are not listed", self.files))),
        }
    }
}

fn name(number: usize) -> String {
    format!("file-{number}")
}

fn create(path: &Path, number: usize) -> Result<()> {
    File::create_new(path)?.write_all(name(number).as_bytes())
}

fn stat(path: &Path, number: usize) -> Result<()> {
    let stat = fs::symlink_metadata(path)?;
    match stat.is_file() && stat.len() == name(number).len() as u64 {
        true => Ok(()),
        false => Err(Error::other(format!("{} is not what was made", path.display()))),
    }
}

fn run() -> Result<()> {
    let usage = || Error::other("usage: scale create|list|stat|remove DIR FILES DIRECTORIES");
    let args: Vec<String> = env::args().collect();
    let [_, operation, root, files, directories] = args.as_slice() else {
        return Err(usage());
    };
    let number = |text: &str| text.parse::<usize>().ok().filter(|number| *number > 0).ok_or_else(usage);
    let tree = Tree {
        root: PathBuf::from(root),
        files: number(files)?,
        directories: number(directories)?,
    };
    match operation.as_str() {
        "create" => {
            tree.directories(|path| fs::create_dir_all(path))?;
            tree.each(create)
        }
        "list" => tree.list(),
        "stat" => tree.each(stat),
        "remove" => {
            tree.each(|path, _| fs::remove_file(path))?;
            // Only an empty directory goes.
            tree.directories(|path| fs::remove_dir(path))
        }
        _ => Err(usage()),
    }
}

fn main() {
    if let Err(error) = run() {
        eprintln!("scale: {error}");
        process::exit(1);
    }
}
