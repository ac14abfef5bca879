//! Recovers files from copies of a keystore and a volume, as far as the key files that are handed over go. It was written
//! from docs/kms-format.md and docs/format.md, and shares no code with the daemons: what it cannot open, a mistake that it
//! has in common with them does not hide.

mod crypto;
mod keystore;
mod read;
mod sweep;
mod volume;

pub use keystore::{Attempts, Material, Opened};
pub use read::Copy;
pub use volume::{File, Recovered};

use secret_search::{Form, key_forms};
use std::path::PathBuf;

/// What a run was given.
#[derive(Debug, Default)]
pub struct Given {
    /// Directories with copies of keystores, slots among them or not.
    pub keystores: Vec<PathBuf>,
    /// Directories with copies of volumes.
    pub volumes: Vec<PathBuf>,
    /// Slots that are handed over beside.
    pub slots: Vec<PathBuf>,
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Files that were read, and their bytes.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Of keystores.
    pub opened: Opened,
    /// Of volumes, in the order in which they were given.
    pub volumes: Vec<Recovered>,
    /// Digests of what each key looks like in memory, without the key.
    pub forms: Vec<Form>,
}

/// Tries everything with everything.
///
/// # Errors
/// A directory that cannot be read; what does not open is no error.
pub fn recover(given: &Given) -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    let copies: Vec<Copy> = given
        .keystores
        .iter()
        .map(|dir| Copy::read(dir))
        .collect::<Result<_, _>>()?;
    let slots: Vec<_> = given
        .slots
        .iter()
        .map(|path| read::file(path))
        .collect::<Result<_, _>>()?;
    let volumes: Vec<volume::Volume> = given
        .volumes
        .iter()
        .map(|dir| volume::Volume::read(dir))
        .collect::<Result<_, _>>()?;
    for copy in &copies {
        outcome.files += copy.files.len() as u64;
        outcome.bytes += copy.bytes();
    }
    let named: Vec<_> = volumes.iter().filter_map(volume::Volume::wrapping_key).collect();
    outcome.opened = keystore::open_keystores(&copies, &slots, &named);
    let mut forms = outcome.opened.forms.split_off(0);
    for volume in &volumes {
        outcome.files += volume.files;
        outcome.bytes += volume.bytes;
        outcome
            .volumes
            .push(volume.recover(&mut outcome.opened, &mut forms));
    }
    outcome.forms = forms;
    Ok(outcome)
}

fn add_forms(forms: &mut Vec<Form>, name: &str, key: &[u8; 32]) {
    forms.extend(key_forms(name, key));
}
