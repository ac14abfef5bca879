//! `cmkfs drill record`

use super::drill::{Screen, count_line, failed_lines, parents_exist, signing_key, status, user, write};
use super::{Failure, control, existing_directory, key_failure, read_superblock};
use crate::adapters::drill::document::{sha256, sign};
use crate::adapters::drill::markers::Nonce;
use crate::adapters::drill::record::{Files, NamedVolume, Request, make, page};
use crate::adapters::drill::verify::verify;
use crate::adapters::fuse;
use crate::engine::KeyError;
use clap::Args;
use kms_client::{Client, ClientError};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const CALL_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) const HELP: &str = "\
It asks kmsd about a key that is destroyed, tries to use it, and changes nothing. A key in any other state is refused, with exit
status 1, and so is one that never had any material. Of a key whose material was imported (Origin EXTERNAL) it makes a removal
record: our copy is gone, the owner's is not. A keystore for drills has that in the title of its records.

The result is INCOMPLETE at best: what the medium of the old root slot is worth, and what copies hold, is never tested here.
Exit status: 0; 1 if anything did not hold, or there is nothing to record; 2 asked wrongly.

Example:
  cmkfs drill record --key-id KEY --kms-home /var/lib/kmsd --volume /srv/vault --nonce HEX \\
      --known-copy 'tape 17, in the safe' --report record.json --html record.html --signing-key ~/drill.key";

#[derive(Debug, Args)]
pub(super) struct RecordArguments {
    /// The destroyed key: a key id, an ARN, or alias/NAME.
    #[arg(long, value_name = "KEY")]
    key_id: String,
    /// A challenge of 64 hexadecimal digits, drawn by whoever verifies; the record says that you gave it.
    #[arg(long, value_name = "HEX")]
    nonce: Option<String>,
    /// Write the signed record here.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write a page for people here.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// An Ed25519 key in PKCS#8, as 'cmkfs drill keygen' makes it. Without it a key is made for this record alone, which
    /// proves nothing about who made it.
    #[arg(long, value_name = "FILE")]
    signing_key: Option<PathBuf>,
    /// Who makes this record; by default the user's name.
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// Who looks on.
    #[arg(long, value_name = "NAME")]
    witness: Option<String>,
    /// kmsd's home: its audit log is checked and quoted, and every file in it is looked at, since it may be an old slot.
    #[arg(long, value_name = "DIR")]
    kms_home: Option<PathBuf>,
    /// kmsd's audit log, or a copy of it, where the home cannot be read.
    #[arg(long, value_name = "FILE", conflicts_with = "kms_home")]
    audit_log: Option<PathBuf>,
    /// A volume that was under the key, or where it is mounted: it is tried. May be repeated.
    #[arg(long, value_name = "DIR")]
    volume: Vec<PathBuf>,
    /// A copy that is known of: a backup, a snapshot, escrow. May be repeated.
    #[arg(long, value_name = "TEXT")]
    known_copy: Vec<String>,
}

pub(super) fn run(arguments: &RecordArguments, socket: &Path) -> Result<ExitCode, Failure> {
    // Whatever may be wrong with the command line is, before anything is done.
    let nonce = arguments.nonce.as_deref().map(Nonce::parse).transpose()?;
    let key = signing_key(arguments.signing_key.as_deref())?;
    parents_exist([&arguments.report, &arguments.html])?;
    let volumes = arguments.volume.iter().map(|path| named(path, socket));
    let request = Request {
        socket: socket.to_owned(),
        key: arguments.key_id.clone(),
        nonce,
        operator: arguments.operator.clone().unwrap_or_else(user),
        witness: arguments.witness.clone(),
        known_copies: arguments.known_copy.clone(),
        volumes: volumes.collect::<Result<_, Failure>>()?,
        files: match (&arguments.kms_home, &arguments.audit_log) {
            (Some(home), _) => Files::Home(existing_directory(home, "kmsd's home")?),
            (None, Some(log)) => Files::Log(log.clone()),
            (None, None) => Files::None,
        },
        is_key_own: arguments.signing_key.is_none(),
    };
    let client = Client::connect(socket, CALL_TIMEOUT).map_err(|error| match error {
        ClientError::Unreachable(why) => key_failure(&KeyError::Unreachable(why), socket),
        other => format!("kmsd: {other}"),
    })?;
    let mut screen = Screen::new();
    let made = make(&request, &client, &mut |progress| screen.show(&progress));
    screen.clear();
    let record = made?;
    let bytes = sign(record.kind, &record.value, &key);
    // What nobody could verify would be of no use to anybody.
    verify(&bytes, key.public(), nonce)
        .map_err(|error| format!("the record would not verify, and is not written: {error}"))?;
    if let Some(path) = &arguments.report {
        write(path, &bytes)?;
    }
    if let Some(path) = &arguments.html {
        let page = page::page(&record.value, &key.public().text(), &sha256(&bytes));
        write(path, page.as_bytes())?;
    }
    failed_lines(&screen, &record.checks);
    let title = record.value.get("title").and_then(Value::as_str);
    count_line(
        title.unwrap_or(record.kind.name()),
        record.overall(),
        &record.checks,
        &key,
    );
    Ok(status(record.overall()))
}

fn named(path: &Path, socket: &Path) -> Result<NamedVolume, Failure> {
    let path = match fuse::find(path).map_err(|error| format!("mountinfo: {error}"))? {
        Some(mount) => mount.volume,
        None => existing_directory(path, "volume")?,
    };
    let superblock = read_superblock(&path, socket)?;
    let state = control::ask(&path, &control::Question::Status)?;
    Ok(NamedVolume {
        path,
        superblock,
        state,
    })
}
