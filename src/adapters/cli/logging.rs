//! Where log lines go: the standard error output in the foreground, else a file or syslog(3).

use super::Failure;
use std::ffi::CString;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use tracing_subscriber::EnvFilter;

/// Sets the level, as in `debug` or `cmkfs=debug,warn`.
const LEVEL_VARIABLE: &str = "CMKFS_LOG";
const LEVEL_DEFAULT: &str = "info";
/// What is never logged, whatever the level.
const SILENT: &str = "fuser=off";
/// What syslog shows before each line.
const IDENTITY: &std::ffi::CStr = c"cmkfs";

/// Starts logging for a mount.
pub(super) fn start(foreground: bool, file: Option<&Path>) -> Result<(), Failure> {
    let filter = EnvFilter::try_from_env(LEVEL_VARIABLE).unwrap_or_else(|_| EnvFilter::new(LEVEL_DEFAULT));
    // It logs requests with the names in them.
    let silent = SILENT
        .parse()
        .map_err(|error| format!("no log filter: {error}"))?;
    let filter = filter.add_directive(silent);
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false);
    let started = match file {
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.map_err(|error| format!("log file {}: {error}", path.display()))?;
            lines.with_writer(Mutex::new(file)).try_init()
        }
        None if foreground => lines.with_writer(std::io::stderr).try_init(),
        None => lines.without_time().with_writer(|| Syslog).try_init(),
    };
    started.map_err(|error| format!("no log: {error}"))
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
