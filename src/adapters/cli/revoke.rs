//! `cmkfs revoke`: a mount goes dark by the word of whoever mounted it, without kmsd.

use super::control::{self, Question};
use super::{Failure, RevokeArguments};
use crate::adapters::fuse;

pub(super) fn run(arguments: &RevokeArguments) -> Result<(), Failure> {
    let shown = arguments.mountpoint.display();
    let mount = fuse::find(&arguments.mountpoint)
        .map_err(|error| format!("mountinfo: {error}"))?
        .ok_or_else(|| {
            format!("no cmkfs volume is mounted on {shown}; 'cmkfs status' tells of a volume's directory")
        })?;
    let question = if arguments.undo {
        Question::Resume
    } else {
        Question::Revoke
    };
    let state = control::ask(&mount.volume, &question)?
        .ok_or_else(|| format!("the process that serves {shown} does not answer; end it, or unmount"))?;
    let is_dark = state.get("key_state").and_then(|state| state.as_str()) != Some("live");
    if is_dark || arguments.undo {
        Ok(())
    } else {
        Err(format!("{shown} is not dark"))
    }
}
