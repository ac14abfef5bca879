//! What of libc is used.
pub const PROT_READ: i32 = 1;
pub const PROT_WRITE: i32 = 2;
pub const MAP_SHARED: i32 = 1;
pub const MAP_PRIVATE: i32 = 2;
pub const MS_SYNC: i32 = 4;
pub const CLOCK_MONOTONIC: i32 = 1;
pub const PR_SET_PDEATHSIG: i32 = 1;
pub const SIGKILL: usize = 9;
#[cfg(target_arch = "aarch64")]
pub const O_DIRECT: i32 = 0o200000;
#[cfg(not(target_arch = "aarch64"))]
pub const O_DIRECT: i32 = 0o40000;

#[repr(C)]
pub struct Timespec {
    pub seconds: i64,
    pub nanoseconds: i64,
}

unsafe extern "C" {
    pub fn mmap(at: *mut u8, length: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    pub fn msync(at: *mut u8, length: usize, flags: i32) -> i32;
    pub fn write(fd: i32, from: *const u8, length: usize) -> isize;
    pub fn read(fd: i32, to: *mut u8, length: usize) -> isize;
    pub fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
    pub fn prctl(option: i32, ...) -> i32;
}
