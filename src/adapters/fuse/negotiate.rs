//! What is asked of the kernel when a session begins.

use super::session::CacheMode;
use fuser::{InitFlags, KernelConfig};

/// Largest WRITE, in bytes.
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Read-ahead, in bytes; the mount's bdi has a limit of its own.
const READAHEAD_BYTES_MAX: u32 = 4 << 20;
/// Requests in the background, read-ahead and writeback among them, before the kernel waits.
const BACKGROUND_REQUESTS_MAX: u16 = 128;
/// What is asked of the kernel, as far as it knows it. DONT_MASK belongs to POSIX_ACL: where a directory has a default
/// ACL, the umask does not count.
const CAPABILITIES: [InitFlags; 15] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_ATOMIC_O_TRUNC,
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_DONT_MASK,
];

/// Asks for what serves this mount; what the kernel does not know it is mounted without.
pub(super) fn negotiate(config: &mut KernelConfig, cache: CacheMode) {
    let writeback = (cache == CacheMode::Writeback).then_some(InitFlags::FUSE_WRITEBACK_CACHE);
    for capability in CAPABILITIES.into_iter().chain(writeback) {
        if let Err(missing) = config.add_capabilities(capability) {
            tracing::debug!(?missing, "the kernel lacks a capability");
        }
    }
    if let Err(most) = config.set_max_write(WRITE_BYTES_MAX) {
        tracing::debug!(most, "smaller writes than asked for");
    }
    if let Err(most) = config.set_max_readahead(READAHEAD_BYTES_MAX) {
        // The kernel offers what the bdi is set to; that is raised once the mount is there.
        if config.set_max_readahead(most).is_err() {
            tracing::debug!(most, "the kernel's read-ahead stays as it is");
        }
    }
    if let Err(most) = config.set_max_background(BACKGROUND_REQUESTS_MAX) {
        tracing::debug!(most, "fewer requests in the background than asked for");
    }
}
