//! The command line: `cmkfs create`, `mount`, `umount`, `status`, `revoke`, `setkey`, `rmkey`, `fsck`, `drill`.

mod background;
mod control;
mod create;
mod drill;
mod fsck;
mod harden;
mod logging;
mod mount;
mod options;
mod record;
mod revoke;
mod setkey;
mod status;
mod umount;

use crate::adapters::kms::connect;
use crate::engine::{DomainStatus, KeyError, OpenError, Superblock, Verification};
use clap::{Args, Parser, Subcommand};
use kms_client::ClientError;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// An encrypted filesystem whose keys a KMS can revoke and destroy.
#[derive(Debug, Parser)]
#[command(
    name = "cmkfs",
    version,
    after_help = "\
Examples:
  cmkfs create ~/vault --key-id alias/home      make a volume under a CMK of kmsd
  cmkfs mount ~/vault ~/private                 mount it, and go to the background
  cmkfs mount -o ro,cache=none ~/vault /mnt     read-only; what read(2) gives stays out of the page cache
  cmkfs status ~/private --json                 state of the key, of the log and of the caches
  cmkfs revoke ~/private                        dark at once, without kmsd; --undo takes it back
  cmkfs setkey ~/private/acme --key-id alias/acme
                                                a subtree under a CMK of its own, revocable and erasable alone
  cmkfs umount ~/private                        returns when everything is on disk
  cmkfs fsck --scrub ~/vault                    check every record and every block of an unmounted volume
  cmkfs drill --report r.json --html r.html     take a key away, give it back, destroy it, on a scratch volume; with evidence
  cmkfs drill record --key-id KEY --report r.json
                                                what is known of a key that is destroyed, signed

The socket of kmsd is --socket, else $KMS_SOCKET, else $XDG_RUNTIME_DIR/kmsd/kmsd.sock, else /run/kmsd/kmsd.sock.
What a program sees when the key may not be used: EKEYREVOKED while it is disabled or pending deletion, ENOKEY once
it is destroyed, EKEYREJECTED if kmsd denies the caller, EKEYEXPIRED if kmsd is out of reach for longer than its lease."
)]
struct Arguments {
    /// Socket of kmsd.
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a volume in a directory that is empty or not there.
    Create(CreateArguments),
    /// Mount a volume; returns when the mount answers.
    Mount(MountArguments),
    /// Unmount; returns when everything is on disk and the volume is released.
    Umount(UmountArguments),
    /// Show the state of a mounted volume, or what an unmounted one says of itself.
    Status(StatusArguments),
    /// Have a mount go dark at once, as if its key were disabled, without kmsd; returns when nothing can be read.
    Revoke(RevokeArguments),
    /// Put an empty directory of a mounted volume under a CMK of its own; returns when that is durable.
    #[command(after_help = SETKEY_HELP)]
    Setkey(SetkeyArguments),
    /// Remove a directory of a mounted volume whose own CMK is destroyed. Its content is gone; this removes its name.
    Rmkey(RmkeyArguments),
    /// Check a volume that is not mounted: records, names, links, counts, slots. Changes nothing without --repair.
    #[command(after_help = FSCK_HELP)]
    Fsck(FsckArguments),
    /// Show that taking a key away makes everything unreadable at once, and what destroying it is worth; with evidence.
    #[command(after_help = drill::HELP)]
    Drill(drill::DrillArguments),
}

const SETKEY_HELP: &str = "\
What is made in the directory from then on, names and attributes included, is under that CMK: disabling it darkens that
subtree alone, destroying it makes that subtree noise for ever, and its space comes back. While the volume's own CMK may not
be used, nothing can be. The directory is replaced by a new one with its owner, mode, times and attributes: who is in it
has to enter it again. Files are moved into it and out of it by copying (mv does that); hard links do not cross. A directory
below such a directory cannot be put under another CMK. docs/domains.md has the details.";

const FSCK_HELP: &str = "\
Exit status, as fsck(8) has it: 0 no problem, 1 problems were repaired, 4 problems were left (5: both), 8 the check could
not be made, 16 it was asked for wrongly. docs/fsck.md lists the problems, by the word in brackets behind each.";

#[derive(Debug, Args)]
struct CreateArguments {
    /// Directory for the volume.
    volume: PathBuf,
    /// The CMK: a key id, an ARN, or alias/NAME.
    #[arg(long, value_name = "KEY")]
    key_id: String,
}

