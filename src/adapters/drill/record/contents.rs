//! A record's fields, from what is known: those of a certificate of sanitization (NIST SP 800-88), as far as they have a meaning
//! for a key that a keystore left behind. Pure: whatever is asked or read was before.

use super::super::document::{Check, Kind, Outcome, Overall};
use super::super::facts::{
    ALGORITHMS, ALWAYS_ENCRYPTED, UNKNOWN_COPIES, erasure_worth, hierarchy, host, now, time, witness,
};
use super::audit::Log;
use super::{Known, Record, check, title};
use kms_client::proto::{Dependant, KeyMetadata};
use serde_json::{Value, json};

/// The least window of deletion that there is.
pub(super) const WINDOW_MIN_MS: i64 = 7 * 86_400_000;

/// What happened, as a clause: of an imported key it is never that it is destroyed.
const fn gone(kind: Kind) -> &'static str {
    match kind {
        Kind::RemovalRecord => "our copy of the key's material is removed",
        Kind::DestructionRecord | Kind::DrillReport => "the key is destroyed",
    }
}

pub(super) fn write(mut known: Known) -> Record {
    let kind = known.kind();
    let tried = std::mem::take(&mut known.tried);
    let mut checks = known.checks(kind);
    checks.extend(tried);
    checks.extend(Log::checks(known.log.as_ref(), &known.keystore));
    checks.push(check(
        "recovery",
        "copies of the keystore and of volumes give nothing of the key",
        (
            Outcome::NotTested,
            "no copies were given to 'cmkfs-recover' for this record; a drill report shows what it does with copies of a scratch \
             volume"
                .to_owned(),
        ),
    ));
    let result = Overall::of(checks.iter().map(|check| check.outcome));
    let mut value = known.fields(kind);
    if let Some(fields) = value.as_object_mut() {
        fields.insert(
            "checks".to_owned(),
            checks.iter().map(Check::value).collect::<Value>(),
        );
        fields.insert("result".to_owned(), json!(result.name()));
    }
    Record { kind, value, checks }
}

impl Known {
    /// What kmsd's own answers come to.
    fn checks(&self, kind: Kind) -> Vec<Check> {
        let (key, keystore) = (&self.key, &self.keystore);
        let gone = gone(kind);
        let state = match key.destruction_date_ms {
            Some(ms) => (Outcome::Pass, format!("kmsd says so, since {}", time(ms))),
            None => (Outcome::Fail, "kmsd does not say when".to_owned()),
        };
        let epoch = match key.destruction_epoch {
            Some(left) if left < keystore.epoch => (
                Outcome::Pass,
                format!(
                    "left behind in root epoch {left}; the keystore is at {}",
                    keystore.epoch
                ),
            ),
            Some(left) => (
                Outcome::Fail,
                format!(
                    "left behind in root epoch {left}, and the keystore is at {}",
                    keystore.epoch
                ),
            ),
            None if self.is_external() => (
                Outcome::NotTested,
                "kmsd knows of no material that this key ever had".to_owned(),
            ),
            None => (
                Outcome::NotTested,
                "it was before kmsd kept the epoch with the key".to_owned(),
            ),
        };
        let mounted: Vec<&str> = self
            .dependants
            .iter()
            .filter(|dependant| dependant.mounted)
            .map(|dependant| dependant.location.as_str())
            .collect();
        let is_mounted = match mounted.is_empty() {
            true => (Outcome::Pass, "kmsd knows of none".to_owned()),
            // Its mount said that it is dark, or the key were there still: kmsd waits for that.
            false => (
                Outcome::NotTested,
                format!(
                    "mounted, and dark by what its mount said to kmsd; name it with --volume to have it asked: {}",
                    mounted.join(", ")
                ),
            ),
        };
        let worth = erasure_worth(&keystore.erasure, &keystore.root_slot);
        vec![
            check("state", format!("kmsd says that {gone}"), state),
            check(
                "window",
                "the window of deletion has passed, seven days or more",
                self.window(),
            ),
            check(
                "epoch",
                "the keystore has moved to another root key, without the key's material",
                epoch,
            ),
            check(
                "erasure",
                "the medium of the old slot cannot give its content again",
                (Outcome::NotTested, worth),
            ),
            check(
                "mounted",
                "nothing that depended on the key is mounted",
                is_mounted,
            ),
        ]
    }

