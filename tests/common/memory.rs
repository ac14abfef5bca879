//! Searches the memory of a process for secrets, without keeping them: what is looked for is known by hashes alone.

use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Bytes of a secret that are looked for; so many at random are nowhere by chance.
pub const WINDOW: usize = 16;
/// Read at a time.
const PIECE: usize = 1 << 20;
/// Odd, so that multiplying by it loses nothing.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// What is looked for.
#[derive(Default)]
pub struct Needles {
    names: Vec<String>,
    /// A rolling hash of the window, to the numbers of the needles that have it, with the SHA-256 that decides.
    windows: HashMap<u64, Vec<(usize, [u8; 32])>>,
}

/// What was found of each needle, and what could not be read.
#[derive(Debug)]
pub struct Findings {
    /// Addresses, with the mapping that each lies in.
    pub places: BTreeMap<String, Vec<String>>,
    /// Bytes that were searched.
    pub searched: u64,
    /// Readable mappings that the kernel showed nothing of.
    pub unread: Vec<String>,
}

impl Needles {
    /// Adds the first bytes of `secret`.
    pub fn add(&mut self, name: &str, secret: &[u8]) {
        let window = &secret[..WINDOW];
        let number = self.names.len();
        self.names.push(name.to_owned());
        let hash = window.iter().fold(0, |hash, byte| push(hash, *byte));
        let digest = Sha256::digest(window).into();
        self.windows.entry(hash).or_default().push((number, digest));
    }

    /// Adds a 256-bit key in every form in which it could lie about: either half, a round key from the middle of its AES
    /// schedule, and the blocks that HMAC makes of it, as bytes and as the words that SHA-256 loads.
    pub fn add_key(&mut self, name: &str, key: &[u8; 32]) {
        self.add(&format!("{name}: first half"), key);
        self.add(&format!("{name}: second half"), &key[WINDOW..]);
        let schedule = aes256_schedule(key);
        self.add(&format!("{name}: AES round key 2"), &schedule[2 * 16..]);
        self.add(&format!("{name}: AES round key 9"), &schedule[9 * 16..]);
        for (form, pad) in [("HMAC inner", 0x36), ("HMAC outer", 0x5c), ("words", 0)] {
            let padded = key.map(|byte| byte ^ pad);
            let mut words = padded;
            for word in words.chunks_exact_mut(4) {
                word.reverse();
            }
            if pad != 0 {
                self.add(&format!("{name}: {form}"), &padded);
            }
            self.add(&format!("{name}: {form}, words"), &words);
        }
    }

    /// Searches everything that process `pid` can read. Its threads go on meanwhile.
    pub fn search(&self, pid: u32) -> Findings {
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mut buffer = vec![0; PIECE + WINDOW - 1];
        let mut findings = Findings {
            places: BTreeMap::new(),
            searched: 0,
            unread: Vec::new(),
        };
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (from, to) = fields.next().unwrap().split_once('-').unwrap();
            let from = u64::from_str_radix(from, 16).unwrap();
            let to = u64::from_str_radix(to, 16).unwrap();
            // The kernel's own pages, which no write of the process reaches.
            if !fields.next().unwrap().starts_with('r') || line.contains("[v") {
                continue;
            }
            self.search_mapping(&memory, (from, to), line, &mut buffer, &mut findings);
        }
        // What was found is not to be found here by the next search.
        buffer.fill(0);
        std::hint::black_box(&mut buffer);
        findings
    }

    fn search_mapping(
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
            let want = ((to - at) as usize).min(buffer.len());
            let Ok(read) = memory.read_at(&mut buffer[..want], at) else {
                findings.unread.push(format!("{at:x} of {line}"));
                return;
            };
            // A process that searches itself would find what it has just read.
            let (start, end) = (own.max(at), (own + buffer.len() as u64).min(at + read as u64));
            if start < end {
                buffer[(start - at) as usize..(end - at) as usize].fill(0);
            }
            self.scan(&buffer[..read], |needle, offset| {
                findings
                    .places
                    .entry(self.names[needle].clone())
                    .or_default()
                    .push(format!("{:x} in {line}", at + offset as u64));
            });
            findings.searched += read as u64;
            // The next piece begins with what a window across the border needs.
            let step = if read == buffer.len() { PIECE } else { read.max(1) };
            at += step as u64;
        }
    }

    /// Calls `found` with the number of each needle and where it lies.
    pub fn scan(&self, bytes: &[u8], mut found: impl FnMut(usize, usize)) {
        // What the byte that leaves the window was multiplied with.
        let leaving = (0..WINDOW).fold(1_u64, |power, _| power.wrapping_mul(FACTOR));
        // Most windows are none of the needles', which one look at a small table tells.
        let mut filter = vec![false; 1 << 16];
        for hash in self.windows.keys() {
            filter[(hash >> 48) as usize] = true;
        }
        let mut hash = 0;
        for (at, byte) in bytes.iter().enumerate() {
            hash = push(hash, *byte);
            if at >= WINDOW {
                hash = hash.wrapping_sub(leaving.wrapping_mul(u64::from(bytes[at - WINDOW]) + 1));
            }
            if at + 1 < WINDOW || !filter[(hash >> 48) as usize] {
                continue;
            }
            let Some(needles) = self.windows.get(&hash) else {
                continue;
            };
            let start = at + 1 - WINDOW;
            let digest: [u8; 32] = Sha256::digest(&bytes[start..=at]).into();
            for (needle, _) in needles.iter().filter(|(_, of)| *of == digest) {
                found(*needle, start);
            }
        }
    }
}

