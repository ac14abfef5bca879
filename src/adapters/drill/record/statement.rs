//! What a record states in sentences: kmsd's word as kmsd's, and beside it what the checks bear out of it, speak against, or could
//! not see.

use super::super::document::{Check, Kind, Outcome};
use super::super::facts::time;
use super::Known;

/// What happened, as a clause: of an imported key it is never that it is destroyed.
pub(super) const fn gone(kind: Kind) -> &'static str {
    match kind {
        Kind::RemovalRecord => "our copy of the key's material is removed",
        Kind::DestructionRecord | Kind::DrillReport => "the key is destroyed",
    }
}

/// The record in a few sentences.
pub(super) fn statement(known: &Known, checks: &[Check]) -> String {
    let (arn, keystore) = (&known.key.arn, &known.keystore.keystore_id);
    let when = known.key.destruction_date_ms.map_or_else(
        || "at a time that it does not tell".to_owned(),
        |ms| format!("since {}", time(ms)),
    );
    let said = match known.kind() {
        Kind::RemovalRecord => format!(
            "kmsd says that the key {arn} of the keystore {keystore} is at its end, {when}, and that the keystore has none of its material \
             any more: our copy is removed. {} The material was imported: whoever else has it, its owner first of all, can use it as \
             before, and nothing is said of that.",
            removed(known)
        ),
        Kind::DestructionRecord | Kind::DrillReport => format!(
            "kmsd says that the key {arn} of the keystore {keystore} is destroyed, {when}, and that the keystore has none of its material \
             any more. What was encrypted under it opens for nobody who lacks that material."
        ),
    };
    format!(
        "{said} {} {} What that is worth is said under 'erasure'.",
        borne_out(checks),
        slot(checks)
    )
}

/// When imported material went, which may have been before the key's end.
fn removed(known: &Known) -> String {
    known.material_gone_ms().map_or_else(
        || "When it was removed is not known; it was not after that.".to_owned(),
        |ms| format!("By the audit log it was removed at {}.", time(ms)),
    )
}

/// How it was done.
pub(super) fn method(checks: &[Check]) -> String {
    let epoch = match outcome(checks, "epoch") {
        Outcome::Pass => "The epoch that kmsd answers is past the one that it says was left.",
        Outcome::Fail => "The epoch that kmsd answers contradicts that.",
        Outcome::NotTested => "Which epoch was left is not known.",
    };
    format!(
        "by what kmsd says and is made to do, cryptographic erase by the ratchet of the root key: the keystore moved to a fresh root key, \
         under which everything but the key's material was sealed anew, and the slot that opens the old root key was overwritten and \
         unlinked (docs/kms-format.md, \"Ratchet\"). {epoch} {}",
        slot(checks)
    )
}

fn borne_out(checks: &[Check]) -> String {
    let failed: Vec<&str> = checks
        .iter()
        .filter(|check| check.outcome == Outcome::Fail)
        .map(|check| check.claim.as_str())
        .collect();
    match failed.is_empty() {
        true => "Nothing that was checked contradicts it.".to_owned(),
        false => format!(
            "This is CONTRADICTED by what was checked. It did not hold that: {}.",
            failed.join("; ")
        ),
    }
}

fn slot(checks: &[Check]) -> &'static str {
    match outcome(checks, "slot-gone") {
        Outcome::Pass => "The old slot was looked for in kmsd's home, and does not lie there.",
        Outcome::Fail => "What opens the old root key, or is named as that, LIES IN KMSD'S HOME.",
        Outcome::NotTested => "Whether the old slot is gone was not observed.",
    }
}

fn outcome(checks: &[Check], id: &str) -> Outcome {
    let found = checks.iter().find(|check| check.id == id);
    found.map_or(Outcome::NotTested, |check| check.outcome)
}
