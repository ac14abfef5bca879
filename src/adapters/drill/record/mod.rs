//! The destruction record: what kmsd, its files and the people who are named know of one key whose material is gone, and what
//! that is worth. It shows nothing of what the software can do, and is no drill report.

mod audit;
mod contents;
mod home;
mod known;
mod live;
pub mod page;
mod statement;
#[cfg(test)]
mod tests;
pub mod verify;

pub use live::{Uses, uses};

use super::Progress;
use super::document::{Check, Kind, Outcome, Overall};
use super::facts;
use super::kms::Kms;
use super::markers::Nonce;
use crate::engine::Superblock;
use audit::Log;
use home::Home;
use kms_client::Client;
use kms_client::proto::{KeyMetadata, KeyState};
use known::{Known, Made};
use live::Tried;
use serde_json::Value;
use std::path::PathBuf;

/// Of a key whose material was made elsewhere.
const EXTERNAL: &str = "EXTERNAL";
/// What makes a record.
const TOOL: &str = "cmkfs drill record";

/// What is asked for.
pub struct Request {
    /// Of kmsd.
    pub socket: PathBuf,
    /// The key: an id, an ARN or an alias.
    pub key: String,
    /// A challenge.
    pub nonce: Option<Nonce>,
    /// Who asks.
    pub operator: String,
    /// Who looks on.
    pub witness: Option<String>,
    /// What is known of copies, in the words of whoever knows it.
    pub known_copies: Vec<String>,
    /// Volumes that are tried.
    pub volumes: Vec<NamedVolume>,
    /// What of kmsd's files can be read.
    pub files: Files,
    /// Whether the key that will sign was made for this record alone.
    pub is_key_own: bool,
}

/// A volume that was named.
pub struct NamedVolume {
    /// Its directory.
    pub path: PathBuf,
    /// What it says of itself.
    pub superblock: Superblock,
    /// What its mount says, if it is mounted.
    pub state: Option<Value>,
}

/// What of kmsd's files can be read.
#[derive(Debug)]
pub enum Files {
    /// None.
    None,
    /// The audit log, or a copy of it.
    Log(PathBuf),
    /// All of them.
    Home(PathBuf),
}

impl Files {
    fn log(&self) -> Option<PathBuf> {
        match self {
            Self::None => None,
            Self::Log(path) => Some(path.clone()),
            Self::Home(path) => Some(path.join("audit.log")),
        }
    }

    fn home(&self) -> Option<&PathBuf> {
        match self {
            Self::None | Self::Log(_) => None,
            Self::Home(path) => Some(path),
        }
    }
}

/// Of a copy that others have nobody may say that it is destroyed.
fn kind_for(origin: &str) -> Kind {
    match origin {
        EXTERNAL => Kind::RemovalRecord,
        _ => Kind::DestructionRecord,
    }
}

/// What a record is called, first of all.
fn title(kind: Kind, is_for_drills: bool) -> String {
    let what = match kind {
        Kind::RemovalRecord => "Removal record: our copy of an imported key",
        Kind::DestructionRecord | Kind::DrillReport => "Destruction record",
    };
    match is_for_drills {
        true => format!("{what} (TEST CLOCK: a keystore for drills, no production key)"),
        false => what.to_owned(),
    }
}

/// A record that is not signed yet.
pub struct Record {
    /// Which kind it is.
    pub kind: Kind,
    /// Its fields.
    pub value: Value,
    /// What was checked.
    pub checks: Vec<Check>,
}

impl Record {
    /// What it all comes to.
    #[must_use]
    pub fn overall(&self) -> Overall {
        Overall::of(self.checks.iter().map(|check| check.outcome))
    }
}

/// Makes a record of a key whose material is gone. Changes nothing.
///
/// # Errors
/// One line: the key is none of which there is anything to record, or what was named cannot be read.
pub fn make(
    request: &Request,
    client: &Client,
    show: &mut dyn FnMut(Progress<'_>),
) -> Result<Record, String> {
    let kms = Kms::over(client);
    let key = kms.describe(&request.key)?;
    must_be_gone(&key)?;
    show(Progress::Doing("kmsd is asked to use the key"));
    let uses = uses(client, &key, &kms.keystore()?.region);
    let dependants = kms.dependants(&key.key_id)?;
    show(Progress::Doing("volumes are tried"));
    let volumes = live::volumes(&request.volumes, &key, &dependants, &request.socket)?;
    // Last, so that the log has everything up to here.
    let keystore = kms.keystore()?;
    show(Progress::Doing("kmsd's files are looked at"));
    let home = request.files.home();
    let home = home.map(|path| Home::read(path, &keystore.keystore_id));
    let log = request.files.log();
    let log = log.map(|path| Log::read(&path, &keystore, &key.arn));
    let known = Known {
        home: home.transpose()?,
        log: log.transpose()?,
        key,
        keystore,
        dependants,
        tried: Tried { uses, volumes },
        nonce: request.nonce,
        operator: request.operator.clone(),
        witness: request.witness.clone(),
        known_copies: request.known_copies.clone(),
        made: Made::now(request.is_key_own),
    };
    known.must_be_recordable()?;
    let record = contents::write(&known);
    for check in &record.checks {
        show(Progress::Checked(check));
    }
    Ok(record)
}

fn must_be_gone(key: &KeyMetadata) -> Result<(), String> {
    let what = match key.key_state() {
        KeyState::Destroyed => return Ok(()),
        KeyState::Enabled => "Enabled: its material is there, and can be used".to_owned(),
        KeyState::Disabled => "Disabled: its material is there, and 'kmsctl enable-key' brings it back".to_owned(),
        KeyState::PendingDeletion => format!(
            "PendingDeletion: its material is there until {} at least, and 'kmsctl cancel-key-deletion' brings it back",
            key.delete_date_ms.map_or_else(|| "its window has passed".to_owned(), facts::time)
        ),
        KeyState::PendingImport => {
            "PendingImport: it has no material here, and may be given it again; schedule its deletion, and wait for it".to_owned()
        }
        KeyState::Unspecified => "in a state that this program does not know".to_owned(),
    };
    Err(format!(
        "there is nothing to record: the key {} is {what}",
        key.key_id
    ))
}

fn check(id: &'static str, claim: impl Into<String>, (outcome, detail): (Outcome, String)) -> Check {
    Check {
        id,
        step: None,
        claim: claim.into(),
        outcome,
        detail,
    }
}