fn push(hash: u64, byte: u8) -> u64 {
    hash.wrapping_mul(FACTOR).wrapping_add(u64::from(byte) + 1)
}

impl Findings {
    /// Whether any form of the secret of this name was found.
    pub fn has(&self, name: &str) -> bool {
        self.places.keys().any(|found| found.starts_with(name))
    }
}

/// What the kernel would do with the memory of a process: the reasons to think that it reaches a disk.
pub fn exposure(pid: u32) -> Vec<String> {
    let mut reasons = Vec::new();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    if core.split_whitespace().nth(4) != Some("0") {
        reasons.push(core.to_owned());
    }
    // The files of a process that may not be dumped belong to root, whoever runs it; root's own are told by yama and
    // ptrace(2) alone, and by this: the kernel hides its address space's flags from nobody.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let swap = status.lines().find(|line| line.starts_with("VmSwap:")).unwrap();
    if swap.split_whitespace().nth(1) != Some("0") {
        reasons.push(swap.to_owned());
    }
    reasons
}

/// The key schedule of AES-256 (FIPS 197, section 5.2), as bytes.
fn aes256_schedule(key: &[u8; 32]) -> [u8; 240] {
    let mut bytes = [0; 240];
    bytes[..32].copy_from_slice(key);
    let mut constant = 1;
    for word in 8..60 {
        let mut last: [u8; 4] = bytes[4 * word - 4..4 * word].try_into().unwrap();
        if word % 8 == 0 {
            last.rotate_left(1);
            last = last.map(sub_byte);
            last[0] ^= constant;
            constant <<= 1;
        } else if word % 8 == 4 {
            last = last.map(sub_byte);
        }
        for (index, byte) in last.into_iter().enumerate() {
            bytes[4 * word + index] = byte ^ bytes[4 * (word - 8) + index];
        }
    }
    bytes
}

/// The substitution of FIPS 197, section 5.1.1: the inverse in GF(2^8), 254th power, then an affine map.
fn sub_byte(byte: u8) -> u8 {
    let inverse = (0..254).fold(1, |power, _| multiply(power, byte));
    (0..5).fold(0x63, |sum, turn| sum ^ inverse.rotate_left(turn))
}

fn multiply(a: u8, b: u8) -> u8 {
    (0..8).fold(0, |sum, bit| {
        let doubled = (0..bit).fold(a, |a, _| (a << 1) ^ if a & 0x80 == 0 { 0 } else { 0x1b });
        if b >> bit & 1 == 1 { sum ^ doubled } else { sum }
    })
}

#[test]
fn the_search_finds_windows_at_every_offset_and_nothing_else() {
    let secret: Vec<u8> = (0..WINDOW as u8)
        .map(|byte| byte.wrapping_mul(37) ^ 0x5a)
        .collect();
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

/// FIPS 197, appendix A.3.
#[test]
fn the_schedule_is_that_of_the_standard() {
    let key: [u8; 32] = [
        0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77, 0x81, 0x1f,
        0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14, 0xdf, 0xf4,
    ];
    let schedule = aes256_schedule(&key);
    assert_eq!(schedule[32..36], [0x9b, 0xa3, 0x54, 0x11]);
    assert_eq!(schedule[236..], [0x70, 0x6c, 0x63, 0x1e]);
}
