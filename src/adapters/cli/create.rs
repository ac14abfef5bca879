//! `cmkfs create`

use super::key_arn;
use super::{CreateArguments, Failure, key_failure, uuid_text};
use crate::adapters::kms::{Holder, SessionKeys};
use crate::engine::{CreateParams, Error, KeyError, Options, Volume};
use std::path::Path;

pub(super) fn run(arguments: &CreateArguments, socket: &Path) -> Result<(), Failure> {
    let dir = std::path::absolute(&arguments.volume)
        .map_err(|error| format!("volume {}: {error}", arguments.volume.display()))?;
    refuse_occupied(&dir)?;
    let arn = key_arn(&arguments.key_id, socket)?;
    let uuid = uuid::Uuid::new_v4().into_bytes();
    let holder = Holder {
        socket: socket.to_path_buf(),
        volume: uuid,
        location: dir.clone(),
        drain_max: Options::default().drain_max,
    };
    let keys = SessionKeys::open(holder, &arn).map_err(|error| key_failure(&error, socket))?;
    let params = CreateParams {
        cmk_arn: arn.clone(),
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
    };
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Volume::create(&dir, &params, &keys, uuid).map_err(|error| match error {
        Error::KeyRevoked => key_failure(&KeyError::Revoked, socket),
        Error::Posix(libc::ENOTEMPTY) => occupied(&dir),
        other => format!("{}: {other}", dir.display()),
    })?;
    println!(
        "created volume {} in {} under {}",
        uuid_text(uuid),
        dir.display(),
        arn
    );
    Ok(())
}

fn refuse_occupied(dir: &Path) -> Result<(), Failure> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().map_or(Ok(()), |_| Err(occupied(dir))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("volume {}: {error}", dir.display())),
    }
}

fn occupied(dir: &Path) -> Failure {
    format!(
        "{} is not empty: a volume is made in an empty or new directory",
        dir.display()
    )
}
