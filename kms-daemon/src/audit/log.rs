//! The log as the daemon writes it: one thread gathers what is queued, writes it, syncs it, then wakes the callers.

use crate::home::{HomeError, sync_parent};
use crate::rows::CheckpointRow;
use kms_audit::frame::{self, HEADER_LEN};
use kms_audit::{Digest, Problem, SUCCESS};
use parking_lot::{Condvar, Mutex};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use uuid::Uuid;

/// Space that must be there, in bytes, before a change is made that has to be recorded: more than its record takes.
const ROOM_BYTES: u64 = 64 << 10;

/// Why the log cannot be used, or a record was not made durable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The file could not be opened or made.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Its header is not that of this keystore's log.
    #[error("{0} is not the audit log of this keystore")]
    Foreign(PathBuf),
    /// It ends before, or differs from, what the keystore knows was written.
    #[error(
        "{path} lacks records that were durable: the keystore knows of {records}; it was cut, replaced or rewritten. \
         Put the true log back, and check it with 'kmsctl audit verify'"
    )]
    Cut {
        /// The log.
        path: PathBuf,
        /// How many records there must be at least.
        records: u64,
    },
    /// A record is bad.
    #[error("{path}, record {record} at offset {offset}: {problem}")]
    Bad {
        /// The log.
        path: PathBuf,
        /// Its number, from 1.
        record: u64,
        /// Where it begins.
        offset: u64,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A write or sync failed, or the file was taken away: the record is not durable.
    #[error("the audit log cannot be written: {0}")]
    NotDurable(String),
}

/// The open log. Dropping it ends the writer, after what is queued was written.
pub struct Audit {
    queue: Arc<Queue>,
    writer: Option<JoinHandle<()>>,
}

struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
}

struct State {
    waiting: Vec<Entry>,
    durable: CheckpointRow,
    stopping: bool,
}

struct Entry {
    /// `None` asks only whether a record could be written.
    body: Option<Vec<u8>>,
    done: mpsc::SyncSender<Result<(), String>>,
}

/// What storage writes as a whole, in bytes.
const SECTOR: usize = 512;
/// A sector, or the part of one behind the last good frame, with at least so many zeros and nothing else was never written.
const ZEROS_MIN: usize = 64;
/// Bytes of a frame besides its record: the length and two digests.
const FRAME_OVERHEAD: usize = 4 + 32 + 32;
/// So much behind the last good frame is looked at: more than what is written at once.
const TORN_BYTES_MAX: u64 = 64 << 20;

/// What a start learns from the part of the log that the checkpoint does not cover.
#[derive(Debug, Default)]
pub struct Tail {
    /// The ids of the requests that succeeded. A call whose change was stored but not acknowledged is in the log as a
    /// failure, under the same id as its pending record.
    pub succeeded: HashSet<Vec<u8>>,
    /// The highest revision of the manifest that any record names.
    pub revision: u64,
}

impl Audit {
    /// Writes an empty log, durable when this returns, and gives the checkpoint of it.
    ///
    /// # Errors
    /// [`AuditError::Home`]
    pub fn create(path: &Path, keystore_id: Uuid) -> Result<CheckpointRow, AuditError> {
        let header = frame::header(keystore_id);
        crate::home::write_new(path, &header)?;
        Ok(CheckpointRow {
            records: 0,
            head: frame::genesis(&header).to_vec(),
            offset: HEADER_LEN as u64,
        })
    }

