//! A process that cannot be mistaken for one that comes to have its number later.

use super::Life;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A process, by a descriptor of it (pidfd_open(2)).
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
    /// When it began, in clock ticks since the boot: with the number it names the process for the whole boot.
    pub(crate) started_ticks: u64,
}

impl Process {
    /// The process `pid`, whichever has that number now.
    ///
    /// # Errors
    /// ESRCH if there is none; anything else says nothing about whether there is.
    pub(crate) fn find(pid: i32) -> Result<Self> {
        let number = Pid::from_raw(pid).ok_or_else(|| Error::from_raw_os_error(libc::ESRCH))?;
        Self::of(pidfd_open(number, PidfdFlags::empty())?, pid)
    }

    /// The process at the other end of a Unix socket, as of when it connected.
    ///
    /// # Errors
    /// ESRCH if it has ended.
    pub(crate) fn at_peer(socket: BorrowedFd<'_>, pid: i32) -> Result<Self> {
        let mut pidfd: libc::c_int = -1;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: both pointers are to locals of the lengths told, which live as long as the call.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERPIDFD,
                (&raw mut pidfd).cast(),
                &raw mut length,
            )
        };
        if done == 0 && pidfd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
            return Self::of(unsafe { OwnedFd::from_raw_fd(pidfd) }, pid);
        }
        match Error::last_os_error() {
            // Linux before 6.5: by its number, which another process could have come to have since it connected.
            error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Self::find(pid),
            error => Err(error),
        }
    }

    /// Whether this is still the process that began then.
    pub(crate) fn began_at(&self, started_ticks: u64) -> bool {
        self.started_ticks == started_ticks
    }

    fn of(pidfd: OwnedFd, pid: i32) -> Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        let mut process = Self {
            pidfd,
            started_ticks: 0,
        };
        // What was read is this process's only if it was there until now.
        if process.has_exited() {
            return Err(Error::from_raw_os_error(libc::ESRCH));
        }
        process.started_ticks =
            started_ticks(&stat?).ok_or_else(|| Error::other("/proc/PID/stat is malformed"))?;
        Ok(process)
    }

    /// Waits until it has exited; false if it has not in time.
    fn exits_within(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).unwrap_or(Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        });
        let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
        // A pidfd becomes readable when its process exits.
        matches!(poll(&mut watched, Some(&limit)), Ok(1..))
    }
}

impl Life for Process {
    fn has_exited(&self) -> bool {
        self.exits_within(Duration::ZERO)
    }

    fn kill(&self) -> Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Field 22 of /proc/PID/stat. The second may hold spaces and parentheses; none behind it does.
fn started_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let rest = (3..=21).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(started_ticks(&format!("7 (a) b (c)) {rest} 4711 23")), Some(4711));
        assert_eq!(started_ticks("7 (short) S 1"), None);
    }

    #[test]
    fn a_process_is_killed_and_seen_to_exit() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::find(pid).unwrap();
        assert!(!process.has_exited());
        let again = Process::find(pid).unwrap();
        assert!(again.began_at(process.started_ticks) && !again.began_at(process.started_ticks + 1));
        process.kill().unwrap();
        assert!(process.exits_within(Duration::from_secs(10)));
        child.wait().unwrap();
        process.kill().unwrap();
        assert_eq!(Process::find(pid).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
