//! What files there are, what is in them, and who does what to them.
use crate::system::PAGE;
use std::env;
use std::fs::{self, File};
use std::io::{Error, Read, Result, Write};
use std::path::PathBuf;

pub const CONTENT_FILES: usize = 8;
pub const READERS: [Role; 9] = [
    Role::Buffered,
    Role::Direct,
    Role::Shared,
    Role::Private,
    Role::Buffered,
    Role::Direct,
    Role::Shared,
    Role::Private,
    Role::Names,
];
pub const WRITERS: [Role; 4] = [Role::WriteFsync, Role::MapMsync, Role::Append, Role::WriteDirect];

/// A bijection of 64 bits that looks random (splitmix64).
pub fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % limit
    }
}

pub struct World {
    pub mnt: PathBuf,
    pub state: PathBuf,
    pub inodes: usize,
    pub content: usize,
}

impl World {
    pub fn from_env() -> Result<Self> {
        Ok(Self {
            mnt: variable("MNT")?.into(),
            state: variable("STATE")?.into(),
            inodes: number("INODES")?,
            content: number("CONTENT_MIB")? << 20,
        })
    }

    /// Pages of each file that is read.
    pub fn pages(&self) -> usize {
        self.content / CONTENT_FILES / PAGE
    }

    pub fn content_file(&self, number: usize) -> PathBuf {
        self.mnt.join(format!("content-{number}"))
    }

    pub fn inode(&self, number: usize) -> PathBuf {
        self.mnt.join(format!("inodes/{}/{number}", number % 100))
    }

    pub fn few(&self) -> PathBuf {
        self.mnt.join("few")
    }

    pub fn written(&self, role: Role) -> PathBuf {
        self.mnt.join(format!("written-{role:?}"))
    }

    pub fn fill(&self) -> Result<()> {
        let mut chunk = vec![0; 1 << 20];
        for number in 0..CONTENT_FILES {
            let mut file = File::create(self.content_file(number))?;
            for first in (0..self.pages()).step_by(chunk.len() / PAGE) {
                for (page, bytes) in chunk.chunks_exact_mut(PAGE).enumerate() {
                    fill_page(content_seed(number, first + page), bytes);
                }
                let pages = (self.pages() - first).min(chunk.len() / PAGE);
                file.write_all(&chunk[..pages * PAGE])?;
            }
            file.sync_all()?;
        }
        for directory in 0..100 {
            fs::create_dir_all(self.mnt.join(format!("inodes/{directory}")))?;
        }
        for number in 0..self.inodes {
            fs::write(self.inode(number), number.to_string())?;
        }
        fs::create_dir(self.few())?;
        for number in 0..16 {
            std::os::unix::fs::symlink(number.to_string(), self.few().join(number.to_string()))?;
        }
        File::open(self.few())?.sync_all()
    }

    /// Has the kernel cache everything.
    pub fn warm(&self) -> Result<()> {
        let mut chunk = vec![0; 1 << 20];
        for number in 0..CONTENT_FILES {
            let mut file = File::open(self.content_file(number))?;
            while file.read(&mut chunk)? > 0 {}
        }
        for number in 0..self.inodes {
            fs::symlink_metadata(self.inode(number))?;
        }
        Ok(())
    }
}

pub fn variable(name: &str) -> Result<String> {
    env::var(name).map_err(|_| Error::other(format!("{name} is not in the environment")))
}

pub fn number(name: &str) -> Result<usize> {
    variable(name)?
        .parse()
        .map_err(|_| Error::other(format!("{name} is no number")))
}

pub fn content_seed(file: usize, page: usize) -> u64 {
    mix(((file as u64) << 40) | page as u64)
}

/// Word 0 is `seed` itself.
pub fn fill_page(seed: u64, page: &mut [u8]) {
    for (place, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&word_of(seed, place).to_ne_bytes());
    }
}

pub fn word_of(seed: u64, place: usize) -> u64 {
    seed.wrapping_mul(2 * place as u64 + 1)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Buffered,
    Direct,
    Shared,
    Private,
    Names,
    WriteFsync,
    MapMsync,
    Append,
    WriteDirect,
}

/// What an access was, as far as the count is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// Shows content or a name to a program, or takes content of it into the kernel's cache.
    Access,
    /// fsync, msync: shows nothing.
    Sync,
}
