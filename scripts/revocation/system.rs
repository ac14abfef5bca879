//! Time, memory and pages, by system calls.
use crate::c;
use std::fs::{File, OpenOptions};
use std::io::{Error, PipeReader, PipeWriter, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::{ptr, slice};

pub const PAGE: usize = 4096;

/// Nanoseconds of CLOCK_MONOTONIC, the same for all processes.
pub fn now() -> u64 {
    let mut time = c::Timespec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: the pointer is to a local of the right type.
    unsafe { c::clock_gettime(c::CLOCK_MONOTONIC, &mut time) };
    time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64
}

/// A mapping of a file, for as long as the process lives.
pub fn map(file: &File, length: usize, protection: i32, flags: i32) -> Result<*mut u8> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe { c::mmap(ptr::null_mut(), length, protection, flags, file.as_raw_fd(), 0) };
    if at as isize == -1 {
        Err(Error::last_os_error())
    } else {
        Ok(at)
    }
}

/// Words of a file outside the mount that several processes share.
pub fn shared_words(path: &Path, count: usize) -> Result<&'static [AtomicU64]> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.set_len(count as u64 * 8)?;
    let at = map(&file, count * 8, c::PROT_READ | c::PROT_WRITE, c::MAP_SHARED)?;
    // SAFETY: mapped, aligned to a page, never unmapped, and only ever used as atomics.
    Ok(unsafe { slice::from_raw_parts(at.cast(), count) })
}

/// Moves bytes between mapped pages and memory by system calls.
pub struct Mover {
    pub out: PipeReader,
    pub into: PipeWriter,
}

impl Mover {
    pub fn new() -> Result<Self> {
        let (out, into) = std::io::pipe()?;
        Ok(Self { out, into })
    }

    /// # Safety
    /// `from` is the address of a mapping, whatever lies behind it.
    pub unsafe fn load(&mut self, from: *const u8) -> Result<u64> {
        let mut bytes = [0; 8];
        // SAFETY: the kernel looks whether it can read there.
        match unsafe { c::write(self.into.as_raw_fd(), from, bytes.len()) } {
            -1 => Err(Error::last_os_error()),
            count => {
                self.out.read_exact(&mut bytes[..count as usize])?;
                Ok(u64::from_ne_bytes(bytes))
            }
        }
    }

    /// # Safety
    /// `to` is the address of a page of a mapping that nothing refers to.
    pub unsafe fn store(&mut self, to: *mut u8, page: &[u8]) -> Result<()> {
        self.into.write_all(page)?;
        // SAFETY: the kernel looks whether it can write there.
        let count = unsafe { c::read(self.out.as_raw_fd(), to, page.len()) };
        let error = Error::last_os_error();
        let stored = usize::try_from(count).unwrap_or(0);
        self.out.read_exact(&mut vec![0; page.len() - stored])?;
        if stored == page.len() { Ok(()) } else { Err(error) }
    }
}

#[repr(align(4096))]
pub struct Aligned(pub [u8; PAGE]);