#[derive(Debug, Args)]
struct MountArguments {
    /// The volume's directory.
    volume: PathBuf,
    /// An existing directory.
    mountpoint: PathBuf,
    /// Options, separated by commas: ro, rw, allow_other (the default for root), noallow_other, nosuid, nodev, noexec,
    /// suid, dev, exec, noatime, cache=writeback, cache=none, publish_interval_ms=N, key_poll_interval_ms=N,
    /// drain_max_ms=N (time to store what was written when the key is revoked; the rest is dropped), block_cache_mib=N,
    /// dek_cache_entries_max=N, node_cache_entries_max=N,
    /// accept_kms_restore (kmsd's keystore was put back on purpose),
    /// verify=lazy, verify=full, verify=off (whether the records are those that were last written: in the background, which is
    /// the default, before anything is served, or never).
    #[arg(short = 'o', value_name = "OPTIONS", verbatim_doc_comment)]
    options: Vec<String>,
    /// Take in a volume that was put back on purpose, from a backup, or a copy of one, though kmsd knows that it had come further,
    /// or went on elsewhere. kmsd records it.
    #[arg(long)]
    accept_restore: bool,
    /// Stay in the foreground, and log to the standard error output.
    #[arg(long)]
    foreground: bool,
    /// Log to this file, not to syslog. $CMKFS_LOG sets the level: error, warn, info (the default), debug.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct UmountArguments {
    /// Where the volume is mounted.
    mountpoint: PathBuf,
}

#[derive(Debug, Args)]
struct StatusArguments {
    /// A mount point, or a volume's directory.
    path: PathBuf,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RevokeArguments {
    /// Where the volume is mounted.
    mountpoint: PathBuf,
    /// Take it back: the mount is live again as soon as kmsd permits.
    #[arg(long)]
    undo: bool,
}

#[derive(Debug, Args)]
struct SetkeyArguments {
    /// An empty directory of a mounted volume.
    directory: PathBuf,
    /// The CMK: a key id, an ARN, or alias/NAME.
    #[arg(long, value_name = "KEY")]
    key_id: String,
}

#[derive(Debug, Args)]
struct RmkeyArguments {
    /// A directory of a mounted volume whose CMK is destroyed.
    directory: PathBuf,
}

#[derive(Debug, Args)]
struct FsckArguments {
    /// The volume's directory.
    volume: PathBuf,
    /// Read every block and verify it.
    #[arg(long)]
    scrub: bool,
    /// Repair what can be repaired without a guess: counts, bitmaps, leaked space, rows that belong to nothing, inodes
    /// without a name.
    #[arg(long)]
    repair: bool,
    /// With --repair: take the records that are there for those that were last written, whatever was put back as it once was,
    /// removed or added.
    #[arg(long, requires = "repair")]
    accept_records: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the program: one line on the standard error output and exit status 1 for whatever goes wrong.
#[must_use]
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    let socket = kms_client::socket_path(arguments.socket.as_deref());
    let mut failure = ExitCode::FAILURE;
    let done = match arguments.command {
        Command::Create(arguments) => create::run(&arguments, &socket),
        Command::Mount(arguments) => mount::run(&arguments, &socket),
        Command::Umount(arguments) => umount::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Revoke(arguments) => revoke::run(&arguments),
        Command::Setkey(arguments) => setkey::set(&arguments, &socket),
        Command::Rmkey(arguments) => setkey::remove(&arguments),
        Command::Fsck(arguments) => {
            failure = ExitCode::from(fsck::OPERATIONAL_ERROR);
            match fsck::run(&arguments, &socket) {
                Ok(status) => return status,
                Err(message) => Err(message),
            }
        }
        Command::Drill(arguments) => match drill::run(arguments, &socket) {
            Ok(status) => return status,
            Err(message) => Err(message),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            complain(&message);
            failure
        }
    }
}

/// Says what is wrong with the command line, or gives the help that was asked for.
fn refuse(error: &clap::Error) -> ExitCode {
    let _heard = error.print();
    let is_fsck = std::env::args_os().any(|argument| argument == "fsck");
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if is_fsck => ExitCode::from(fsck::USAGE_ERROR),
        _ => ExitCode::from(2),
    }
}

/// What went wrong, for a person: names what is wrong and what to do.
type Failure = String;

