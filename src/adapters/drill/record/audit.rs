//! What kmsd's audit log has of the key. The log is read up to the record that kmsd answered as its last.

use super::super::document::{Check, Outcome};
use super::super::facts::time;
use super::super::verify::{list, number, string};
use super::check;
use kms_audit::frame::{self, Frame, HEADER_LEN};
use kms_audit::{Record, SUCCESS, VerifyError};
use kms_client::proto::{GetKeystoreInfoResponse, KeyMetadata};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

/// Calls that change what a key may do. The others are quoted nowhere.
const LIFE: [&str; 11] = [
    "CreateKey",
    "EnableKey",
    "DisableKey",
    SCHEDULED,
    CANCELLED,
    "ExtendKeyDeletion",
    IMPORTED,
    "DeleteKeyMaterial",
    "ExpireKeyMaterial",
    BEGUN,
    GONE,
];
/// Calls that use a key, or were asked to; a batch is named as its item with `Batch` before it.
const USES: [&str; 7] = [
    "Encrypt",
    "Decrypt",
    "ReEncrypt",
    "GenerateDataKey",
    "GenerateDataKeyWithoutPlaintext",
    "IssueDataKeys",
    "OpenDataKeys",
];
const SCHEDULED: &str = "ScheduleKeyDeletion";
const CANCELLED: &str = "CancelKeyDeletion";
const IMPORTED: &str = "ImportKeyMaterial";
const BEGUN: &str = "BeginKeyDestruction";
const GONE: &str = "DestroyKeyMaterial";
/// Records that are quoted: each may be some MiB long.
const QUOTED_MAX: usize = 16;
/// Between the time that kmsd keeps of a change and that of its record: the key store may be opened anew between the two.
const EVENT_TOLERANCE_MS: u64 = 60_000;

/// One record of the log, as it is quoted.
struct Entry {
    number: u64,
    frame: Frame,
}

impl Entry {
    /// The frame itself is there, so that its digest can be computed anew.
    fn value(&self) -> Value {
        let record = &self.frame.record;
        json!({
            "number": self.number,
            "time": time(record.time_ms),
            "operation": record.operation,
            "code": record.code,
            "uid": record.uid,
            "request_id": hex::encode(&record.request_id),
            "previous_sha256": hex::encode(self.frame.previous),
            "sha256": hex::encode(self.frame.digest),
            "frame": hex::encode(&self.frame.bytes),
        })
    }

    /// Takes a quotation for true if everything in it follows from the frame, and that is about the key.
    fn of(value: &Value, arn: &str) -> Result<Self, String> {
        let number = value.get("number").and_then(Value::as_u64).unwrap_or_default();
        let wrong = |why: &str| format!("the audit record {number} that it quotes {why}");
        let bytes = value.get("frame").and_then(Value::as_str);
        let bytes = bytes.and_then(|digits| hex::decode(digits).ok());
        let bytes = bytes.ok_or_else(|| wrong("has no bytes"))?;
        let frame = frame::parse(&bytes).map_err(|problem| wrong(&problem.to_string()))?;
        let entry = Self { number, frame };
        if entry.value() != *value {
            return Err(wrong("does not say what is quoted"));
        }
        if !names(&entry.frame.record, arn) {
            return Err(wrong("is about another key"));
        }
        match LIFE.contains(&entry.frame.record.operation.as_str()) {
            true => Ok(entry),
            false => Err(wrong("changes nothing of a key")),
        }
    }

    fn has_succeeded(&self) -> bool {
        self.frame.record.code == SUCCESS
    }

    /// Whether the one after this one can follow it.
    fn precedes(&self, next: &Self) -> bool {
        self.number < next.number
            && (self.number + 1 < next.number || next.frame.previous == self.frame.digest)
    }
}

fn names(record: &Record, arn: &str) -> bool {
    record.items.iter().any(|item| item.key_arn == arn)
}

/// Whether anything was done under the key: a batch may have refused one item and carried out the next.
fn has_used(record: &Record, arn: &str) -> bool {
    let operation = record.operation.as_str();
    let is_use = USES.contains(&operation.strip_prefix("Batch").unwrap_or(operation));
    let mut items = record.items.iter().filter(|item| item.key_arn == arn);
    is_use
        && items.any(|item| match item.code.is_empty() {
            true => record.code == SUCCESS,
            false => item.code == SUCCESS,
        })
}

/// What comes later may take back what is there.
fn not_whole() -> (Outcome, String) {
    let why = "this is not the whole log that kmsd answers for";
    (Outcome::NotTested, why.to_owned())
}

