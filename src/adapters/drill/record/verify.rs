//! Whether what a record claims follows from what is in it, so that whoever signed it could not have it say more.

use super::super::document::{Kind, Outcome};
use super::super::facts::erasure_worth;
use super::super::verify::{list, number, string};
use super::audit::{Entry, GONE, SCHEDULED};
use super::contents::{WINDOW_MIN_MS, clock};
use super::{kind_for, title};
use serde_json::Value;

/// Every record has these checks, whatever came of them: what was left out would not be missed.
const CHECKS: [&str; 15] = [
    "state",
    "window",
    "epoch",
    "erasure",
    "mounted",
    "refused-encrypt",
    "refused-generate",
    "refused-decrypt",
    "volume-refused",
    "slot-gone",
    "audit-chain",
    "audit-scheduled",
    "audit-gone",
    "audit-unused",
    "recovery",
];

/// # Errors
/// What does not follow.
pub(in super::super) fn follows(kind: Kind, record: &Value) -> Result<(), String> {
    let (key, keystore) = (part(record, "key")?, part(record, "keystore")?);
    if kind_for(string(key, "origin")?) != kind {
        return Err(format!(
            "it is a {}, which is not what there is of a key of this origin",
            kind.name()
        ));
    }
    let is_for_drills = keystore
        .get("is_for_drills")
        .and_then(Value::as_bool)
        .ok_or("it does not say whether its keystore is one for drills")?;
    let erasure = erasure_worth(string(record, "erasure")?, string(record, "root_slot")?);
    for (name, expected) in [
        ("title", title(kind, is_for_drills).as_str()),
        ("clock", clock(is_for_drills)),
        ("erasure_worth", &erasure),
    ] {
        if string(record, name)? != expected {
            return Err(format!("its {name} is not what it must be"));
        }
    }
    for id in CHECKS {
        if outcomes(record, id)?.is_empty() {
            return Err(format!("the check {id} is missing"));
        }
    }
    if outcomes(record, "state")? != [Outcome::Pass] {
        return Err("kmsd did not say what it records".to_owned());
    }
    // Nobody can have tested them here.
    for id in ["erasure", "recovery"] {
        if outcomes(record, id)? != [Outcome::NotTested] {
            return Err(format!("{id} cannot have been tested"));
        }
    }
    let claims = [
        ("window", has_window(key, is_for_drills)),
        ("epoch", has_left_epoch(record, keystore)),
        ("mounted", has_no_mount(record)?),
        ("audit-chain", has_head(record, keystore)),
    ];
    for (id, holds) in claims {
        if outcomes(record, id)?.contains(&Outcome::Pass) && !holds {
            return Err(format!("{id} is said to have held, which does not follow"));
        }
    }
    audit(record, string(key, "arn")?)
}

fn part<'v>(of: &'v Value, name: &str) -> Result<&'v Value, String> {
    of.get(name)
        .filter(|value| value.is_object())
        .ok_or_else(|| format!("it has no '{name}'"))
}

/// What became of the checks of this name.
fn outcomes(record: &Value, id: &str) -> Result<Vec<Outcome>, String> {
    let named = list(record, "checks")?
        .iter()
        .filter(|check| check.get("id").and_then(Value::as_str) == Some(id));
    Ok(named
        .filter_map(|check| Outcome::parse(check.get("result")?.as_str()?))
        .collect())
}

fn has_window(key: &Value, is_for_drills: bool) -> bool {
    let ms = |name| {
        let time: jiff::Timestamp = string(key, name).ok()?.parse().ok()?;
        Some(time.as_millisecond())
    };
    let passed = ms("deletion_asked_for")
        .zip(ms("material_gone"))
        .map(|(asked, gone)| gone.saturating_sub(asked));
    !is_for_drills && passed.is_some_and(|passed| passed >= WINDOW_MIN_MS)
}

fn has_left_epoch(record: &Value, keystore: &Value) -> bool {
    let left = record.pointer("/method/epoch_before").and_then(Value::as_u64);
    let now = number(keystore, "epoch").ok();
    left.zip(now).is_some_and(|(left, now)| left < now)
}

fn has_no_mount(record: &Value) -> Result<bool, String> {
    let known = list(part(record, "dependants")?, "known")?;
    Ok(known
        .iter()
        .all(|dependant| dependant.get("is_mounted") == Some(&Value::Bool(false))))
}

fn has_head(record: &Value, keystore: &Value) -> bool {
    let same = |of_log: &str, of_kmsd: &str| {
        let of_log = record.pointer(of_log);
        of_log.is_some() && of_log == keystore.get(of_kmsd)
    };
    same("/audit/head", "audit_head") && same("/audit/records", "audit_records")
}

/// What is quoted of the audit log is what was written, and is about the key.
fn audit(record: &Value, arn: &str) -> Result<(), String> {
    let mut entries: Vec<Entry> = Vec::new();
    for value in list(part(record, "audit")?, "quoted")? {
        let entry = Entry::of(value, arn)?;
        if entries.last().is_some_and(|last| !last.precedes(&entry)) {
            return Err("the audit records that it quotes do not follow each other".to_owned());
        }
        entries.push(entry);
    }
    for (id, operation) in [("audit-scheduled", SCHEDULED), ("audit-gone", GONE)] {
        let claims = outcomes(record, id)?.contains(&Outcome::Pass);
        if claims && !entries.iter().any(|entry| entry.is(operation)) {
            return Err(format!("it quotes no record of {operation}"));
        }
    }
    Ok(())
}
