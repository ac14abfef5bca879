//! What a process that holds keys does first. That keys lie in locked memory is kms_crypto's doing.

use super::Failure;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// No core dumps and no debuggers, files for the owner alone, and as many open files as are permitted.
pub(super) fn harden() -> Result<(), Failure> {
    kms_crypto::on_unprotected_memory(|error| {
        tracing::warn!(
            %error,
            "memory that holds keys could not be locked: they could reach swap; raise RLIMIT_MEMLOCK (ulimit -l) to 8 MiB \
             or more, or encrypt swap"
        );
    });
    protect().map_err(|error| format!("the process cannot be protected: {error}"))
}

fn protect() -> rustix::io::Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::process::setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    let files = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: files.maximum,
            maximum: files.maximum,
        },
    )
}
