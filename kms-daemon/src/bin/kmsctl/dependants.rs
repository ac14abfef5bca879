//! What depends on a key, for people: shown, and asked about, before the key is scheduled for deletion.

use crate::json::time;
use kms_api::proto;
use kms_client::{Client, ClientError};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal, Write};

/// A key, and what is known to depend on it.
pub(crate) struct Known {
    pub(crate) key_id: String,
    pub(crate) is_destroyed: bool,
    dependants: Vec<proto::Dependant>,
}

/// What is known of the key of this name.
pub(crate) fn of(client: &Client, key: &str) -> Result<Known, ClientError> {
    let described = client.describe_key(key)?;
    Ok(Known {
        is_destroyed: described.key_state() == proto::KeyState::Destroyed,
        dependants: client.list_dependants(&described.key_id)?,
        key_id: described.key_id,
    })
}

/// Shows what the deletion of a key takes away, and has it confirmed: by a person, at a terminal; by `yes`; or by nothing
/// being known to depend on the key.
///
/// # Errors
/// One line that says what to do: nothing is to be changed.
pub(crate) fn confirm(known: &Known, window_days: u32, yes: bool) -> Result<(), String> {
    let Known {
        key_id, dependants, ..
    } = known;
    let (stdin, mut stderr) = (std::io::stdin(), std::io::stderr());
    // A question that is written to a file is seen by nobody.
    let asks = !yes && stdin.is_terminal() && stderr.is_terminal();
    if !yes && !asks && !dependants.is_empty() {
        return Err(format!(
            "ConfirmationRequired: {} on key {key_id} ('kmsctl describe-key' lists them); nothing was changed: repeat with --yes",
            depend(dependants)
        ));
    }
    if !asks && dependants.is_empty() {
        return Ok(());
    }
    let mut text = radius(key_id, dependants, window_days);
    if asks {
        text.push_str("Schedule the deletion? [y/N] ");
    }
    // Who does not see it does not confirm it either.
    let shown = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    if !asks {
        return Ok(());
    }
    let mut answer = String::new();
    let answered = shown.and_then(|()| stdin.lock().read_line(&mut answer));
    let is_yes = ["y", "yes"]
        .iter()
        .any(|yes| answer.trim().eq_ignore_ascii_case(yes));
    if answered.is_ok() && is_yes {
        return Ok(());
    }
    Err("NotConfirmed: nothing was changed".to_owned())
}

/// Says that it is not known what depends on a key.
pub(crate) fn warn(key: &str, why: &str) {
    // Who does not see it has what was asked for all the same.
    let _ = writeln!(
        std::io::stderr(),
        "What depends on key {} cannot be told: {why}",
        printable(key)
    );
}

/// What is lost with a key.
fn radius(key_id: &str, dependants: &[proto::Dependant], window_days: u32) -> String {
    let window = count(window_days.into(), "day");
    let cancel = "unless 'kmsctl cancel-key-deletion' is called before";
    if dependants.is_empty() {
        return format!(
            "No volume is known to depend on key {key_id}. Whatever was encrypted under it goes dark at once, and becomes noise \
             for ever after {window}, {cancel}.\n"
        );
    }
    let mut text = format!("What depends on key {key_id}, as last reported:\n");
    for dependant in dependants {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "  {}\n      volume {}, domain {}: {}, {}; reported {}",
            printable(&dependant.location),
            dependant.volume_id,
            dependant.domain,
            amount(dependant.files, dependant.bytes),
            if dependant.mounted {
                "MOUNTED"
            } else {
                "not mounted"
            },
            moment(dependant.report_time_ms),
        );
    }
    let mounted = dependants.iter().filter(|dependant| dependant.mounted).count();
    let _ = writeln!(
        text,
        "In all {}, {mounted} of them mounted. They go dark at once, and with every copy and backup become noise for ever after \
         {window}, {cancel}. What programs other than cmkfs encrypted under the key is not counted, and goes the same way.",
        totals(dependants)
    );
    text
}

/// "2 key domains of 1 volume with 17 files, 3.0 MiB depend"
fn depend(dependants: &[proto::Dependant]) -> String {
    let verb = if dependants.len() == 1 {
        "depends"
    } else {
        "depend"
    };
    format!("{} {verb}", totals(dependants))
}

fn totals(dependants: &[proto::Dependant]) -> String {
    let volumes: BTreeSet<_> = dependants.iter().map(|one| &one.volume_id).collect();
    let sum = |of: fn(&proto::Dependant) -> u64| {
        dependants
            .iter()
            .fold(0_u64, |sum, one| sum.saturating_add(of(one)))
    };
    format!(
        "{} of {} with {}",
        count(length(dependants.len()), "key domain"),
        count(length(volumes.len()), "volume"),
        amount(sum(|one| one.files), sum(|one| one.bytes))
    )
}

fn amount(files: u64, bytes: u64) -> String {
    format!("{}, {}", count(files, "file"), size(bytes))
}

fn length(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// In units of 1024, with one digit behind the point.
fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut tenths = u128::from(bytes) * 10;
    let mut unit = None;
    for next in units {
        if tenths < 10_240 {
            break;
        }
        tenths = (tenths + 512) / 1024;
        unit = Some(next);
    }
    match unit {
        None => count(bytes, "byte"),
        Some(unit) => format!("{}.{} {unit}", tenths / 10, tenths % 10),
    }
}

fn moment(ms: i64) -> String {
    match time(ms) {
        Value::String(time) => time,
        other => other.to_string(),
    }
}

/// A path that a mount has told, without what would move a terminal's cursor or change what is shown before it.
fn printable(text: &str) -> String {
    let shown = |c: char| match c {
        c if c.is_control() || is_invisible(c) => c.escape_unicode().to_string(),
        c => c.to_string(),
    };
    text.chars().map(shown).collect()
}

/// Marks that reorder or hide text.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_units_that_a_person_reads() {
        let cases = [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (5_583_457_485, "5.2 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(size(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn what_a_mount_told_moves_no_cursor() {
        assert_eq!(
            printable("/srv/\u{1b}[2Jä\n\u{202e}"),
            "/srv/\\u{1b}[2Jä\\u{a}\\u{202e}"
        );
    }

    #[test]
    fn volumes_and_domains_are_counted_and_figures_added() {
        let dependant = |volume: &str, domain, bytes| proto::Dependant {
            volume_id: volume.to_owned(),
            domain,
            location: "/srv/v".to_owned(),
            files: 2,
            bytes,
            mounted: domain == 0,
            report_time_ms: 0,
        };
        let all = [
            dependant("a", 0, 512),
            dependant("a", 1, 512),
            dependant("b", 0, u64::MAX),
        ];
        assert_eq!(
            totals(&all[..2]),
            "2 key domains of 1 volume with 4 files, 1.0 KiB"
        );
        assert_eq!(totals(&all), "3 key domains of 2 volumes with 6 files, 16.0 EiB");
        let text = radius("k", &all, 7);
        assert!(text.contains("/srv/v\n      volume a, domain 1: 2 files, 512 bytes, not mounted; reported 1970-01-01T00:00:00Z\n"));
        assert!(text.contains(", 2 of them mounted. They go dark at once"));
        assert!(text.contains("noise for ever after 7 days, unless 'kmsctl cancel-key-deletion'"));
        assert!(radius("k", &[], 30).starts_with("No volume is known to depend on key k. "));
    }
}
