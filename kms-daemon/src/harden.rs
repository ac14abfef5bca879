//! What keeps key material out of core dumps, debuggers, swap and other users' reach.

use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// Forbids core dumps and debuggers, locks memory as far as the host permits, and gives new files to the owner alone.
/// Call it before any secret exists.
///
/// # Errors
/// What the kernel refused; a daemon whose memory can be dumped must not go on.
pub fn harden() -> std::io::Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none)?;
    // ONFAULT: pages are locked as they are used, so that RocksDB's and the runtime's reserved ranges cost nothing.
    // FUTURE under a finite limit would make a later mmap fail, in the midst of a call.
    let unlimited = rustix::process::getrlimit(Resource::Memlock).current.is_none();
    let mut flags = libc::MCL_CURRENT | libc::MCL_ONFAULT;
    if unlimited || rustix::process::geteuid().is_root() {
        flags |= libc::MCL_FUTURE;
    }
    // SAFETY: mlockall changes no memory content and takes no pointer.
    if unsafe { libc::mlockall(flags) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "memory is not locked: secrets could reach swap; raise RLIMIT_MEMLOCK or encrypt swap");
    }
    Ok(())
}
