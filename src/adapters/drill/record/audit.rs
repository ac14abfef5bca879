//! What kmsd's audit log has of the key. The log is read up to the record that kmsd answered as its last.

use super::super::document::{Check, Outcome};
use super::super::facts::time;
use super::check;
use kms_audit::frame::{self, Frame, HEADER_LEN};
use kms_audit::{Item, Record, SUCCESS, VerifyError};
use kms_client::proto::GetKeystoreInfoResponse;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Calls that change what a key may do. The others are quoted nowhere.
const LIFE: [&str; 11] = [
    "CreateKey",
    "EnableKey",
    "DisableKey",
    SCHEDULED,
    "CancelKeyDeletion",
    "ExtendKeyDeletion",
    "ImportKeyMaterial",
    "DeleteKeyMaterial",
    "ExpireKeyMaterial",
    "BeginKeyDestruction",
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
pub(super) const SCHEDULED: &str = "ScheduleKeyDeletion";
pub(super) const GONE: &str = "DestroyKeyMaterial";
/// Records that are quoted, the last ones: each may be some MiB long.
const QUOTED_MAX: usize = 16;

/// One record of the log, as it is quoted.
pub(super) struct Entry {
    number: u64,
    frame: Frame,
}

impl Entry {
    /// The frame itself is there, so that its digest can be computed anew.
    pub(super) fn value(&self) -> Value {
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
    ///
    /// # Errors
    /// What does not.
    pub(super) fn of(value: &Value, arn: &str) -> Result<Self, String> {
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
        match item_of(&entry.frame.record, arn) {
            Some(_) => Ok(entry),
            None => Err(wrong("is about another key")),
        }
    }

    pub(super) fn is(&self, operation: &str) -> bool {
        self.frame.record.operation == operation && self.frame.record.code == SUCCESS
    }

    /// Whether the one after this one can follow it.
    pub(super) fn precedes(&self, next: &Self) -> bool {
        self.number < next.number
            && (self.number + 1 < next.number || next.frame.previous == self.frame.digest)
    }
}

fn item_of<'r>(record: &'r Record, arn: &str) -> Option<&'r Item> {
    record.items.iter().find(|item| item.key_arn == arn)
}

/// What was read.
pub(super) struct Log {
    path: PathBuf,
    /// As many as kmsd says there are.
    expected: u64,
    records: u64,
    head: String,
    /// What is wrong with the record after those.
    problem: Option<String>,
    quoted: VecDeque<Entry>,
    not_quoted: u64,
    scheduled: Option<u64>,
    gone: Option<u64>,
    /// The first call after that which was carried out under the key.
    used: Option<u64>,
}

impl Log {
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
                "it is that of the keystore {of}, and this kmsd has {}",
                keystore.keystore_id
            )));
        }
        let mut log = Self {
            path: path.to_owned(),
            expected: keystore.audit_records,
            records: 0,
            head: hex::encode(frame::genesis(&header)),
            problem: None,
            quoted: VecDeque::new(),
            not_quoted: 0,
            scheduled: None,
            gone: None,
            used: None,
        };
        let walked = kms_audit::walk(path, |number, frame| {
            log.take(number, frame, arn);
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
        let Some(item) = item_of(&frame.record, arn) else {
            return;
        };
        let operation = frame.record.operation.as_str();
        if LIFE.contains(&operation) {
            let entry = Entry {
                number,
                frame: frame.clone(),
            };
            if entry.is(SCHEDULED) {
                self.scheduled = Some(number);
            }
            if entry.is(GONE) {
                (self.gone, self.used) = (Some(number), None);
            }
            self.quoted.push_back(entry);
            if self.quoted.len() > QUOTED_MAX {
                self.quoted.pop_front();
                self.not_quoted += 1;
            }
        }
        let code = match item.code.is_empty() {
            true => &frame.record.code,
            false => &item.code,
        };
        let is_use = USES.contains(&operation.strip_prefix("Batch").unwrap_or(operation));
        if self.gone.is_some() && is_use && code == SUCCESS {
            self.used = self.used.or(Some(number));
        }
    }

    /// What a record says of it.
    pub(super) fn value(log: Option<&Self>) -> Value {
        let Some(log) = log else {
            return json!({ "read": false, "quoted": [] });
        };
        json!({
            "read": true,
            "file": log.path.to_string_lossy(),
            "records": log.records,
            "head": log.head,
            "quoted": log.quoted.iter().map(Entry::value).collect::<Value>(),
            "not_quoted": log.not_quoted,
        })
    }

    /// What was checked of it.
    pub(super) fn checks(log: Option<&Self>, keystore: &GetKeystoreInfoResponse) -> Vec<Check> {
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
                log.map(|log| log.chain(keystore)),
            ),
            judged(
                "audit-scheduled",
                "the audit log has the call that scheduled the deletion",
                log.map(|log| log.found(log.scheduled, SCHEDULED)),
            ),
            judged(
                "audit-gone",
                "the audit log has the end of the key's material",
                log.map(|log| log.found(log.gone, GONE)),
            ),
            judged(
                "audit-unused",
                "by the audit log nothing was done under the key after that",
                log.map(Self::unused),
            ),
        ]
    }

    fn chain(&self, keystore: &GetKeystoreInfoResponse) -> (Outcome, String) {
        if let Some(problem) = &self.problem {
            return (Outcome::Fail, problem.clone());
        }
        if self.is_partial() {
            return (
                Outcome::NotTested,
                format!(
                    "this is the log up to record {}; kmsd has {}",
                    self.records, self.expected
                ),
            );
        }
        match self.head == hex::encode(&keystore.audit_head) {
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

    fn is_partial(&self) -> bool {
        self.problem.is_some() || self.records < self.expected
    }

    fn found(&self, number: Option<u64>, operation: &str) -> (Outcome, String) {
        match number {
            Some(number) => (Outcome::Pass, format!("{operation}: record {number}")),
            None if self.is_partial() => (Outcome::NotTested, "the log was not there to its end".to_owned()),
            None => (Outcome::Fail, format!("it has no {operation} of this key")),
        }
    }

    fn unused(&self) -> (Outcome, String) {
        match (self.gone, self.used, self.is_partial()) {
            (_, Some(used), _) => (
                Outcome::Fail,
                format!("record {used} is of a call that did something"),
            ),
            (None, None, _) | (_, None, true) => (
                Outcome::NotTested,
                "the log does not say when that was, or was not there to its end".to_owned(),
            ),
            (Some(gone), None, false) => (Outcome::Pass, format!("records {} to {}", gone + 1, self.records)),
        }
    }
}
