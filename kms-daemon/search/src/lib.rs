//! Searches memory and files for secrets, without keeping them: what is looked for is known by digests alone.

mod windows;

pub use windows::{Form, WINDOW, Window, key_forms};

use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use windows::{FACTOR, push};

/// Read at a time.
const PIECE: usize = 1 << 20;
/// Places of one secret that are told; more would say no more.
const PLACES_MAX: usize = 16;

/// What is looked for.
#[derive(Default)]
pub struct Needles {
    names: Vec<String>,
    /// A rolling hash of the window, to the numbers of the needles that have it, with the SHA-256 that decides.
    windows: HashMap<u64, Vec<(usize, [u8; 32])>>,
}

/// What was found of each needle, and what could not be read.
#[derive(Debug, Default)]
pub struct Findings {
    /// Addresses or offsets, with what each lies in.
    pub places: BTreeMap<String, Vec<String>>,
    /// Bytes that were searched.
    pub searched: u64,
    /// Readable mappings, or files, that nothing was shown of.
    pub unread: Vec<String>,
}

impl Needles {
    /// Adds the first bytes of `secret`, if there are enough of them.
    pub fn add(&mut self, name: &str, secret: &[u8]) {
        if let Some(window) = Window::of(secret) {
            self.add_window(name, window);
        }
    }

    /// Adds what is known by its digests alone.
    pub fn add_window(&mut self, name: &str, window: Window) {
        let number = self.names.len();
        self.names.push(name.to_owned());
        self.windows
            .entry(window.rolling)
            .or_default()
            .push((number, window.sha256));
    }

    /// Adds a 256-bit key in every form in which it could lie about.
    pub fn add_key(&mut self, name: &str, key: &[u8; 32]) {
        for form in key_forms(name, key) {
            self.add_window(&form.name, form.window);
        }
    }

    /// How many windows are looked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether nothing is looked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Searches everything that process `pid` can read. Its threads go on meanwhile.
    ///
    /// # Errors
    /// Its memory cannot be opened.
    pub fn search(&self, pid: u32) -> std::io::Result<Findings> {
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let scanner = Scanner::new(self);
        let mut buffer = vec![0; PIECE + WINDOW - 1];
        let mut findings = Findings::default();
        for line in maps.lines() {
            let Some((from, to, is_readable)) = mapping(line) else {
                findings.unread.push(line.to_owned());
                continue;
            };
            // The kernel's own pages, which no write of the process reaches.
            if !is_readable || line.contains("[v") {
                continue;
            }
            scanner.mapping(&memory, (from, to), line, &mut buffer, &mut findings);
        }
        // What was found is not to be found here by the next search.
        buffer.fill(0);
        std::hint::black_box(&mut buffer);
        Ok(findings)
    }

    /// Searches every file below a directory, and the names of all that lies there.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn search_tree(&self, dir: &Path) -> std::io::Result<Findings> {
        let scanner = Scanner::new(self);
        let mut findings = Findings::default();
        scanner.tree(dir, &mut findings)?;
        Ok(findings)
    }

    /// Calls `found` with the number of each needle and where it lies.
    pub fn scan(&self, bytes: &[u8], found: impl FnMut(usize, usize)) {
        Scanner::new(self).scan(bytes, found);
    }
}

/// From, to, and whether it is readable.
fn mapping(line: &str) -> Option<(u64, u64, bool)> {
    let mut fields = line.split_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(from)?, number(to)?, fields.next()?.starts_with('r')))
}

/// Needles, with a small table that tells of most windows that they are none of these.
struct Scanner<'n> {
    needles: &'n Needles,
    filter: Vec<bool>,
    /// What the byte that leaves the window was multiplied with.
    leaving: u64,
}

const fn slot(hash: u64) -> usize {
    (hash >> 44) as usize
}

impl<'n> Scanner<'n> {
    fn new(needles: &'n Needles) -> Self {
        let mut filter = vec![false; 1 << 20];
        for hash in needles.windows.keys() {
            if let Some(place) = filter.get_mut(slot(*hash)) {
                *place = true;
            }
        }
        Self {
            needles,
            filter,
            leaving: (0..WINDOW).fold(1_u64, |power, _| power.wrapping_mul(FACTOR)),
        }
    }

    fn mapping(
        &self,
        memory: &File,
        (from, to): (u64, u64),
        line: &str,
        buffer: &mut [u8],
        findings: &mut Findings,
    ) {
        let own = buffer.as_ptr() as u64;
        let mut at = from;
        while at < to {
            let want = usize::try_from(to - at).unwrap_or(usize::MAX).min(buffer.len());
            let read = buffer.get_mut(..want).map(|buffer| memory.read_at(buffer, at));
            let Some(Ok(read @ 1..)) = read else {
                findings.unread.push(format!("{at:x} of {line}"));
                return;
            };
            // A process that searches itself would find what it has just read.
            let (start, end) = (own.max(at), (own + buffer.len() as u64).min(at + read as u64));
            if start < end
                && let Some(own) = buffer.get_mut((start - at) as usize..(end - at) as usize)
            {
                own.fill(0);
            }
            self.note(buffer.get(..read).unwrap_or_default(), at, line, findings);
            findings.searched += read as u64;
            // The next piece begins with what a window across the border needs.
            at += if read == buffer.len() { PIECE } else { read } as u64;
        }
    }

    fn note(&self, bytes: &[u8], at: u64, of: &str, findings: &mut Findings) {
        self.scan(bytes, |needle, offset| {
            let name = self.needles.names.get(needle).cloned().unwrap_or_default();
            let places = findings.places.entry(name).or_default();
            if places.len() < PLACES_MAX {
                places.push(format!("{:x} in {of}", at + offset as u64));
            }
        });
    }

