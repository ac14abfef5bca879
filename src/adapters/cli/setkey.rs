//! `cmkfs setkey` and `cmkfs rmkey`: key domains of a mounted volume.

use super::control::{self, Name, Question};
use super::{Failure, RmkeyArguments, SetkeyArguments, key_arn, key_failure};
use crate::adapters::fuse;
use crate::engine::{Error, KeyError};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub(super) fn set(arguments: &SetkeyArguments, socket: &Path) -> Result<(), Failure> {
    let (volume, name) = place(&arguments.directory)?;
    let arn = key_arn(&arguments.key_id, socket)?;
    ask(
        &arguments.directory,
        &volume,
        &Question::SetKey(name, arn.clone()),
    )?;
    println!(
        "{} is under {arn} from now on, and whatever is made in it",
        arguments.directory.display()
    );
    Ok(())
}

pub(super) fn remove(arguments: &RmkeyArguments) -> Result<(), Failure> {
    let (volume, name) = place(&arguments.directory)?;
    ask(&arguments.directory, &volume, &Question::RemoveKey(name))
}

fn ask(directory: &Path, volume: &Path, question: &Question) -> Result<(), Failure> {
    let shown = directory.display();
    match control::ask(volume, question) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(format!(
            "{shown}: the process that serves its mount does not answer"
        )),
        Err(why) => Err(format!("{shown}: {why}")),
    }
}

/// The volume that a directory lies in, and its place there. It may itself be out of reach.
fn place(directory: &Path) -> Result<(PathBuf, Name), Failure> {
    let shown = directory.display();
    let failed = |error: std::io::Error| format!("{shown}: {error}");
    let absolute = std::path::absolute(directory).map_err(failed)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(format!("{shown}: name the directory itself, not one by '..'"));
    };
    let is_mountpoint = fuse::find(&absolute).map_err(failed)?.is_some();
    if is_mountpoint {
        return Err(format!(
            "{shown} is the root of a volume, which is under the volume's own key for good"
        ));
    }
    let parent = std::fs::canonicalize(parent).map_err(failed)?;
    let mount = fuse::find_around(&parent).map_err(failed)?;
    let mount = mount.ok_or_else(|| format!("{shown} lies in no mounted cmkfs volume"))?;
    let name = Name {
        parent: std::fs::metadata(&parent).map_err(failed)?.ino(),
        name: name.as_bytes().to_vec(),
    };
    Ok((mount.volume, name))
}

/// Why a directory is not put under a key.
pub(super) fn refusal(error: &Error, kmsd: &Path) -> Failure {
    match error {
        Error::Posix(libc::ENOTEMPTY) => {
            "it is not empty: make a new directory, put that under the key, and move the content into it"
                .to_owned()
        }
        Error::Posix(libc::EEXIST) => "it is under a key of its own already".to_owned(),
        Error::Posix(libc::EINVAL) => {
            "it lies below a directory that is under a key of its own; key domains do not nest".to_owned()
        }
        Error::Posix(libc::EBUSY) => "another directory came to have that name; try again".to_owned(),
        Error::KeyRevoked => key_failure(&KeyError::Revoked, kmsd),
        Error::KeyErased => key_failure(&KeyError::Erased, kmsd),
        Error::KeyDenied => key_failure(&KeyError::Denied, kmsd),
        Error::KeyUnavailable => key_failure(
            &KeyError::Unreachable("the mount cannot reach it".to_owned()),
            kmsd,
        ),
        other => other.to_string(),
    }
}

/// Why the name of a key domain is not removed.
pub(super) fn refusal_of_removal(error: &Error) -> Failure {
    match error {
        Error::Posix(libc::EBUSY) => {
            "its key is not destroyed, or not known to be: empty it, and remove it with rmdir".to_owned()
        }
        Error::Posix(libc::EINVAL) => "it is under no key of its own".to_owned(),
        other => other.to_string(),
    }
}