    fn window(&self) -> (Outcome, String) {
        if self.keystore.drill {
            let why = "TEST CLOCK: the clock of this keystore can be shifted, and no window need really have passed";
            return (Outcome::NotTested, why.to_owned());
        }
        match (self.key.deletion_request_date_ms, self.key.destruction_date_ms) {
            (Some(asked), Some(gone)) => {
                let detail = format!(
                    "asked for at {}, done at {}, by kmsd's clocks",
                    time(asked),
                    time(gone)
                );
                match gone.saturating_sub(asked) >= WINDOW_MIN_MS {
                    true => (Outcome::Pass, detail),
                    false => (Outcome::Fail, detail),
                }
            }
            _ => (
                Outcome::NotTested,
                "it was asked for before kmsd kept when that was".to_owned(),
            ),
        }
    }

    fn fields(&self, kind: Kind) -> Value {
        let (key, keystore) = (&self.key, &self.keystore);
        let left = key.destruction_epoch;
        let root = left.map_or_else(
            || "root key of the epoch that was left".to_owned(),
            |left| format!("root key of epoch {left}"),
        );
        json!({
            "document": kind.name(),
            "format": Kind::FORMAT,
            "title": title(kind, keystore.drill),
            "statement": self.statement(kind),
            "not_a_drill_report": "This record is about one key of one keystore: it repeats what kmsd, its files and the people who are \
                named here say of that key. It shows nothing of what the software can do, and is no drill report.",
            "nonce": self.nonce.map(|nonce| nonce.text()),
            "nonce_origin": match self.nonce {
                Some(_) => "chosen by the verifier",
                None => "none was given: this record answers no challenge",
            },
            "operator": self.operator,
            "witness": witness(self.witness.as_deref()),
            "time": { "recorded": now(), "by_kmsd": time(keystore.now_ms) },
            "host": host(),
            "tool": tool(),
            "media": { "what": "files on the host of kmsd, and the volumes that depended on the key. No medium was overwritten: the \
                ciphertext stays where it lies" },
            "key": of_key(key),
            "keystore": {
                "id": keystore.keystore_id,
                "region": keystore.region,
                "account": keystore.account,
                "created": time(keystore.creation_date_ms),
                "epoch": keystore.epoch,
                "state_seq": keystore.state_seq,
                "audit_records": keystore.audit_records,
                "audit_head": hex::encode(&keystore.audit_head),
                "is_for_drills": keystore.drill,
            },
            "clock": clock(keystore.drill),
            "key_hierarchy": hierarchy(&format!("root slot ({})", keystore.root_slot), &root),
            "always_encrypted": ALWAYS_ENCRYPTED,
            "algorithms": ALGORITHMS,
            "method": {
                "what": "cryptographic erase by the ratchet of the root key: the keystore moved to a fresh root key, under which \
                    everything but the key's material was sealed anew, and the slot that opens the old root key was overwritten and \
                    unlinked (docs/kms-format.md, \"Ratchet\")",
                "category": "none of the categories of NIST SP 800-88 is claimed",
                "epoch_before": left,
                "epoch_after": left.map(|left| left.saturating_add(1)),
            },
            "root_slot": keystore.root_slot,
            "erasure": keystore.erasure,
            "erasure_worth": erasure_worth(&keystore.erasure, &keystore.root_slot),
            "dependants": {
                "known": self.dependants.iter().map(of_dependant).collect::<Value>(),
                "note": "as mounts reported last, by themselves; what was encrypted under the key otherwise than in a cmkfs volume is \
                    not known here, and the same is true of it",
            },
            "known_copies": self.copies(),
            "audit": Log::value(self.log.as_ref()),
            "limits": limits(kind),
        })
    }