/// One line on the standard error output, if that is still there.
fn complain(message: &str) {
    let _heard = writeln!(std::io::stderr(), "cmkfs: {}", one_line(message));
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

fn key_failure(error: &KeyError, socket: &Path) -> Failure {
    match error {
        KeyError::Revoked => "the key is disabled or pending deletion; 'kmsctl enable-key' or 'kmsctl \
            cancel-key-deletion' brings it back"
            .to_owned(),
        KeyError::Erased => "the key is destroyed, has no material, or is unknown to this kmsd".to_owned(),
        KeyError::Destroyed => "the key is destroyed: what was under it is noise for ever".to_owned(),
        KeyError::Denied => "kmsd refuses this user the key".to_owned(),
        KeyError::Unreachable(why) => format!(
            "kmsd does not answer on {}: start it, or name its socket with --socket or $KMS_SOCKET ({why})",
            socket.display()
        ),
        KeyError::RolledBack => "kmsd knows less than this volume has seen of it: its keystore was put back as it once was, and \
            may give out keys that were revoked or destroyed since. Put the true keystore back; '-o accept_kms_restore' mounts \
            all the same"
            .to_owned(),
        KeyError::AnchorConflict => "kmsd knows of another history of this volume".to_owned(),
        KeyError::BadBlob => {
            "the volume's key does not open: the superblock was changed, or kmsd has another key of that name"
                .to_owned()
        }
        KeyError::Other(message) => format!("kmsd: {message}"),
    }
}

/// The ARN of a key that may be given in any form.
fn key_arn(key: &str, socket: &Path) -> Result<String, Failure> {
    let client = connect(socket).map_err(|error| key_failure(&error, socket))?;
    let described = client.describe_key(key).map_err(|error| match error {
        ClientError::Kms(error) => format!("key '{key}': {}", error.message),
        ClientError::Unreachable(why) => key_failure(&KeyError::Unreachable(why), socket),
        other => format!("kmsd: {other}"),
    })?;
    Ok(described.arn)
}

/// A key domain, in JSON.
fn domain_document(status: &DomainStatus) -> Value {
    json!({
        "domain": status.domain.0,
        "path": status.path.as_deref().map(|path| path.escape_ascii().to_string()),
        "cmk_arn": status.cmk_arn,
        "key_state": control::key_state(status.key_state),
        "erased": status.is_erased,
        "inodes": status.inodes,
        "data_bytes": status.blocks.saturating_mul(4096),
        "verification": status.verification.map(verification_document),
    })
}

fn verification_document(verification: Verification) -> Value {
    match verification {
        Verification::Off => json!({ "state": "off" }),
        Verification::Unsupported => json!({ "state": "unsupported" }),
        Verification::Waiting => json!({ "state": "waiting" }),
        Verification::Running { inodes } => json!({ "state": "running", "inodes": inodes }),
        Verification::Matches { inodes, records } => {
            json!({ "state": "matches", "inodes": inodes, "records": records })
        }
        Verification::Differs { findings } => json!({ "state": "differs", "findings": findings }),
    }
}

fn open_failure(error: &OpenError, volume: &Path, socket: &Path) -> Failure {
    match error {
        OpenError::Key(error) => key_failure(error, socket),
        OpenError::AlreadyMounted => format!("{} is mounted already", volume.display()),
        OpenError::NotAVolume => {
            format!(
                "{} is no cmkfs volume: it has no superblock; 'cmkfs create' makes one",
                volume.display()
            )
        }
        OpenError::FutureFormat { found, known } => format!(
            "{} has format version {found}, this program knows versions up to {known}: use a newer cmkfs",
            volume.display()
        ),
        OpenError::Older(_) | OpenError::Forked => format!(
            "{}: {error}. Mount the latest; if this one was put back on purpose, '--accept-restore' takes it in, and the other is \
             refused from then on",
            volume.display()
        ),
        OpenError::NotAsWritten(_) => format!(
            "{}: {error}. Put the true copy back; 'cmkfs fsck' says which files differ, '-o verify=lazy' mounts it for reading",
            volume.display()
        ),
        other => format!("{}: {other}", volume.display()),
    }
}

fn read_superblock(volume: &Path, socket: &Path) -> Result<Superblock, Failure> {
    Superblock::read(volume).map_err(|error| open_failure(&error, volume, socket))
}

/// A UUID in its usual form.
fn uuid_text(uuid: [u8; 16]) -> String {
    uuid::Uuid::from_bytes(uuid).to_string()
}

/// The canonical path of a directory that is there.
fn existing_directory(path: &Path, what: &str) -> Result<PathBuf, Failure> {
    let found = std::fs::canonicalize(path).map_err(|error| format!("{what} {}: {error}", path.display()))?;
    if found.is_dir() {
        Ok(found)
    } else {
        Err(format!("{what} {} is no directory", path.display()))
    }
}
