//! What keeps key material out of core dumps, debuggers, swap and other users' reach.

use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// Forbids core dumps and debuggers, locks memory where the host sets no limit, and gives new files to the owner alone.
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
    kms_crypto::on_unprotected_memory(|error| {
        tracing::warn!(
            %error,
            "memory that holds keys could not be locked: they could reach swap; raise RLIMIT_MEMLOCK (ulimit -l) to 8 MiB \
             or more, or encrypt swap"
        );
    });
    // Keys are locked wherever they lie. The rest, which plaintext passes through, is locked where no limit stands against
    // it: under a finite one a later mmap would fail, in the midst of a call, and what little there is belongs to keys.
    // ONFAULT: pages are locked as they are used, so that RocksDB's and the runtime's reserved ranges cost nothing.
    let unlimited = rustix::process::getrlimit(Resource::Memlock).current.is_none();
    if unlimited || rustix::process::geteuid().is_root() {
        let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
        // SAFETY: mlockall changes no memory content and takes no pointer.
        if unsafe { libc::mlockall(flags) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, "not all memory is locked: what is encrypted or decrypted could reach swap");
        }
    }
    Ok(())
}
