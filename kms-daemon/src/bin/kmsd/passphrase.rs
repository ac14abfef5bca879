//! Where a passphrase comes from: a file or the terminal, never the command line or the environment, which others can read.

use kms_daemon::{Passphrase, SlotError};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use zeroize::Zeroizing;

const TERMINAL: &str = "/dev/tty";

/// A passphrase that is chosen now: asked for twice at the terminal.
pub(crate) fn new(file: Option<&Path>) -> Result<Passphrase, SlotError> {
    let Some(file) = file else {
        let first = ask("Passphrase of the new root slot: ")?;
        let second = ask("The same again: ")?;
        if first != second {
            return Err(SlotError::Passphrase("the two passphrases differ".to_owned()));
        }
        return Passphrase::new(first);
    };
    Passphrase::read(file)
}

/// A passphrase that was chosen before.
pub(crate) fn known(file: Option<&Path>) -> Result<Passphrase, SlotError> {
    match file {
        Some(file) => Passphrase::read(file),
        None => Passphrase::new(ask("Passphrase of the root slot: ")?),
    }
}

/// One line from the terminal, which does not show it.
fn ask(prompt: &str) -> Result<Zeroizing<Vec<u8>>, SlotError> {
    read_hidden(prompt).map_err(|error| {
        SlotError::Passphrase(format!(
            "the root slot needs a passphrase, and there is no terminal to ask at ({error}): name a file with \
             --passphrase-file"
        ))
    })
}

fn read_hidden(prompt: &str) -> io::Result<Zeroizing<Vec<u8>>> {
    let terminal = File::options().read(true).write(true).open(TERMINAL)?;
    let hidden = Hidden::begin(&terminal)?;
    // Not before: what is typed ahead is thrown away, since the terminal has shown it.
    (&terminal).write_all(prompt.as_bytes())?;
    let mut line = Zeroizing::new(Vec::with_capacity(4096));
    // A terminal gives no line that is longer than 4096 bytes. The reader's own buffer is the smallest there is.
    BufReader::with_capacity(1, &terminal).read_until(b'\n', &mut line)?;
    drop(hidden);
    (&terminal).write_all(b"\n")?;
    Ok(line)
}

/// The terminal's echo is off until this is dropped.
struct Hidden<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> Hidden<'a> {
    fn begin(terminal: &'a File) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(terminal, OptionalActions::Flush, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        // Nothing more can be done for a terminal that refuses.
        let _ = tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}
