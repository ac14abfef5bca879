//! The small-file workloads of bench.sh: std only, built by plain rustc, so that a shell's own cost is not measured.
//!
//! `smallfiles create|create-fsync DIR FILES JOBS` writes files of 4 KiB into DIR/JOB/;
//! `smallfiles walk|read|unlink DIR FILES JOBS` goes over them; `smallfiles tree DIR` makes 1,700 files, 38 MB, that
//! look like a source tree. Each prints how many files it did per second, a decimal number.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, io, process, thread};

const FILE_BYTES: usize = 4096;
/// Files in one directory.
const FANOUT: usize = 250;

/// A generator whose output does not compress and is the same on every machine (xorshift64*).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

fn file_path(dir: &Path, job: usize, index: usize) -> PathBuf {
    dir.join(format!("job{job}/d{:03}/f{index:05}", index / FANOUT))
}

fn create(dir: &Path, job: usize, files: usize, sync: bool) -> io::Result<()> {
    let mut noise = Noise(job as u64 + 1);
    let mut block = vec![0; FILE_BYTES];
    for index in 0..files {
        let path = file_path(dir, job, index);
        if index % FANOUT == 0 {
            fs::create_dir_all(path.parent().unwrap())?;
        }
        noise.fill(&mut block);
        let mut file = File::create_new(path)?;
        file.write_all(&block)?;
        if sync {
            file.sync_all()?;
        }
    }
    Ok(())
}

/// Lists and stats everything below; gives the number of files.
fn walk(dir: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        files += if meta.is_dir() { walk(&entry.path())? } else { 1 };
    }
    Ok(files)
}

fn read(dir: &Path, job: usize, files: usize) -> io::Result<()> {
    let mut noise = Noise(job as u64 + 1);
    let mut expected = vec![0; FILE_BYTES];
    let mut found = Vec::with_capacity(FILE_BYTES + 1);
    for index in 0..files {
        found.clear();
        File::open(file_path(dir, job, index))?.read_to_end(&mut found)?;
        noise.fill(&mut expected);
        if found != expected {
            return Err(io::Error::other("a file does not hold what was written"));
        }
    }
    Ok(())
}

fn unlink(dir: &Path, job: usize, files: usize) -> io::Result<()> {
    (0..files).try_for_each(|index| fs::remove_file(file_path(dir, job, index)))
}

/// Sizes from 100 bytes to 300 KB, most of them small, as in a source tree.
fn tree(dir: &Path) -> io::Result<usize> {
    let mut noise = Noise(7);
    let files = 1700;
    let mut content = vec![0; 320 << 10];
    for index in 0..files {
        let depth = noise.next() % 3;
        let mut path = dir.join(format!("package{:02}", index % 40));
        for level in 0..depth {
            path.push(format!("module{}{}", level, noise.next() % 4));
        }
        fs::create_dir_all(&path)?;
        let magnitude = 7 + noise.next() % 11;
        let size = (1 << magnitude) + noise.next() % (1 << magnitude);
        let content = &mut content[..size as usize];
        noise.fill(content);
        fs::write(path.join(format!("file{index:04}.rs")), content)?;
    }
    Ok(files)
}

fn run() -> io::Result<f64> {
    let usage = || io::Error::other("usage: smallfiles create|create-fsync|walk|read|unlink|tree DIR [FILES JOBS]");
    let args: Vec<String> = env::args().collect();
    let operation = args.get(1).ok_or_else(usage)?.clone();
    let dir = PathBuf::from(args.get(2).ok_or_else(usage)?);
    let number = |at: usize| args.get(at).and_then(|n| n.parse::<usize>().ok()).ok_or_else(usage);
    let begin = Instant::now();
    let done = match operation.as_str() {
        "tree" => tree(&dir)?,
        "walk" => walk(&dir)?,
        "create" | "create-fsync" | "read" | "unlink" => {
            let (files, jobs) = (number(3)?, number(4)?);
            let threads: Vec<_> = (0..jobs)
                .map(|job| {
                    let (dir, operation) = (dir.clone(), operation.clone());
                    thread::spawn(move || match operation.as_str() {
                        "create" => create(&dir, job, files / jobs, false),
                        "create-fsync" => create(&dir, job, files / jobs, true),
                        "read" => read(&dir, job, files / jobs),
                        _ => unlink(&dir, job, files / jobs),
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("a worker panicked")?;
            }
            files
        }
        _ => return Err(usage()),
    };
    Ok(done as f64 / begin.elapsed().as_secs_f64())
}

fn main() {
    match run() {
        Ok(rate) => println!("{rate:.1}"),
        Err(error) => {
            eprintln!("smallfiles: {error}");
            process::exit(1);
        }
    }
}
