//! `cmkfs status`

use super::control::Question;
use super::{Failure, StatusArguments, control, existing_directory, open_failure};
use crate::adapters::fuse;
use crate::engine::Superblock;
use serde_json::Value;
use std::io::Write;
use std::path::Path;

pub(super) fn run(arguments: &StatusArguments) -> Result<(), Failure> {
    let dir = match fuse::find(&arguments.path).map_err(|error| format!("mountinfo: {error}"))? {
        Some(mount) => mount.volume,
        None => existing_directory(&arguments.path, "volume")?,
    };
    let state = match control::ask(&dir, &Question::Status)? {
        Some(state) => state,
        None => {
            let superblock =
                Superblock::read(&dir).map_err(|error| open_failure(&error, &dir, Path::new("")))?;
            control::facts(&dir, &superblock)
        }
    };
    let text = if arguments.json {
        state.to_string()
    } else {
        table(&state)
    };
    // A reader that hangs up has seen what it wanted.
    let _heard = writeln!(std::io::stdout(), "{text}");
    Ok(())
}

fn table(state: &Value) -> String {
    let fields = state.as_object().into_iter().flatten();
    let fields = fields.filter(|(name, _)| *name != "domains");
    let lines = fields.map(|(name, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("{:<16}{value}", name.replace('_', " "))
    });
    let domains = state.get("domains").and_then(Value::as_array);
    let first = domains.and_then(|domains| domains.first());
    let verified = first.map(|first| format!("{:<16}{}", "verification", verification(first)));
    // The volume's own is what the fields tell of, unless there are others.
    let domains = domains
        .into_iter()
        .flatten()
        .filter(|_| domains.is_some_and(|all| all.len() > 1));
    lines
        .chain(verified)
        .chain(domains.map(domain_line))
        .collect::<Vec<_>>()
        .join("\n")
}

fn domain_line(domain: &Value) -> String {
    let text = |name: &str| {
        let value = domain.get(name).filter(|value| !value.is_null());
        value.map_or_else(
            || "-".to_owned(),
            |value| value.as_str().map_or_else(|| value.to_string(), str::to_owned),
        )
    };
    format!(
        "{:<16}{} {} {}: {} inodes, {} bytes, verification: {}",
        format!("domain {}", text("domain")),
        text("path"),
        text("cmk_arn"),
        text("key_state"),
        text("inodes"),
        text("data_bytes"),
        verification(domain)
    )
}

/// How far a domain's verification is.
fn verification(domain: &Value) -> String {
    let found = domain.get("verification");
    let state = found.and_then(|found| found.get("state")).and_then(Value::as_str);
    let count = |name| {
        let count = found.and_then(|found| found.get(name));
        count.and_then(Value::as_u64).unwrap_or_default()
    };
    match state {
        Some("running") => format!("{} inodes so far", count("inodes")),
        Some("matches") => format!("matches, {} records", count("records")),
        Some("differs") => format!("DIFFERS, {} findings; it takes no changes", count("findings")),
        Some(state) => state.to_owned(),
        None => "-".to_owned(),
    }
}