/// Something that happened to the key.
#[derive(Clone, Copy)]
struct Event {
    number: u64,
    time_ms: i64,
}

impl Event {
    fn is_at(self, ms: i64) -> bool {
        self.time_ms.abs_diff(ms) <= EVENT_TOLERANCE_MS
    }

    fn text(self) -> String {
        format!("record {}, of {}", self.number, time(self.time_ms))
    }
}

/// What the calls that succeeded come to: what was taken back does not count.
#[derive(Default)]
struct Course {
    /// The call that scheduled the deletion, unless it was cancelled.
    scheduled: Option<Event>,
    imported: Option<u64>,
    /// The last intent.
    begun: Option<u64>,
    /// The first end of the material since it was imported last.
    gone: Option<Event>,
    /// The last: the key's own, where its material had gone before.
    ended: Option<Event>,
}

impl Course {
    fn take(&mut self, entry: &Entry) {
        let event = Event {
            number: entry.number,
            time_ms: entry.frame.record.time_ms,
        };
        if !entry.has_succeeded() {
            return;
        }
        match entry.frame.record.operation.as_str() {
            SCHEDULED => self.scheduled = Some(event),
            CANCELLED => self.scheduled = None,
            IMPORTED => {
                self.imported = Some(event.number);
                (self.gone, self.ended) = (None, None);
            }
            BEGUN => self.begun = Some(event.number),
            GONE => {
                self.gone = self.gone.or(Some(event));
                self.ended = Some(event);
            }
            _ => {}
        }
    }

    /// The records that this rests on.
    fn has(&self, number: u64) -> bool {
        let events = [self.scheduled, self.gone, self.ended].map(|event| event.map(|event| event.number));
        let all = [self.imported, self.begun].into_iter().chain(events);
        all.flatten().any(|one| one == number)
    }
}

/// What was read.
pub(super) struct Log {
    file: String,
    /// As many as kmsd says there are, and the head that it answers.
    expected: u64,
    expected_head: String,
    records: u64,
    head: String,
    /// What is wrong with the record after those.
    problem: Option<String>,
    quoted: BTreeMap<u64, Entry>,
    not_quoted: u64,
    course: Course,
    /// The first call after the material had gone that was carried out under the key.
    used: Option<u64>,
}

impl Log {
    fn new(file: String, keystore: &GetKeystoreInfoResponse, head: String) -> Self {
        Self {
            file,
            expected: keystore.audit_records,
            expected_head: hex::encode(&keystore.audit_head),
            records: 0,
            head,
            problem: None,
            quoted: BTreeMap::new(),
            not_quoted: 0,
            course: Course::default(),
            used: None,
        }
    }

