//! A FUSE connection from outside its server: a second descriptor of its device, the notifications that drop what the
//! kernel caches, and its end by force.
//!
//! The kernel takes notifications through any descriptor of a connection, whoever holds it, and after the connection was
//! aborted, too (fuse_dev_do_write in fs/fuse/dev.c). Every call here may block in the kernel for as long as a page is under
//! I/O that the server does not answer: never call one on a thread that serves the connection.

mod abort;

pub use abort::AbortHandle;

use rustix::fs::{Mode, OFlags};
use std::io::{Error, IoSlice, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const DEVICE: &str = "/dev/fuse";
/// FUSE_DEV_IOC_CLONE: `_IOR(229, 0, uint32_t)`.
const CLONE: libc::Ioctl = 0x8004_e500u32 as libc::Ioctl;
/// enum fuse_notify_code in include/uapi/linux/fuse.h.
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
/// Since Linux 6.16.
const NOTIFY_INC_EPOCH: i32 = 8;
const HEADER_BYTES: usize = 16;
/// The number of every FUSE filesystem's root inode.
const ROOT_INODE: u64 = 1;

/// A descriptor of a connection's device. The connection lives until the last of them is closed, its server's included.
#[derive(Debug)]
pub struct FuseDevice(OwnedFd);

/// What a notification found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The inode, in the kernel's memory.
    Inode,
    /// No such inode there: nothing of it is cached.
    Nothing,
}

impl From<OwnedFd> for FuseDevice {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl AsFd for FuseDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl FuseDevice {
    /// Another descriptor of the connection that `server` serves. Requests are not read from it.
    ///
    /// # Errors
    /// No /dev/fuse, or `server` is none.
    pub fn clone_of(server: BorrowedFd<'_>) -> Result<Self> {
        let clone = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let source = u32::try_from(server.as_raw_fd()).map_err(Error::other)?;
        // SAFETY: the ioctl reads one u32, which lives as long as the call.
        let done = unsafe { libc::ioctl(clone.as_raw_fd(), CLONE, &raw const source) };
        if done == 0 {
            Ok(Self(clone))
        } else {
            Err(Error::last_os_error())
        }
    }

    /// Expires an inode's attributes, and leaves its pages alone. Waits for no request.
    ///
    /// # Errors
    /// Those of write(2) to /dev/fuse.
    pub fn expire_attributes(&self, inode: u64) -> Result<Found> {
        // A negative offset means that (fuse_reverse_inval_inode).
        self.invalidate(inode, -1)
    }

    /// Drops an inode's pages, and its attributes. Dirty pages are written back first, through requests that the server
    /// must answer: this waits for that. Success proves nothing about a page that is under I/O, or dirtied meanwhile.
    ///
    /// # Errors
    /// Those of write(2) to /dev/fuse.
    pub fn drop_pages(&self, inode: u64) -> Result<Found> {
        self.invalidate(inode, 0)
    }

    /// Has the kernel look up every name again. False where it does not know how, before Linux 6.16.
    ///
    /// # Errors
    /// Those of write(2) to /dev/fuse.
    pub fn drop_names(&self) -> Result<bool> {
        match self.notify(NOTIFY_INC_EPOCH, &[]) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Has the kernel look up one name again. It takes the directory's lock, which a request may hold that waits for the server.
    ///
    /// # Errors
    /// Those of write(2) to /dev/fuse.
    pub fn forget_name(&self, parent: u64, name: &[u8]) -> Result<Found> {
        // struct fuse_notify_inval_entry_out; the name ends with a NUL that its length does not count.
        let mut body = Vec::with_capacity(17 + name.len());
        body.extend_from_slice(&parent.to_ne_bytes());
        let length = u32::try_from(name.len()).map_err(Error::other)?;
        body.extend_from_slice(&length.to_ne_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(name);
        body.push(0);
        found(self.notify(NOTIFY_INVAL_ENTRY, &body))
    }

    /// Whether the filesystem has ended: unmounted everywhere, and nobody has a file of it open or mapped. An aborted
    /// connection's has not.
    ///
    /// # Errors
    /// Those of write(2) to /dev/fuse.
    pub fn is_gone(&self) -> Result<bool> {
        // The root inode is in memory for as long as the superblock is.
        Ok(self.expire_attributes(ROOT_INODE)? == Found::Nothing)
    }

    /// struct fuse_notify_inval_inode_out; a length of 0 reaches to the end.
    fn invalidate(&self, inode: u64, offset: i64) -> Result<Found> {
        let mut body = [0; 24];
        body[..8].copy_from_slice(&inode.to_ne_bytes());
        body[8..16].copy_from_slice(&offset.to_ne_bytes());
        found(self.notify(NOTIFY_INVAL_INODE, &body))
    }

    /// struct fuse_out_header: a unique of 0 makes the error a notification's code.
    fn notify(&self, code: i32, body: &[u8]) -> Result<()> {
        let mut header = [0; HEADER_BYTES];
        let length = u32::try_from(HEADER_BYTES + body.len()).map_err(Error::other)?;
        header[..4].copy_from_slice(&length.to_ne_bytes());
        header[4..8].copy_from_slice(&code.to_ne_bytes());
        rustix::io::writev(&self.0, &[IoSlice::new(&header), IoSlice::new(body)])?;
        Ok(())
    }
}

/// Whether a notification met anything.
fn found(notified: Result<()>) -> Result<Found> {
    match notified {
        Ok(()) => Ok(Found::Inode),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Found::Nothing),
        Err(error) => Err(error),
    }
}