    /// Opens the log, checks it from `checkpoint` on, and cuts off what a crash left incomplete at its end.
    ///
    /// # Errors
    /// [`AuditError`] if anything else is wrong with it.
    pub fn open(
        path: &Path,
        keystore_id: Uuid,
        checkpoint: &CheckpointRow,
    ) -> Result<(Self, Tail), AuditError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(HomeError::io(path))?;
        let (durable, tail) = check_tail(&file, path, keystore_id, checkpoint)?;
        let length = file.metadata().map_err(HomeError::io(path))?.len();
        if length > durable.offset {
            tracing::warn!(
                records = durable.records,
                bytes = length - durable.offset,
                "cut off an incomplete end of the audit log, whose calls were never answered"
            );
            file.set_len(durable.offset).map_err(HomeError::io(path))?;
        }
        // What a killed daemon wrote may lie in the page cache alone. From here on it counts as durable: pending records
        // go because it is there, and checkpoints cover it.
        file.sync_all().map_err(HomeError::io(path))?;
        sync_parent(path)?;
        let queue = Arc::new(Queue {
            state: Mutex::new(State {
                waiting: Vec::new(),
                durable: durable.clone(),
                stopping: false,
            }),
            arrived: Condvar::new(),
        });
        let writer = Writer {
            file,
            path: path.to_owned(),
            durable,
            room_until: 0,
            broken: None,
        };
        let shared = Arc::clone(&queue);
        let thread = std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&shared))
            .map_err(HomeError::io(path))?;
        let audit = Self {
            queue,
            writer: Some(thread),
        };
        Ok((audit, tail))
    }

    /// Appends an encoded record, and returns when it is on the disk.
    ///
    /// # Errors
    /// [`AuditError::NotDurable`]: the record is not in the log.
    pub fn append(&self, body: Vec<u8>) -> Result<(), AuditError> {
        self.submit(Some(body))
    }

    /// Whether a record could be written now: takes room for it from the host.
    ///
    /// # Errors
    /// [`AuditError::NotDurable`] with the reason why not.
    pub fn probe(&self) -> Result<(), AuditError> {
        self.submit(None)
    }

    fn submit(&self, body: Option<Vec<u8>>) -> Result<(), AuditError> {
        let (done, durable) = mpsc::sync_channel(1);
        {
            let mut state = self.queue.state.lock();
            if state.stopping {
                return Err(AuditError::NotDurable("the daemon is stopping".to_owned()));
            }
            state.waiting.push(Entry { body, done });
        }
        self.queue.arrived.notify_one();
        durable
            .recv()
            .map_err(|_| AuditError::NotDurable("its writer has ended".to_owned()))?
            .map_err(AuditError::NotDurable)
    }

    /// How far the log reaches, durably.
    #[must_use]
    pub fn durable(&self) -> CheckpointRow {
        self.queue.state.lock().durable.clone()
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.queue.state.lock().stopping = true;
        self.queue.arrived.notify_one();
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has told its callers already, by hanging up.
            let _ = writer.join();
        }
    }
}

struct Writer {
    file: File,
    path: PathBuf,
    durable: CheckpointRow,
    /// The host has given space up to this offset.
    room_until: u64,
    /// After a failed sync nobody knows what is on the disk (the kernel may have dropped the pages), so nothing more
    /// is written until a start has looked.
    broken: Option<String>,
}

/// However the writer ends, nobody waits for it afterwards.
struct HangUp<'q>(&'q Queue);

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.stopping = true;
        // Their senders go with them, and so their callers are told.
        state.waiting.clear();
    }
}

impl Writer {
    fn run(mut self, queue: &Queue) {
        let _hang_up = HangUp(queue);
        loop {
            let mut entries = {
                let mut state = queue.state.lock();
                while state.waiting.is_empty() && !state.stopping {
                    queue.arrived.wait(&mut state);
                }
                std::mem::take(&mut state.waiting)
            };
            if entries.is_empty() {
                return;
            }
            let outcome = self.write(&mut entries);
            if let Err(error) = &outcome {
                tracing::error!(%error, "audit records could not be made durable");
            }
            queue.state.lock().durable = self.durable.clone();
            let room = match entries.iter().any(|entry| entry.body.is_none()) {
                true => outcome.clone().and_then(|()| self.make_room()),
                false => Ok(()),
            };
            for entry in entries {
                let outcome = if entry.body.is_some() { &outcome } else { &room };
                // Every caller waits for its answer.
                let _ = entry.done.send(outcome.clone());
            }
        }
    }

    /// Writes and syncs every entry; all are durable, or none is in the log. An entry that is too long is refused by
    /// itself, and taken out.
    fn write(&mut self, entries: &mut Vec<Entry>) -> Result<(), String> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        self.check_file()?;
        let mut next = self.durable.clone();
        let mut bytes = Vec::new();
        entries.retain(|entry| {
            let Some(body) = &entry.body else { return true };
            let previous = digest_of(&next);
            match frame::push(&mut bytes, &previous, body) {
                Ok(digest) => {
                    next.head = digest.to_vec();
                    next.records += 1;
                    true
                }
                Err(problem) => {
                    // As above.
                    let _ = entry.done.send(Err(problem.to_string()));
                    false
                }
            }
        });
        if bytes.is_empty() {
            return Ok(());
        }
        next.offset = self.durable.offset + bytes.len() as u64;
        if let Err(error) = self.file.write_all_at(&bytes, self.durable.offset) {
            // Nothing of it may stay: the callers are told that their calls were not recorded.
            self.room_until = 0;
            if let Err(error) = self.file.set_len(self.durable.offset) {
                self.broken = Some(format!("a torn write could not be undone: {error}"));
            }
            return Err(error.to_string());
        }
        if let Err(error) = self.file.sync_data() {
            let reason = format!("a sync failed: {error}");
            self.broken = Some(reason.clone());
            return Err(reason);
        }
        self.durable = next;
        Ok(())
    }

    /// Takes space behind the log's end, so that the record of a change which is made now finds room.
    fn make_room(&mut self) -> Result<(), String> {
        if self.durable.offset + ROOM_BYTES <= self.room_until {
            return Ok(());
        }
        let keep_size = rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, keep_size, self.durable.offset, 2 * ROOM_BYTES) {
            // Where the host cannot promise space, the write itself will tell.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {
                self.room_until = self.durable.offset + 2 * ROOM_BYTES;
                Ok(())
            }
            Err(errno) => Err(format!("there is no room for a record: {errno}")),
        }
    }

    /// The log must still be the file of that name, and as long as it was left.
    fn check_file(&self) -> Result<(), String> {
        let open = self.file.metadata().map_err(|error| error.to_string())?;
        let named = std::fs::symlink_metadata(&self.path).map_err(|error| error.to_string())?;
        if (open.dev(), open.ino()) != (named.dev(), named.ino()) {
            return Err("the file was replaced".to_owned());
        }
        if open.len() != self.durable.offset {
            return Err("the file was cut or written to by another".to_owned());
        }
        Ok(())
    }
}