    fn tree(&self, dir: &Path, findings: &mut Findings) -> std::io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let path = entry.path();
            self.note(
                entry.file_name().as_encoded_bytes(),
                0,
                "a name on the host",
                findings,
            );
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&path, findings)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path)?;
                self.note(
                    target.as_os_str().as_encoded_bytes(),
                    0,
                    "a link on the host",
                    findings,
                );
            } else if kind.is_file() && self.file(&path, findings).is_err() {
                findings.unread.push(path.display().to_string());
            }
        }
        Ok(())
    }

    fn file(&self, path: &Path, findings: &mut Findings) -> std::io::Result<()> {
        let mut file = File::open(path)?;
        let name = path.display().to_string();
        let mut buffer = Vec::with_capacity(PIECE + WINDOW);
        let mut at = 0;
        loop {
            let kept = buffer.len();
            let read = (&mut file).take(PIECE as u64).read_to_end(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            self.note(&buffer, at, &name, findings);
            findings.searched += read as u64;
            let keep = buffer.len().min(WINDOW - 1);
            at += (kept + read - keep) as u64;
            buffer.drain(..buffer.len() - keep);
        }
    }

    fn scan(&self, bytes: &[u8], mut found: impl FnMut(usize, usize)) {
        let mut hash = 0;
        // What leaves the window, once it is full.
        let behind = std::iter::repeat_n(None, WINDOW).chain(bytes.iter().map(Some));
        for ((at, byte), left) in bytes.iter().enumerate().zip(behind) {
            hash = push(hash, *byte);
            if let Some(left) = left {
                hash = hash.wrapping_sub(self.leaving.wrapping_mul(u64::from(*left) + 1));
            }
            if at + 1 < WINDOW || !self.filter.get(slot(hash)).is_some_and(|there| *there) {
                continue;
            }
            let Some(needles) = self.needles.windows.get(&hash) else {
                continue;
            };
            let start = at + 1 - WINDOW;
            let digest: [u8; 32] = Sha256::digest(bytes.get(start..=at).unwrap_or_default()).into();
            for (needle, _) in needles.iter().filter(|(_, of)| *of == digest) {
                found(*needle, start);
            }
        }
    }
}

impl Findings {
    /// Whether any form of the secret of this name was found.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.places.keys().any(|found| found.starts_with(name))
    }

    /// What was found, without where, each once.
    #[must_use]
    pub fn names(&self) -> String {
        let mut names: Vec<&str> = self
            .places
            .keys()
            .map(|name| name.split(':').next().unwrap_or(name))
            .collect();
        names.dedup();
        names.join(", ")
    }
}

/// What the kernel would do with the memory of a process: the reasons to think that it reaches a disk.
///
/// # Errors
/// The kernel does not tell.
pub fn exposure(pid: u32) -> std::io::Result<Vec<String>> {
    let mut reasons = Vec::new();
    let mut judge = |file: &str, line: &str, field: usize| -> std::io::Result<()> {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
        let found = text.lines().find(|found| found.starts_with(line));
        let found = found.ok_or_else(|| std::io::Error::other(format!("{file} has no '{line}'")))?;
        if found.split_whitespace().nth(field) != Some("0") {
            reasons.push(found.to_owned());
        }
        Ok(())
    };
    judge("limits", "Max core file size", 4)?;
    judge("status", "VmSwap:", 1)?;
    Ok(reasons)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> Vec<u8> {
        (0..WINDOW as u8)
            .map(|byte| byte.wrapping_mul(37) ^ 0x5a)
            .collect()
    }

    #[test]
    fn the_search_finds_windows_at_every_offset_and_nothing_else() {
        let secret = secret();
        let mut needles = Needles::default();
        needles.add("secret", &secret);
        for offset in 0..70 {
            let mut bytes = vec![0x5a; 100];
            bytes[offset..offset + WINDOW].copy_from_slice(&secret);
            let mut found = Vec::new();
            needles.scan(&bytes, |_, at| found.push(at));
            assert_eq!(found, [offset]);
            bytes[offset + 3] ^= 1;
            needles.scan(&bytes, |_, at| panic!("found at {at}"));
        }
    }

    #[test]
    fn files_are_searched_across_the_borders_of_what_is_read_at_a_time_and_so_are_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut needles = Needles::default();
        needles.add("secret", &secret());
        needles.add("name", b"a-name-of-sixteen-bytes-and-more");
        for at in [
            0,
            PIECE - WINDOW,
            PIECE - 7,
            PIECE - 1,
            PIECE,
            2 * PIECE - 8,
            2 * PIECE + 3,
        ] {
            let mut bytes = vec![1; 2 * PIECE + 100];
            bytes[at..at + WINDOW].copy_from_slice(&secret());
            fs::create_dir_all(dir.path().join("below")).unwrap();
            fs::write(dir.path().join("below/file"), bytes).unwrap();
            let findings = needles.search_tree(dir.path()).unwrap();
            assert!(findings.has("secret") && !findings.has("name"), "at {at}");
            assert!(
                findings.places["secret"]
                    .iter()
                    .any(|place| place.starts_with(&format!("{at:x} in "))),
                "{at:x} {findings:?}"
            );
        }
        fs::write(dir.path().join("a-name-of-sixteen-bytes-and-more"), b"").unwrap();
        assert!(needles.search_tree(dir.path()).unwrap().has("name"));
    }
}
