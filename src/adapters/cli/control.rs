//! The control socket, VOLUME/control: does what whoever may open it asks for in one line, and answers with the state of the
//! mount, as one JSON line.

use super::Failure;
use super::domain_document;
use crate::engine::{Ino, KeyState, Superblock, Volume};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

const NAME: &str = "control";
/// Longest wait for the other side.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait when the host has no descriptor for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest wait for an answer: going dark takes as long as storing what was written.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 16 << 20;
/// Longest question that is read, in bytes.
const QUESTION_MAX: u64 = 4096;

/// What a mount can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Question {
    /// Its state.
    Status,
    /// To go dark, and stay so.
    Revoke,
    /// To take that back.
    Resume,
    /// To put an empty directory under a CMK, given by its ARN.
    SetKey(Name, String),
    /// To remove the name of an erased key domain.
    RemoveKey(Name),
}

/// A directory entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    /// The inode number of the directory.
    pub(super) parent: u64,
    pub(super) name: Vec<u8>,
}

impl Question {
    fn line(&self) -> String {
        match self {
            Self::Status => "status\n".to_owned(),
            Self::Revoke => "revoke\n".to_owned(),
            Self::Resume => "resume\n".to_owned(),
            Self::SetKey(name, arn) => format!("setkey {} {arn}\n", name.words()),
            Self::RemoveKey(name) => format!("rmkey {}\n", name.words()),
        }
    }

    fn of(line: &str) -> Option<Self> {
        let mut words = line.strip_suffix('\n')?.split(' ');
        let question = match words.next()? {
            "status" => Self::Status,
            "revoke" => Self::Revoke,
            "resume" => Self::Resume,
            "setkey" => Self::SetKey(Name::of(&mut words)?, words.next()?.to_owned()),
            "rmkey" => Self::RemoveKey(Name::of(&mut words)?),
            _ => return None,
        };
        words.next().is_none().then_some(question)
    }
}

impl Name {
    /// The name, which may hold any byte, in hexadecimal digits.
    fn words(&self) -> String {
        let digits: String = self.name.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{} {digits}", self.parent)
    }

    fn of<'w>(words: &mut impl Iterator<Item = &'w str>) -> Option<Self> {
        let parent = words.next()?.parse().ok()?;
        let digits = words.next()?.as_bytes();
        let bytes = digits.chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair).ok()?;
            let is_digits = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            is_digits.then(|| u8::from_str_radix(pair, 16).ok())?
        });
        Some(Self {
            parent,
            name: bytes.collect::<Option<_>>()?,
        })
    }
}

/// Answers until it is dropped; then the socket is removed, and nothing here refers to the volume any more.
pub(super) struct Control {
    path: PathBuf,
    listener: UnixListener,
    is_stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.is_stopping.store(true, Ordering::Release);
        // Wakes the thread that waits in accept(2).
        if let Err(error) = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both) {
            tracing::warn!(%error, "the control socket stays open");
        } else if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the control socket panicked");
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, "the control socket stays behind");
        }
    }
}

/// Starts answering. The caller holds the volume's lock, so that a socket which is there is stale.
pub(super) fn start(
    volume: Weak<Volume>,
    dir: &Path,
    mountpoint: &Path,
    superblock: &Superblock,
    kmsd: &Path,
) -> Result<Control, Failure> {
    let failed = |error: std::io::Error| format!("control socket in {}: {error}", dir.display());
    let path = dir.join(NAME);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = through_directory(dir, |short| UnixListener::bind(short)).map_err(failed)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let mountpoint = mountpoint.to_owned();
    let facts = facts(dir, superblock);
    let kmsd = kmsd.to_owned();
    let is_stopping = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&is_stopping);
    let heard = listener.try_clone().map_err(failed)?;
    let answer = move || {
        let (volume, mountpoint, facts, kmsd) = (&volume, &mountpoint, &facts, &kmsd);
        // Ends when each has been answered.
        std::thread::scope(|scope| {
            for stream in heard.incoming() {
                if is_over.load(Ordering::Acquire) {
                    return;
                }
                let Some(volume) = volume.upgrade() else { return };
                let stream = match stream {
                    Ok(stream) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "a question for the status could not be heard");
                        std::thread::sleep(ACCEPT_PAUSE);
                        continue;
                    }
                };
                // Going dark waits for no answer that another waits for from kmsd.
                let answer = move || answer_one(&volume, stream, mountpoint, facts, kmsd);
                if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, answer) {
                    tracing::warn!(%error, "no thread to answer a question with");
                }
            }
        });
    };
    let thread = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(answer)
        .map_err(failed)?;
    Ok(Control {
        path,
        listener,
        is_stopping,
        thread: Some(thread),
    })
}

fn answer_one(volume: &Volume, mut stream: UnixStream, mountpoint: &Path, facts: &Value, kmsd: &Path) {
    let answered = hear(&stream).and_then(|question| {
        let answer = match serve(volume, &question, kmsd) {
            Ok(()) => state(volume, mountpoint, facts.clone()),
            Err(why) => json!({ "refused": why }),
        };
        stream.write_all(format!("{answer}\n").as_bytes())
    });
    if let Err(error) = answered {
        tracing::debug!(%error, "a question to the mount was not heard out");
    }
}

