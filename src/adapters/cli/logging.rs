//! Where log lines go: the standard error output in the foreground, else a file or syslog(3).

use super::Failure;
use std::ffi::CString;
use std::io::Write;
use std::path::Path;
use tracing_appender::non_blocking;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Sets the level, as in `debug` or `cmkfs=debug,warn`.
const LEVEL_VARIABLE: &str = "CMKFS_LOG";
const LEVEL_DEFAULT: &str = "info";
/// What is never logged, whatever the level: it logs requests with the names in them.
const SILENT: &str = "fuser";
/// What syslog shows before each line.
const IDENTITY: &std::ffi::CStr = c"cmkfs";

/// Writes what is still to be written when it is dropped.
pub(super) type Flush = WorkerGuard;

/// Starts logging for a mount. Lines are written by a thread of their own, and lost when it falls far behind: a terminal or a
/// pipe whose reader stands still must not hold up the thread that watches the key. To be called behind fork(2).
pub(super) fn start(foreground: bool, file: Option<&Path>) -> Result<Flush, Failure> {
    let level = std::env::var(LEVEL_VARIABLE).unwrap_or_else(|_| LEVEL_DEFAULT.to_owned());
    let filter = EnvFilter::try_new(&level).map_err(|error| {
        format!("${LEVEL_VARIABLE} is '{level}': {error}; it takes error, warn, info or debug")
    })?;
    let (writer, flush) = match file {
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            non_blocking(file.map_err(|error| format!("log file {}: {error}", path.display()))?)
        }
        None if foreground => non_blocking(std::io::stderr()),
        None => non_blocking(Syslog),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_ansi(false)
        // It would complain on a standard error output that may be gone, and panic.
        .log_internal_errors(false)
        .with_writer(writer);
    let lines = if file.is_none() && !foreground {
        // syslog(3) has times of its own.
        lines.without_time().boxed()
    } else {
        lines.boxed()
    };
    let lines = lines.with_filter(filter_fn(|line| !line.target().starts_with(SILENT)));
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .try_init()
        .map_err(|error| format!("no log: {error}"))?;
    Ok(flush)
}

/// Sends each formatted line to syslog(3).
struct Syslog;

impl Write for Syslog {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let text: Vec<u8> = line.iter().copied().filter(|byte| *byte != 0).collect();
        let level = match text.trim_ascii_start() {
            text if text.starts_with(b"ERROR") => libc::LOG_ERR,
            text if text.starts_with(b"WARN") => libc::LOG_WARNING,
            text if text.starts_with(b"INFO") => libc::LOG_INFO,
            _ => libc::LOG_DEBUG,
        };
        let text = CString::new(text)?;
        // SAFETY: the format takes one string; both are NUL-terminated and outlive the call. IDENTITY is static, as
        // openlog(3) asks for.
        unsafe {
            libc::openlog(IDENTITY.as_ptr(), libc::LOG_PID, libc::LOG_DAEMON);
            libc::syslog(level, c"%s".as_ptr(), text.as_ptr());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
