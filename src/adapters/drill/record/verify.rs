//! Whether what a record claims follows from what is in it, so that whoever signed it could not have it say more. It is written
//! anew from the facts in it, and must come out the same: no sentence, outcome or field is the signer's to choose.

use super::super::document::Kind;
use super::audit::Log;
use super::contents::write;
use super::known::Known;
use serde_json::Value;
use std::path::Path;

/// # Errors
/// What does not follow.
pub(in super::super) fn follows(kind: Kind, record: &Value) -> Result<(), String> {
    let known = Known::of(record)?;
    if known.kind() != kind {
        return Err(format!(
            "it is a {}, which is not what there is of a key of this origin",
            kind.name()
        ));
    }
    known.must_be_recordable()?;
    match difference(&write(&known).value, record, "") {
        None => Ok(()),
        Some(why) => Err(why),
    }
}

/// Whether a log that somebody else kept has what a record quotes, and reaches the head that is in it.
///
/// # Errors
/// It does not, or cannot be read; or nothing is quoted.
pub fn must_be_in_log(record: &Value, path: &Path) -> Result<(), String> {
    let known = Known::of(record)?;
    let quoted = known.log.ok_or("it quotes no audit log")?;
    let kept = Log::read(path, &known.keystore, &known.key.arn)?;
    quoted
        .must_agree(&kept)
        .map_err(|why| format!("audit log {}: {why}", path.display()))
}

/// The first place in which a record is not what follows from it.
fn difference(expected: &Value, found: &Value, at: &str) -> Option<String> {
    match (expected, found) {
        (Value::Object(fields), Value::Object(others)) => {
            if let Some(name) = others.keys().find(|name| !fields.contains_key(*name)) {
                return Some(format!("it has '{at}/{name}', which no record has"));
            }
            fields.iter().find_map(|(name, field)| {
                let at = format!("{at}/{name}");
                match others.get(name) {
                    Some(other) => difference(field, other, &at),
                    None => Some(format!("its '{at}' is missing")),
                }
            })
        }
        (Value::Array(items), Value::Array(others)) if items.len() == others.len() => {
            let mut pairs = items.iter().zip(others).enumerate();
            pairs.find_map(|(number, (item, other))| {
                difference(item, other, &format!("{at}/{}", name(item, number)))
            })
        }
        _ if expected == found => None,
        (Value::Array(items), Value::Array(others)) => Some(format!(
            "its '{at}' has {} parts, and must have {}",
            others.len(),
            items.len()
        )),
        _ => Some(format!("its '{at}' is not what follows from its other fields")),
    }
}

/// What an item of a list is called.
fn name(item: &Value, number: usize) -> String {
    let id = item.get("id").and_then(Value::as_str);
    id.map_or_else(|| number.to_string(), str::to_owned)
}
