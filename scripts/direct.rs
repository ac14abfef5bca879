//! Has a program open with O_DIRECT every file that it opens for reading and writing: fsx has no option for it. A library for
//! LD_PRELOAD, std only, built by plain rustc (`--crate-type cdylib`).
use std::ffi::{c_char, c_int};

const AT_FDCWD: c_int = -100;
const O_ACCMODE: c_int = 3;
const O_RDWR: c_int = 2;
/// Of x86-64; aarch64 has another.
const O_DIRECT: c_int = if cfg!(target_arch = "aarch64") { 0o200_000 } else { 0o40_000 };

unsafe extern "C" {
    fn openat64(dir: c_int, path: *const c_char, flags: c_int, ...) -> c_int;
}

/// open64(3), which std calls.
///
/// # Safety
/// That of open64(3). It is variadic in C; both architectures pass the mode alike, given or not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    let direct = if flags & O_ACCMODE == O_RDWR { O_DIRECT } else { 0 };
    // SAFETY: the caller's arguments, as it gave them.
    unsafe { openat64(AT_FDCWD, path, flags | direct, mode) }
}