    fn statement(&self, kind: Kind) -> String {
        let when = self.key.destruction_date_ms.map_or_else(
            || "at a time that is not known".to_owned(),
            |ms| format!("since {}", time(ms)),
        );
        let worth = "What that is worth is said under 'erasure'.";
        let (arn, keystore) = (&self.key.arn, &self.keystore.keystore_id);
        match kind {
            Kind::RemovalRecord => format!(
                "The keystore {keystore} has no material of the key {arn} any more, {when}: our copy is removed. The material was \
                 imported: whoever else has it, its owner first of all, can use it as before, and nothing is said of that. {worth}"
            ),
            Kind::DestructionRecord | Kind::DrillReport => format!(
                "The key {arn} of the keystore {keystore} is destroyed, {when}: the keystore has none of its material any more. What \
                 was encrypted under it opens for nobody who lacks that material. {worth}"
            ),
        }
    }

    fn copies(&self) -> Value {
        let named = match self.known_copies.is_empty() {
            true => "none were named by the operator".to_owned(),
            false => self.known_copies.join("; "),
        };
        json!({
            "named": named,
            "backups": "kmsd keeps no list of backups: it knows of none",
            "escrow": "kmsd gives no material away: it knows of none",
            "snapshots": "not known to kmsd",
            "customers": match self.is_external() {
                true => "the material was imported: its owner's copies are not covered",
                false => "the material was made by kmsd, and not imported",
            },
            "unknown": UNKNOWN_COPIES,
        })
    }
}

fn of_key(key: &KeyMetadata) -> Value {
    let versions = key
        .versions
        .iter()
        .map(|version| json!({ "id": version.key_version_id, "created": time(version.creation_date_ms) }));
    json!({
        "id": key.key_id,
        "arn": key.arn,
        "origin": key.origin,
        "spec": key.key_spec,
        "strength_bits": (key.key_spec == "Aliyun_AES_256").then_some(256),
        "usage": key.key_usage,
        "protection_level": key.protection_level,
        "description": key.description,
        "creator_uid": key.creator,
        "versions": versions.collect::<Value>(),
        "created": time(key.creation_date_ms),
        "deletion_asked_for": key.deletion_request_date_ms.map(time),
        "deletion_due": key.deletion_due_date_ms.map(time),
        "material_gone": key.destruction_date_ms.map(time),
    })
}

fn of_dependant(dependant: &Dependant) -> Value {
    json!({
        "volume": dependant.volume_id,
        "domain": dependant.domain,
        "location": dependant.location,
        "files": dependant.files,
        "bytes": dependant.bytes,
        "reported": time(dependant.report_time_ms),
        "is_mounted": dependant.mounted,
    })
}

fn tool() -> Value {
    let own = std::env::current_exe();
    json!({
        "name": "cmkfs drill record",
        "version": env!("CARGO_PKG_VERSION"),
        "sha256": { "cmkfs": own.map_or(Value::Null, |path| super::super::destruction::program_digest(&path)) },
    })
}

/// Which clock the times are by.
pub(super) const fn clock(is_for_drills: bool) -> &'static str {
    if is_for_drills {
        "TEST CLOCK: this keystore was made for drills (kmsd init --drill); its clock can be shifted, no window of deletion in this \
         record need have really passed, and no production key is in it"
    } else {
        "the host's clock and the time that kmsd observed, both of which the window of deletion had to pass by"
    }
}

fn limits(kind: Kind) -> Vec<&'static str> {
    let mut limits = vec![
        "Unknown copies are not covered.",
        "It is kmsd's word, signed by whoever asked it: a kmsd that was changed could say anything. What others kept of its audit log \
         (mounts keep the last head) can be compared with the head in this record.",
        "An older copy of the keystore, its old slot included, opens the key's material: whoever may have made one has to be asked.",
        "What was decrypted before, and data keys that a program kept in memory, are not reached by what is done to the key.",
        "The kind of root slot is the one that the keystore has now.",
        "The keystore, its slot and its audit log all put back together as they once were would not be seen by kmsd alone.",
    ];
    if kind == Kind::RemovalRecord {
        limits
            .push("The owner of imported material has it, or had it. This record says nothing of that copy.");
    }
    limits
}