fn digest_of(checkpoint: &CheckpointRow) -> Digest {
    // Heads are made by this module alone, 32 bytes each; another length would break the chain, visibly.
    checkpoint.head.as_slice().try_into().unwrap_or_default()
}

/// Whether what lies behind `offset` was being written when power failed: the file may be as long as it was to become, and lack
/// pages, which read as zeros: pages of the frame there, or of whatever follows if its length is among what lacks. Whoever cuts the
/// log at that place achieves as much.
fn is_torn(file: &File, offset: u64) -> std::io::Result<bool> {
    let mut reader = file;
    reader.seek(SeekFrom::Start(offset))?;
    let mut rest = Vec::new();
    reader.take(TORN_BYTES_MAX).read_to_end(&mut rest)?;
    let length = rest.first_chunk().map_or(0, |length| u32::from_be_bytes(*length));
    if length > 0 {
        rest.truncate((length as usize).saturating_add(FRAME_OVERHEAD));
    }
    let first = SECTOR - usize::try_from(offset).unwrap_or(0) % SECTOR;
    let (head, sectors) = rest.split_at_checked(first).unwrap_or((&rest, &[]));
    let mut sectors = std::iter::once(head).chain(sectors.chunks(SECTOR));
    Ok(sectors.any(|sector| sector.len() >= ZEROS_MIN && sector.iter().all(|byte| *byte == 0)))
}

fn check_tail(
    file: &File,
    path: &Path,
    keystore_id: Uuid,
    checkpoint: &CheckpointRow,
) -> Result<(CheckpointRow, Tail), AuditError> {
    let io = |error| AuditError::Home(HomeError::io(path)(error));
    let cut = || AuditError::Cut {
        path: path.to_owned(),
        records: checkpoint.records,
    };
    let mut reader = BufReader::new(file);
    let mut header = [0; HEADER_LEN];
    reader
        .read_exact(&mut header)
        .map_err(|_| AuditError::Foreign(path.to_owned()))?;
    if header != frame::header(keystore_id) {
        return Err(AuditError::Foreign(path.to_owned()));
    }
    if file.metadata().map_err(io)?.len() < checkpoint.offset {
        return Err(cut());
    }
    // The frame at the checkpoint ends in its digest, which is the head.
    if checkpoint.records > 0 {
        let at = checkpoint.offset.checked_sub(32).ok_or_else(cut)?;
        let mut head = [0; 32];
        file.read_exact_at(&mut head, at).map_err(io)?;
        if head != digest_of(checkpoint) {
            return Err(cut());
        }
    }
    let mut durable = checkpoint.clone();
    let mut tail = Tail::default();
    reader.seek(SeekFrom::Start(checkpoint.offset)).map_err(io)?;
    loop {
        let frame = match frame::read(&mut reader, &digest_of(&durable)).map_err(io)? {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(Problem::Incomplete) => return Ok((durable, tail)),
            // Its call was never answered: what was answered for was synced before.
            Err(_) if is_torn(file, durable.offset).map_err(io)? => return Ok((durable, tail)),
            Err(problem) => {
                return Err(AuditError::Bad {
                    path: path.to_owned(),
                    record: durable.records + 1,
                    offset: durable.offset,
                    problem,
                });
            }
        };
        durable.offset += frame.bytes.len() as u64;
        durable.records += 1;
        durable.head = frame.digest.to_vec();
        tail.revision = tail.revision.max(frame.record.revision);
        if frame.record.code == SUCCESS {
            tail.succeeded.insert(frame.record.request_id);
        }
    }
}
