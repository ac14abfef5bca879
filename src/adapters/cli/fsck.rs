//! `cmkfs fsck`

use super::harden::harden;
use super::{
    Failure, FsckArguments, domain_document, existing_directory, key_failure, open_failure, read_superblock,
    uuid_text,
};
use crate::adapters::kms::{Holder, SessionKeys};
use crate::engine::{
    CheckOptions, CheckedDomain, Event, KeyService, Options, Problem, Report, SystemClock, Volume,
};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// fsck(8): errors were corrected.
const CORRECTED: u8 = 1;
/// fsck(8): errors were left.
const UNCORRECTED: u8 = 4;
/// fsck(8): it could not be done.
pub(super) const OPERATIONAL_ERROR: u8 = 8;
/// fsck(8): it was asked for wrongly.
pub(super) const USAGE_ERROR: u8 = 16;

pub(super) fn run(arguments: &FsckArguments, socket: &Path) -> Result<ExitCode, Failure> {
    let dir = existing_directory(&arguments.volume, "volume")?;
    let superblock = read_superblock(&dir, socket)?;
    harden()?;
    let holder = Holder {
        socket: socket.to_path_buf(),
        volume: superblock.volume(),
        location: dir.clone(),
        drain_max: Options::default().drain_max,
    };
    let keys =
        SessionKeys::open(holder, superblock.cmk_arn()).map_err(|error| key_failure(&error, socket))?;
    let keys = Arc::new(keys);
    let options = CheckOptions {
        scrub: arguments.scrub,
        repair: arguments.repair,
        accept_records: arguments.accept_records,
    };
    let mut screen = Screen::new(arguments.json);
    let checked = Volume::check(
        &dir,
        options,
        Arc::clone(&keys) as Arc<dyn KeyService>,
        Arc::new(SystemClock),
        &mut |event| {
            screen.show(event);
        },
    );
    screen.clear();
    keys.close();
    let report = checked.map_err(|error| open_failure(&error, &dir, socket))?;
    if !arguments.json {
        for line in report.domains.iter().filter_map(domain_line) {
            screen.line(&line);
        }
    }
    let text = if arguments.json {
        document(&dir, superblock.volume(), &report).to_string()
    } else {
        summary(&dir, arguments, &report)
    };
    // A reader that hangs up has seen enough; the exit status says the rest.
    let _seen = writeln!(std::io::stdout(), "{text}");
    let (repaired, left) = report.totals();
    let bit = |condition: bool, bit: u8| if condition { bit } else { 0 };
    Ok(ExitCode::from(
        bit(repaired > 0, CORRECTED) | bit(left > 0, UNCORRECTED),
    ))
}

/// Where problems and progress are shown as they come.
struct Screen {
    is_terminal: bool,
    is_json: bool,
    width: usize,
}

impl Screen {
    fn new(is_json: bool) -> Self {
        Self {
            is_terminal: std::io::stderr().is_terminal(),
            is_json,
            width: 0,
        }
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Progress { phase, done, total } if self.is_terminal => {
                let line = match total.filter(|total| *total > 0) {
                    Some(total) => format!("{phase}: {done} of {total}"),
                    None => format!("{phase}: {done}"),
                };
                let padded = format!("\r{line:<width$}", width = self.width);
                self.width = line.len();
                let _seen = std::io::stderr().write_all(padded.as_bytes());
            }
            Event::Found(problem) if !self.is_json => self.line(&line(problem)),
            Event::Repaired(problem) if !self.is_json => self.line(&format!("repaired: {}", line(problem))),
            _ => {}
        }
    }

    fn line(&mut self, text: &str) {
        self.clear();
        // A reader that hangs up has seen enough; the exit status says the rest.
        let _seen = writeln!(std::io::stdout(), "{text}");
    }

    fn clear(&mut self) {
        if self.width > 0 {
            let _seen = write!(std::io::stderr(), "\r{:width$}\r", "", width = self.width);
            self.width = 0;
        }
    }
}

fn line(problem: &Problem) -> String {
    let place = match (&problem.path, problem.ino) {
        (Some(path), Some(ino)) => format!("{} (inode {})", path.escape_ascii(), ino.0),
        (None, Some(ino)) => format!("inode {}", ino.0),
        _ => "the volume".to_owned(),
    };
    format!("{place}: {} [{}]", problem.detail, problem.fault.name())
}

fn summary(dir: &Path, arguments: &FsckArguments, report: &Report) -> String {
    let counts = &report.counts;
    let mut text = format!(
        "{}: {} inodes, {} directories, {} files, {} blocks",
        dir.display(),
        counts.inodes,
        counts.directories,
        counts.files,
        counts.blocks
    );
    let mut say = |what: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _written = text.write_fmt(what);
    };
    if arguments.scrub {
        say(format_args!(", {} blocks read", counts.scrubbed_blocks));
    }
    if counts.orphans > 0 {
        say(format_args!(
            ", {} unlinked that the next mount removes",
            counts.orphans
        ));
    }
    let unchecked = report
        .domains
        .iter()
        .filter(|domain| !domain.is_checked && !domain.status.is_erased);
    let unchecked = unchecked.count();
    if unchecked > 0 {
        say(format_args!(", {unchecked} key domains not checked"));
    }
    match report.totals() {
        (0, 0) => say(format_args!(": clean")),
        (0, left) if !arguments.repair => say(format_args!(": {left} problems")),
        (repaired, left) => say(format_args!(": {repaired} problems repaired, {left} left")),
    }
    text
}

/// What is to be said of a key domain that could not be looked at.
fn domain_line(domain: &CheckedDomain) -> Option<String> {
    let status = &domain.status;
    let why = match (domain.is_checked, status.is_erased) {
        (true, _) => return None,
        (false, true) => "erased: its key is destroyed, and its content is noise",
        (false, false) => "not checked: its key may not be used at present",
    };
    let place = status
        .path
        .as_deref()
        .map_or_else(String::new, |path| format!("{}: ", path.escape_ascii()));
    let arn = status.cmk_arn.as_deref().unwrap_or_default();
    Some(format!(
        "{place}key domain {} ({arn}), {} inodes, {} blocks: {why}",
        status.domain.0, status.inodes, status.blocks
    ))
}

fn document(dir: &Path, uuid: [u8; 16], report: &Report) -> Value {
    let counts = &report.counts;
    let (repaired, left) = report.totals();
    let problems = report.problems.iter().map(|problem| {
        json!({
            "fault": problem.fault.name(),
            "inode": problem.ino.map(|ino| ino.0),
            "path": problem.path.as_deref().map(|path| path.escape_ascii().to_string()),
            "detail": problem.detail,
            "repaired": problem.is_repaired,
        })
    });
    json!({
        "volume": dir.to_string_lossy(),
        "uuid": uuid_text(uuid),
        "clean": report.problems.is_empty(),
        "repaired": repaired,
        "left": left,
        "inodes": counts.inodes,
        "directories": counts.directories,
        "files": counts.files,
        "blocks": counts.blocks,
        "scrubbed_blocks": counts.scrubbed_blocks,
        "orphans": counts.orphans,
        "problems": problems.collect::<Vec<_>>(),
        "domains": report.domains.iter().map(checked_document).collect::<Vec<_>>(),
    })
}

fn checked_document(domain: &CheckedDomain) -> Value {
    let mut document = domain_document(&domain.status);
    if let Some(fields) = document.as_object_mut() {
        fields.insert("checked".to_owned(), domain.is_checked.into());
    }
    document
}
