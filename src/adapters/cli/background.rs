//! Going to the background: the parent waits until the child says how it went.

use super::Failure;
use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::OwnedFd;

/// What the child sends when all is well.
const READY: &[u8] = b"ready\n";

/// Which side of the fork this is.
pub(super) enum Side {
    /// The parent, when the child has said how it went.
    Parent(Result<(), Failure>),
    /// The child, which has to say so.
    Child(Report),
}

/// Tells the parent how it went. Dropped without a word, it says that the child ended.
pub(super) struct Report(Option<File>);

impl Report {
    /// For a process that stays in the foreground: nobody waits.
    pub(super) fn to_nobody() -> Self {
        Self(None)
    }

    pub(super) fn ready(&mut self) {
        self.send(READY);
        if self.0.take().is_some() {
            detach_standard_streams();
        }
    }

    pub(super) fn failed(&mut self, message: &str) {
        self.send(message.as_bytes());
        self.0 = None;
    }

    /// Whether somebody waits.
    pub(super) fn is_awaited(&self) -> bool {
        self.0.is_some()
    }

    fn send(&mut self, message: &[u8]) {
        if let Some(parent) = &mut self.0
            && let Err(error) = parent.write_all(message)
        {
            tracing::warn!(%error, "nobody waits any more to hear how the mount went");
        }
    }
}

/// Forks. To be called while the process has one thread.
pub(super) fn split() -> Result<Side, Failure> {
    let (mut reader, writer) = pipe().map_err(|error| format!("no pipe: {error}"))?;
    // SAFETY: the process has a single thread, so that the child inherits no lock that another thread holds.
    match unsafe { libc::fork() } {
        -1 => Err(format!(
            "cannot go to the background: {}",
            std::io::Error::last_os_error()
        )),
        0 => {
            drop(reader);
            let session = rustix::process::setsid()
                .map(|_| ())
                .and_then(|()| rustix::process::chdir("/"));
            session.map_err(|errno| format!("cannot go to the background: {errno}"))?;
            Ok(Side::Child(Report(Some(File::from(OwnedFd::from(writer))))))
        }
        _ => {
            drop(writer);
            let mut said = Vec::new();
            let heard = reader.read_to_end(&mut said);
            Ok(Side::Parent(match heard {
                Ok(_) if said == READY => Ok(()),
                Ok(0) => Err("the mounting process ended without a word; see the log".to_owned()),
                Ok(_) => Err(String::from_utf8_lossy(&said).into_owned()),
                Err(error) => Err(format!("the mounting process cannot be heard: {error}")),
            }))
        }
    }
}

/// Lets go of the terminal: whoever waits for its end of file is not to wait for the mount.
fn detach_standard_streams() {
    let null = File::options().read(true).write(true).open("/dev/null");
    let done = null.map_err(|_| rustix::io::Errno::IO).and_then(|null| {
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)
    });
    if let Err(error) = done {
        tracing::warn!(%error, "the terminal could not be let go of");
    }
}
