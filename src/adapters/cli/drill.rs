//! `cmkfs drill`, `cmkfs drill verify`, `cmkfs drill keygen`; `record` is the module of that name

use super::record::{self, RecordArguments};
use super::{Failure, control, existing_directory, read_superblock};
use crate::adapters::drill::document::{Check, Kind, Outcome, Overall, sha256, sign};
use crate::adapters::drill::markers::Nonce;
use crate::adapters::drill::record::verify::must_be_in_log;
use crate::adapters::drill::sign::{PublicKey, SigningKey, make_files};
use crate::adapters::drill::verify::{self, Verified};
use crate::adapters::drill::{self, LiveVolume, Progress, Request, Subject, html};
use crate::adapters::fuse;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

pub(super) const HELP: &str = "\
On a scratch volume (the default) the drill makes a keystore, a volume and a mount of its own in a temporary directory, and
removes them. On VOLUME it does only what can be undone: it takes the volume's key away for some seconds, for EVERYBODY who
uses any volume under that key, and gives it back; markers lie in a directory of the drill's own, which is removed.

The result is PASS if every check was made and held, INCOMPLETE if all that was tested held but something was not tested
(without a TPM or a token that is always so), FAILED if anything did not hold. Exit status: 0, 0 and 1; 2 asked wrongly.

Examples:
  cmkfs drill keygen ~/drill.key                     a signing key; give ~/drill.key.pub to whoever is to verify
  cmkfs drill --nonce HEX --report report.json --html report.html --signing-key ~/drill.key
  cmkfs drill /srv/vault --yes --report report.json
  cmkfs drill verify report.json --key drill.key.pub --nonce HEX

A drill shows a capability. That a production key was destroyed is what 'cmkfs drill record' writes down: another document,
which is never taken for this one.";

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct DrillArguments {
    #[command(subcommand)]
    command: Option<DrillCommand>,
    /// A mounted volume, or where it is mounted: only what can be undone is done there.
    volume: Option<PathBuf>,
    /// On a volume of the drill's own, which is the default.
    #[arg(long, conflicts_with = "volume")]
    scratch: bool,
    /// Agree that the key of VOLUME is taken away for some seconds.
    #[arg(long)]
    yes: bool,
    /// A challenge of 64 hexadecimal digits, drawn by whoever verifies: everything that is written follows from it.
    #[arg(long, value_name = "HEX")]
    nonce: Option<String>,
    /// Write the signed report here.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write a page for people here.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// An Ed25519 key in PKCS#8, as 'cmkfs drill keygen' makes it. Without it a key is made for this report alone, which
    /// proves nothing about who made it.
    #[arg(long, value_name = "FILE")]
    signing_key: Option<PathBuf>,
    /// Size of the large file.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=4096))]
    size_mib: u64,
    /// How long each revocation is watched.
    #[arg(long, value_name = "N", default_value_t = 3000, value_parser = clap::value_parser!(u64).range(100..=600_000))]
    observe_ms: u64,
    /// Who runs this drill; by default the user's name.
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// Who looks on.
    #[arg(long, value_name = "NAME")]
    witness: Option<String>,
}

#[derive(Debug, Subcommand)]
enum DrillCommand {
    /// Record that a key is destroyed: a document about one key, not about what the software can do.
    #[command(after_help = record::HELP)]
    Record(Box<RecordArguments>),
    /// Check a report or a record: what it is, that it was signed with this key, byte for byte, and that it follows from what is
    /// in it.
    Verify(VerifyArguments),
    /// Make a signing key, and its public key in FILE.pub.
    Keygen {
        /// A new file.
        file: PathBuf,
    },
    /// The drill's own observer.
    #[command(hide = true)]
    Observe,
}