/// Does what is asked for; says why not.
fn serve(volume: &Volume, question: &Question, kmsd: &Path) -> Result<(), Failure> {
    match question {
        Question::Status => Ok(()),
        Question::Revoke => {
            volume.revoke_by_hand(true);
            Ok(())
        }
        Question::Resume => {
            volume.revoke_by_hand(false);
            Ok(())
        }
        Question::SetKey(Name { parent, name }, arn) => volume
            .set_key(Ino(*parent), name, arn)
            .map(|_| ())
            .map_err(|error| super::setkey::refusal(&error, kmsd)),
        Question::RemoveKey(Name { parent, name }) => volume
            .remove_erased(Ino(*parent), name)
            .map_err(|error| super::setkey::refusal_of_removal(&error)),
    }
}

fn hear(stream: &UnixStream) -> std::io::Result<Question> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.take(QUESTION_MAX)).read_line(&mut line)?;
    Question::of(&line).ok_or_else(|| std::io::Error::other("it is no question of this version"))
}

/// Asks the mount of the volume in `dir`; `None` if it is not mounted.
///
/// # Errors
/// Why it does not answer, or does not do it.
pub(super) fn ask(dir: &Path, question: &Question) -> Result<Option<Value>, Failure> {
    let failed = |error: std::io::Error| format!("control socket in {}: {error}", dir.display());
    let mut stream = match through_directory(dir, |short| UnixStream::connect(short)) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        other => other.map_err(failed)?,
    };
    stream.set_write_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    stream.write_all(question.line().as_bytes()).map_err(failed)?;
    let mut line = String::new();
    stream
        .take(ANSWER_MAX)
        .read_to_string(&mut line)
        .map_err(failed)?;
    let answer: Value =
        serde_json::from_str(&line).map_err(|error| format!("the mount's answer is no JSON: {error}"))?;
    match answer.get("refused").and_then(Value::as_str) {
        Some(why) => Err(why.to_owned()),
        None => Ok(Some(answer)),
    }
}

/// A socket's path has 107 bytes at most (unix(7)), a directory's has not: it is named by its descriptor.
fn through_directory<T>(dir: &Path, act: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let dir = std::fs::File::open(dir)?;
    act(&PathBuf::from(format!(
        "/proc/self/fd/{}/{NAME}",
        dir.as_raw_fd()
    )))
}

/// What a superblock says.
pub(super) fn facts(dir: &Path, superblock: &Superblock) -> Value {
    json!({
        "volume": dir.to_string_lossy(),
        "uuid": super::uuid_text(superblock.volume()),
        "cmk_arn": superblock.cmk_arn(),
        "format_version": superblock.version(),
        "mounted": false,
    })
}

fn state(volume: &Volume, mountpoint: &Path, mut facts: Value) -> Value {
    let status = volume.status();
    let state = json!({
        "mounted": true,
        "mountpoint": mountpoint.to_string_lossy(),
        "pid": std::process::id(),
        "key_state": key_state(status.key_state),
        "inodes": status.inodes,
        "data_bytes": status.blocks.saturating_mul(4096),
        "commit_seq": status.commit_seq,
        "durable_seq": status.durable_seq,
        "pending_bytes": status.pending_bytes,
        "active_files": status.active_files,
        "cached_deks": status.cached_deks,
        "kms_calls": status.kms_calls,
        "unswept": status.is_unswept,
        "failed": status.failed,
        "domains": volume.domains().iter().map(domain_document).collect::<Vec<_>>(),
    });
    if let (Some(all), Value::Object(more)) = (facts.as_object_mut(), state) {
        all.extend(more);
    }
    facts
}

pub(super) fn key_state(state: KeyState) -> &'static str {
    match state {
        KeyState::Live => "live",
        KeyState::Draining => "draining",
        KeyState::Revoked => "revoked",
        KeyState::Erased => "erased",
        KeyState::Denied => "denied",
        KeyState::Unreachable => "unreachable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_heard_as_they_were_asked_and_nothing_else_is() {
        let name = || Name {
            parent: 7,
            name: b" \xff\n".to_vec(),
        };
        let questions = [
            Question::Status,
            Question::Revoke,
            Question::Resume,
            Question::SetKey(name(), "acs:kms:local:1:key/x".to_owned()),
            Question::RemoveKey(name()),
        ];
        for question in questions {
            let line = question.line();
            assert!(line.len() < QUESTION_MAX as usize);
            assert_eq!(Question::of(&line), Some(question));
            assert_eq!(Question::of(line.trim_end()), None);
            assert_eq!(Question::of(&line.replace('\n', " more\n")), None);
        }
        for line in ["setkey 7 fff arn\n", "rmkey x ff\n", "rmkey 7 +f\n", "\n"] {
            assert_eq!(Question::of(line), None, "{line}");
        }
    }
}