    /// Reads the log up to where kmsd said that it ends.
    ///
    /// # Errors
    /// It cannot be read, or is another keystore's.
    pub(super) fn read(path: &Path, keystore: &GetKeystoreInfoResponse, arn: &str) -> Result<Self, String> {
        let named = |error: &dyn std::fmt::Display| format!("audit log {}: {error}", path.display());
        let mut header = [0; HEADER_LEN];
        File::open(path)
            .and_then(|mut file| file.read_exact(&mut header))
            .map_err(|error| named(&error))?;
        let of = frame::keystore_of(&header).ok_or_else(|| named(&"it is none"))?;
        if of.to_string() != keystore.keystore_id {
            return Err(named(&format!(
                "it is that of the keystore {of}, and not of {}",
                keystore.keystore_id
            )));
        }
        let head = hex::encode(frame::genesis(&header));
        let mut log = Self::new(path.to_string_lossy().into_owned(), keystore, head);
        let walked = kms_audit::walk(path, |number, frame| {
            // kmsd may have written more since.
            if number <= keystore.audit_records {
                log.take(number, frame, arn);
            }
            match number < keystore.audit_records {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        match walked {
            Ok(_) => {}
            Err(error @ VerifyError::Bad { .. }) => log.problem = Some(error.to_string()),
            Err(error) => return Err(named(&error)),
        }
        Ok(log)
    }

    fn take(&mut self, number: u64, frame: &Frame, arn: &str) {
        self.records = number;
        self.head = hex::encode(frame.digest);
        let record = &frame.record;
        if !names(record, arn) {
            return;
        }
        if self.course.gone.is_some() && has_used(record, arn) {
            self.used = self.used.or(Some(number));
        }
        if LIFE.contains(&record.operation.as_str()) {
            self.quote(Entry {
                number,
                frame: frame.clone(),
            });
            // What was done under material that came back is no use of what had gone.
            self.used = self.used.filter(|_| self.course.gone.is_some());
        }
        if self.quoted.len() > QUOTED_MAX {
            self.leave_one_out();
        }
    }

    fn quote(&mut self, entry: Entry) {
        self.course.take(&entry);
        self.quoted.insert(entry.number, entry);
    }

    /// Refusals go first, which anybody may cause; nothing that a check rests on goes ever.
    fn leave_one_out(&mut self) {
        let (quoted, course) = (&self.quoted, &self.course);
        let spare = || {
            let each = quoted.values();
            each.filter(move |entry| !course.has(entry.number))
        };
        let oldest = spare()
            .find(|entry| !entry.has_succeeded())
            .or_else(|| spare().next());
        if let Some(number) = oldest.map(|entry| entry.number) {
            self.quoted.remove(&number);
            self.not_quoted += 1;
        }
    }

    /// What a record says of it.
    pub(super) fn value(log: Option<&Self>) -> Value {
        let Some(log) = log else {
            return json!({ "read": false, "quoted": [] });
        };
        json!({
            "read": true,
            "file": log.file,
            "records": log.records,
            "head": log.head,
            "problem": log.problem,
            "quoted": log.quoted.values().map(Entry::value).collect::<Value>(),
            "not_quoted": log.not_quoted,
            "used_by": log.used,
        })
    }

    /// The log as a record has it, if what is quoted are records of such a log.
    ///
    /// # Errors
    /// What is not so.
    pub(super) fn of(
        value: &Value,
        keystore: &GetKeystoreInfoResponse,
        arn: &str,
    ) -> Result<Option<Self>, String> {
        if value.get("read") == Some(&Value::Bool(false)) {
            return Ok(None);
        }
        let head = string(value, "head")?.to_owned();
        let mut log = Self::new(string(value, "file")?.to_owned(), keystore, head);
        log.records = number(value, "records")?;
        log.not_quoted = number(value, "not_quoted")?;
        log.problem = value.get("problem").and_then(Value::as_str).map(str::to_owned);
        log.used = value.get("used_by").and_then(Value::as_u64);
        for quoted in list(value, "quoted")? {
            let entry = Entry::of(quoted, arn)?;
            log.must_have(&entry, keystore)?;
            log.quote(entry);
        }
        let there_are = log.not_quoted.saturating_add(log.quoted.len() as u64);
        let is_use = |used| used <= log.records && log.course.gone.is_some_and(|gone| gone.number < used);
        if log.records > log.expected || there_are > log.records || !log.used.is_none_or(is_use) {
            return Err("the audit records that it counts cannot be".to_owned());
        }
        Ok(Some(log))
    }

    /// Whether an entry can follow those before it, in a log of so many records and with this head.
    fn must_have(&self, entry: &Entry, keystore: &GetKeystoreInfoResponse) -> Result<(), String> {
        let last = self.quoted.last_key_value();
        if last.is_some_and(|(_, last)| !last.precedes(entry)) {
            return Err("the audit records that it quotes do not follow each other".to_owned());
        }
        let wrong = |why: &str| Err(format!("the audit record {} that it quotes {why}", entry.number));
        if entry.number == 0 || entry.number > self.records {
            return wrong("is none of those that were read");
        }
        if entry.number == self.records && hex::encode(entry.frame.digest) != self.head {
            return wrong("is the last one, and not the head");
        }
        let genesis = uuid::Uuid::try_parse(&keystore.keystore_id)
            .map(|id| frame::genesis(&frame::header(id)))
            .map_err(|_| "its keystore has no id".to_owned())?;
        match entry.number == 1 && entry.frame.previous != genesis {
            true => wrong("is not the first of this keystore"),
            false => Ok(()),
        }
    }

    /// Whether the log has an import into the key.
    pub(super) fn has_import(&self) -> bool {
        self.course.imported.is_some()
    }

    /// When the key's material went, if that is in the log that kmsd answers for.
    pub(super) fn gone_ms(&self) -> Option<i64> {
        let gone = self.course.gone.filter(|_| self.is_whole());
        gone.map(|gone| gone.time_ms)
    }

    /// Whether this is all of it, and kmsd's.
    pub(super) fn is_whole(&self) -> bool {
        self.problem.is_none() && self.records == self.expected && self.head == self.expected_head
    }

    /// What was checked of it.
    pub(super) fn checks(log: Option<&Self>, key: &KeyMetadata) -> Vec<Check> {
        let judged = |id, claim: &str, seen: Option<(Outcome, String)>| {
            let not_read = || {
                let why = "the audit log was not named (--kms-home DIR, or --audit-log FILE)";
                (Outcome::NotTested, why.to_owned())
            };
            check(id, claim, seen.unwrap_or_else(not_read))
        };
        vec![
            judged(
                "audit-chain",
                "the audit log is whole, record by record, up to the head that kmsd answers",
                log.map(Self::chain),
            ),
            judged(
                "audit-scheduled",
                "the audit log has the call that scheduled the deletion, which nothing cancelled",
                log.map(|log| log.scheduled(key)),
            ),
            judged(
                "audit-gone",
                "the audit log has the end of the key's material, which was not imported again",
                log.map(|log| log.gone(key)),
            ),
            judged(
                "audit-unused",
                "by the audit log nothing was done under the key after that",
                log.map(Self::unused),
            ),
        ]
    }

    fn chain(&self) -> (Outcome, String) {
        if let Some(problem) = &self.problem {
            return (Outcome::Fail, problem.clone());
        }
        if self.records < self.expected {
            return (
                Outcome::NotTested,
                format!(
                    "this is the log up to record {}; kmsd has {}",
                    self.records, self.expected
                ),
            );
        }
        match self.is_whole() {
            true => (
                Outcome::Pass,
                format!("{} records, each with the hash of the one before", self.records),
            ),
            false => (
                Outcome::Fail,
                format!("its record {} is not the one that kmsd answers", self.records),
            ),
        }
    }

    fn scheduled(&self, key: &KeyMetadata) -> (Outcome, String) {
        let Some(event) = self.course.scheduled else {
            return self.missing(SCHEDULED);
        };
        let is_late = self.course.ended.is_some_and(|ended| ended.number < event.number);
        match key.deletion_request_date_ms {
            _ if !self.is_whole() => not_whole(),
            _ if is_late => (
                Outcome::Fail,
                format!("{SCHEDULED}: {}, which is after the end", event.text()),
            ),
            Some(ms) if !event.is_at(ms) => (
                Outcome::Fail,
                format!("{SCHEDULED}: {}; kmsd says {}", event.text(), time(ms)),
            ),
            _ => (Outcome::Pass, format!("{SCHEDULED}: {}", event.text())),
        }
    }

    fn gone(&self, key: &KeyMetadata) -> (Outcome, String) {
        let (Some(gone), Some(ended)) = (self.course.gone, self.course.ended) else {
            return self.missing(GONE);
        };
        let other = (ended.number != gone.number).then(|| format!(", and {}", ended.text()));
        let seen = format!("{GONE}: {}{}", gone.text(), other.unwrap_or_default());
        match key.destruction_date_ms {
            _ if !self.is_whole() => not_whole(),
            Some(ms) if !gone.is_at(ms) && !ended.is_at(ms) => {
                (Outcome::Fail, format!("{seen}; kmsd says {}", time(ms)))
            }
            _ => (Outcome::Pass, seen),
        }
    }

    fn missing(&self, operation: &str) -> (Outcome, String) {
        match self.is_whole() {
            true => (
                Outcome::Fail,
                format!("it has no {operation} of this key that holds"),
            ),
            false => not_whole(),
        }
    }

    fn unused(&self) -> (Outcome, String) {
        match (self.course.gone, self.used) {
            (_, Some(used)) => (
                Outcome::Fail,
                format!("record {used} is of a call that did something"),
            ),
            _ if !self.is_whole() => not_whole(),
            (None, None) => (
                Outcome::NotTested,
                "the log does not say when that was".to_owned(),
            ),
            (Some(gone), None) => (
                Outcome::Pass,
                format!("of the records {} to {}", gone.number + 1, self.records),
            ),
        }
    }

    /// Whether a log that somebody else kept has the very same of the key as this one, up to the same head.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn must_agree(&self, kept: &Self) -> Result<(), String> {
        if !kept.is_whole() {
            return Err(kept.chain().1);
        }
        let without_name = |log: &Self| {
            let mut value = Self::value(Some(log));
            if let Some(fields) = value.as_object_mut() {
                fields.remove("file");
            }
            value
        };
        match without_name(self) == without_name(kept) {
            true => Ok(()),
            false => Err("it has other records of the key than those that are quoted".to_owned()),
        }
    }
}