#[derive(Debug, Args)]
struct VerifyArguments {
    /// The report, or the record.
    file: PathBuf,
    /// The public key that you had before: a file, or 64 hexadecimal digits.
    #[arg(long, value_name = "PUBKEY")]
    key: String,
    /// The challenge that you chose.
    #[arg(long, value_name = "HEX")]
    nonce: Option<String>,
    /// Accept this kind of document alone.
    #[arg(long, value_name = "KIND")]
    kind: Option<KindArgument>,
    /// kmsd's audit log, or a copy that somebody kept: it has to have what a record quotes, and nothing else of the key, up to the
    /// head in the record.
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KindArgument {
    /// Of a capability.
    DrillReport,
    /// Of a key that is destroyed.
    DestructionRecord,
    /// Of an imported key, of which our copy is gone.
    RemovalRecord,
}

impl From<KindArgument> for Kind {
    fn from(argument: KindArgument) -> Self {
        match argument {
            KindArgument::DrillReport => Self::DrillReport,
            KindArgument::DestructionRecord => Self::DestructionRecord,
            KindArgument::RemovalRecord => Self::RemovalRecord,
        }
    }
}

pub(super) fn run(arguments: DrillArguments, socket: &Path) -> Result<ExitCode, Failure> {
    match arguments.command {
        Some(DrillCommand::Observe) => drill::observer::run().map(|()| ExitCode::SUCCESS),
        Some(DrillCommand::Keygen { file }) => {
            let public = make_files(&file)?;
            say(&format!(
                "signing key: {}\npublic key:  {}",
                file.display(),
                public.display()
            ));
            Ok(ExitCode::SUCCESS)
        }
        Some(DrillCommand::Record(arguments)) => record::run(&arguments, socket),
        Some(DrillCommand::Verify(arguments)) => check(&arguments),
        None => hold(&arguments, socket),
    }
}

/// What is shown of a document, beside its result.
const OF_REPORT: [(&str, &str); 6] = [
    ("began", "/time/began"),
    ("host", "/host/name"),
    ("operator", "/operator"),
    ("challenge", "/nonce"),
    ("clock", "/clock"),
    ("erasure", "/erasure"),
];
const OF_RECORD: [(&str, &str); 10] = [
    ("title", "/title"),
    ("statement", "/statement"),
    ("key", "/key/arn"),
    ("recorded", "/time/recorded"),
    ("host", "/host/name"),
    ("operator", "/operator"),
    ("witness", "/witness"),
    ("challenge", "/nonce"),
    ("clock", "/clock"),
    ("erasure", "/erasure_worth"),
];

fn check(arguments: &VerifyArguments) -> Result<ExitCode, Failure> {
    let path = &arguments.file;
    let key = PublicKey::read(&arguments.key)?;
    let nonce = arguments.nonce.as_deref().map(Nonce::parse).transpose()?;
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let length = std::fs::metadata(path).map_err(|error| named(&error))?.len();
    if length > verify::BYTES_MAX {
        return Err(named(&"it is too long to be a report or a record"));
    }
    let bytes = std::fs::read(path).map_err(|error| named(&error))?;
    let verified = verify::verify(&bytes, key, nonce).map_err(|error| named(&error))?;
    if let Some(kind) = arguments.kind {
        verified.must_be(kind.into()).map_err(|error| named(&error))?;
    }
    if let Some(log) = &arguments.audit_log {
        if verified.kind == Kind::DrillReport {
            return Err(named(&"a drill report quotes no audit log"));
        }
        must_be_in_log(&verified.content, log).map_err(|error| named(&error))?;
    }
    show(&verified, key, nonce.is_some());
    if let Some(log) = &arguments.audit_log {
        say(&format!(
            "  {:<10} {} has what is quoted, up to the same head",
            "audit log",
            log.display()
        ));
    }
    Ok(status(verified.overall))
}

/// What a document says, without the checks that passed.
fn show(verified: &Verified, key: PublicKey, is_challenged: bool) {
    say(&format!(
        "genuine {}, signed with {}\n  {:<10} {}",
        verified.kind.name(),
        key.text(),
        "result",
        verified.overall.name(),
    ));
    let shown: &[(&str, &str)] = match verified.kind {
        Kind::DrillReport => &OF_REPORT,
        Kind::DestructionRecord | Kind::RemovalRecord => &OF_RECORD,
    };
    for (name, pointer) in shown {
        let value = verified.content.pointer(pointer).and_then(Value::as_str);
        let hint = match (*name, is_challenged, value) {
            ("challenge", true, _) => " (yours)",
            ("challenge", false, Some(_)) => " (compare it with yours, or give --nonce)",
            _ => "",
        };
        let absent = match *name {
            "challenge" => "none",
            _ => "not known",
        };
        let value = printable(value.unwrap_or(absent));
        say(&format!("  {name:<10} {value}{hint}"));
    }
    let checks = verified.content.get("checks").and_then(Value::as_array);
    for check in checks.into_iter().flatten() {
        let text = |name: &str| check.get(name).and_then(Value::as_str).unwrap_or_default();
        if text("result") != Outcome::Pass.name() {
            say(&format!(
                "  {:<10} {}: {}",
                printable(text("result")),
                printable(text("claim")),
                printable(text("detail"))
            ));
        }
    }
}

pub(super) fn status(overall: Overall) -> ExitCode {
    match overall {
        Overall::Pass | Overall::Incomplete => ExitCode::SUCCESS,
        Overall::Failed => ExitCode::FAILURE,
    }
}

fn hold(arguments: &DrillArguments, socket: &Path) -> Result<ExitCode, Failure> {
    // Whatever may be wrong with the command line is, before anything is done.
    let nonce = arguments.nonce.as_deref().map(Nonce::parse).transpose()?;
    let key = signing_key(arguments.signing_key.as_deref())?;
    parents_exist([&arguments.report, &arguments.html])?;
    let subject = match &arguments.volume {
        Some(path) => Subject::Volume(live(path, arguments.yes, socket)?),
        None => Subject::Scratch,
    };
    let request = Request {
        subject,
        is_challenge: nonce.is_some(),
        nonce: match nonce {
            Some(nonce) => nonce,
            None => Nonce::draw()?,
        },
        large_bytes: arguments.size_mib << 20,
        observe: Duration::from_millis(arguments.observe_ms),
        operator: arguments.operator.clone().unwrap_or_else(user),
        witness: arguments.witness.clone(),
    };
    drill::catch_signals()?;
    let mut screen = Screen::new();
    let mut findings = drill::run(&request, &mut |progress| screen.show(&progress))?;
    screen.clear();
    if arguments.signing_key.is_none() {
        let note = Value::from("made for this report alone: it proves nothing about who made it");
        findings.facts.insert("signing_key".to_owned(), note);
    }
    let report = findings.value();
    let bytes = sign(Kind::DrillReport, &report, &key);
    if let Some(path) = &arguments.report {
        write(path, &bytes)?;
    }
    if let Some(path) = &arguments.html {
        let page = html::page(&report, &key.public().text(), &sha256(&bytes));
        write(path, page.as_bytes())?;
    }
    let overall = findings.overall();
    failed_lines(&screen, &findings.checks);
    count_line("drill", overall, &findings.checks, &key);
    Ok(status(overall))
}

/// The key that was named, or one for this document alone.
pub(super) fn signing_key(path: Option<&Path>) -> Result<SigningKey, Failure> {
    path.map_or_else(SigningKey::generate, SigningKey::read)
}

/// Whether there is a place for what is to be written.
pub(super) fn parents_exist(paths: [&Option<PathBuf>; 2]) -> Result<(), Failure> {
    for path in paths.into_iter().flatten() {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        existing_directory(parent.unwrap_or(Path::new(".")), "directory")?;
    }
    Ok(())
}

/// What did not hold, where it was not shown already.
pub(super) fn failed_lines(screen: &Screen, checks: &[Check]) {
    let failed = checks.iter().filter(|check| check.outcome == Outcome::Fail);
    if !screen.is_terminal {
        failed.for_each(|check| say(&line(check)));
    }
}

/// What it all came to.
pub(super) fn count_line(what: &str, overall: Overall, checks: &[Check], key: &SigningKey) {
    let count = |outcome| checks.iter().filter(|check| check.outcome == outcome).count();
    say(&format!(
        "{what}: {}: {} PASS, {} FAIL, {} NOT TESTED; signed with {}",
        overall.name(),
        count(Outcome::Pass),
        count(Outcome::Fail),
        count(Outcome::NotTested),
        key.public().text()
    ));
}

/// Finds the mount of a volume.
fn live(path: &Path, is_agreed: bool, socket: &Path) -> Result<LiveVolume, Failure> {
    let volume = match fuse::find(path).map_err(|error| format!("mountinfo: {error}"))? {
        Some(mount) => mount.volume,
        None => existing_directory(path, "volume")?,
    };
    let superblock = read_superblock(&volume, socket)?;
    let state = control::ask(&volume, &control::Question::Status)?.ok_or_else(|| {
        format!(
            "{} is not mounted: mount it, or drill with --scratch",
            volume.display()
        )
    })?;
    let text = |name: &str| state.get(name).and_then(Value::as_str);
    let pid = state
        .get("pid")
        .and_then(Value::as_u64)
        .and_then(|pid| u32::try_from(pid).ok());
    let (Some(mountpoint), Some(pid)) = (text("mountpoint"), pid) else {
        return Err(format!(
            "the mount of {} does not say what it is",
            volume.display()
        ));
    };
    if !is_agreed {
        return Err(format!(
            "the key {} is taken away for some seconds, and nobody can use any volume under it meanwhile: say --yes to agree",
            superblock.cmk_arn()
        ));
    }
    Ok(LiveVolume {
        mountpoint: PathBuf::from(mountpoint),
        pid,
        key: superblock.cmk_arn().to_owned(),
        socket: socket.to_owned(),
        volume,
    })
}

pub(super) fn user() -> String {
    let uid = rustix::process::getuid().as_raw();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let own = passwd
        .lines()
        .find(|line| line.split(':').nth(2) == Some(uid.to_string().as_str()));
    match own.and_then(|line| line.split(':').next()) {
        Some(name) => format!("{name} (uid {uid})"),
        None => format!("uid {uid}"),
    }
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// A reader that hangs up has seen what it wanted.
fn say(text: &str) {
    let _heard = writeln!(std::io::stdout(), "{text}");
}

fn line(check: &Check) -> String {
    let (claim, detail) = (printable(&check.claim), printable(&check.detail));
    format!("  {:<10} {claim}: {detail}", check.outcome.name())
}

/// What others wrote, without what moves a terminal's cursor.
fn printable(text: &str) -> String {
    let shown = |letter: char| match letter.is_control() {
        true => letter.escape_unicode().to_string(),
        false => letter.to_string(),
    };
    text.chars().map(shown).collect()
}

/// Shows what happens on a terminal, and nothing in a pipe.
pub(super) struct Screen {
    is_terminal: bool,
    width: usize,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            is_terminal: std::io::stdout().is_terminal() && std::io::stderr().is_terminal(),
            width: 0,
        }
    }

    pub(super) fn show(&mut self, progress: &Progress<'_>) {
        if !self.is_terminal {
            return;
        }
        match progress {
            Progress::Step(number, title) => {
                self.clear();
                say(&format!("== {number}: {title}"));
            }
            Progress::Checked(check) => {
                self.clear();
                say(&line(check));
            }
            Progress::Doing(what) => {
                let text = format!("\r   {what:<width$}", width = self.width);
                self.width = what.chars().count();
                let _heard = std::io::stderr().write_all(text.as_bytes());
            }
        }
    }

    pub(super) fn clear(&mut self) {
        if self.width > 0 {
            let _heard = write!(std::io::stderr(), "\r{:width$}\r", "", width = self.width + 3);
            self.width = 0;
        }
    }
}
