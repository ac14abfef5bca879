//! Handles that outlive names, as an NFS server keeps them.

use crate::twin::errno_of;
use crate::world::World;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// name_to_handle_at(2): what an NFS server gives its clients.
struct Handle(Vec<u64>);

const HANDLE_BYTES: u32 = 128;

impl Handle {
    fn of(path: &Path) -> Self {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        let mut handle = vec![0_u64; 1 + HANDLE_BYTES as usize / 8];
        handle[0] = u64::from(HANDLE_BYTES);
        let mut mount = 0_i32;
        // SAFETY: the handle has room for the bytes its first word says, behind its two words.
        let done = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                libc::AT_FDCWD,
                path.as_ptr(),
                handle.as_mut_ptr(),
                &raw mut mount,
                0,
            )
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        Self(handle)
    }

    fn open(&self, mount: &File, flags: i32) -> rustix::io::Result<File> {
        // SAFETY: the handle is one that the kernel made; what it opens is nobody else's.
        unsafe {
            match libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                self.0.as_ptr(),
                flags,
            ) {
                -1 => errno_of(Err(std::io::Error::last_os_error())),
                descriptor => Ok(File::from_raw_fd(descriptor as i32)),
            }
        }
    }
}

/// FUSE_EXPORT_SUPPORT: a handle finds its file when the kernel has forgotten it, and after a rename; never another's.
#[test]
fn handles_find_their_files_and_no_others() {
    let mut world = World::new();
    fs::create_dir_all(world.at("dir/inner")).unwrap();
    let paths = ["file", "dir/inner/file"].map(|path| world.at(path));
    let handles = paths.each_ref().map(|path| {
        fs::write(path, path.as_os_str().as_bytes()).unwrap();
        Handle::of(path)
    });
    let dir = Handle::of(&world.at("dir/inner"));
    fs::rename(&paths[0], world.at("dir/renamed")).unwrap();
    for remount in [false, true] {
        if remount {
            world.unmount();
            world.mount(&[]);
        }
        let mount = File::open(world.mnt()).unwrap();
        for (handle, path) in handles.iter().zip(&paths) {
            let mut file = handle.open(&mount, libc::O_RDWR).unwrap();
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut file, &mut content).unwrap();
            assert_eq!(content, path.as_os_str().as_bytes());
        }
        let dir = dir.open(&mount, libc::O_DIRECTORY).unwrap();
        let above = rustix::fs::openat(&dir, "..", OFlags::DIRECTORY, Mode::empty()).unwrap();
        assert!(rustix::fs::statat(&above, "inner", AtFlags::empty()).is_ok());
    }
    fs::remove_file(world.at("dir/renamed")).unwrap();
    for number in 0..100 {
        fs::write(world.at(&format!("later {number}")), b"").unwrap();
    }
    let mount = File::open(world.mnt()).unwrap();
    assert_eq!(handles[0].open(&mount, libc::O_RDONLY).err(), Some(Errno::STALE));
    assert!(handles[1].open(&mount, libc::O_RDONLY).is_ok());
    drop(mount);
    world.unmount();
}
