//! A record's fields, from what is known: those of a certificate of sanitization (NIST SP 800-88), as far as they have a meaning
//! for a key that a keystore left behind. Pure: whatever is asked or read was before. Whoever verifies a record has it written
//! anew from what it says is known, so each sentence and each outcome here is one that a signer cannot choose.

use super::super::document::{Check, Kind, Outcome, Overall};
use super::super::facts::{
    ALGORITHMS, ALWAYS_ENCRYPTED, UNKNOWN_COPIES, erasure_worth, hierarchy, time, witness,
};
use super::audit::Log;
use super::home::Home;
use super::statement::{gone, method, statement};
use super::{Known, Made, Record, TOOL, check, title};
use kms_client::proto::{Dependant, KeyMetadata};
use serde_json::{Value, json};

/// The least window of deletion that there is.
const WINDOW_MIN_MS: i64 = 7 * 86_400_000;

pub(super) fn write(known: &Known) -> Record {
    let kind = known.kind();
    let checks = known.checks(kind);
    let result = Overall::of(checks.iter().map(|check| check.outcome));
    let mut value = known.fields(kind, &checks);
    if let Some(fields) = value.as_object_mut() {
        fields.insert(
            "checks".to_owned(),
            checks.iter().map(Check::value).collect::<Value>(),
        );
        fields.insert("result".to_owned(), json!(result.name()));
        if let Some(note) = &known.made.signing_key {
            fields.insert("signing_key".to_owned(), json!(note));
        }
    }
    Record { kind, value, checks }
}

impl Known {
    /// Every record has these, whatever came of them: what was left out would not be missed.
    fn checks(&self, kind: Kind) -> Vec<Check> {
        let (key, keystore) = (&self.key, &self.keystore);
        let mut checks = self.answered(kind);
        checks.extend(self.tried.checks(key));
        checks.push(check(
            "slot-gone",
            "the home of the keystore has no slot and no root of the epoch that was left, nor of one before it, by the names of its files \
             and by how they begin",
            Home::judge(self.home.as_ref(), key.destruction_epoch, keystore.epoch),
        ));
        checks.extend(Log::checks(self.log.as_ref(), key));
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
        checks
    }

    /// What kmsd's own answers come to.
    fn answered(&self, kind: Kind) -> Vec<Check> {
        let keystore = &self.keystore;
        let state = match self.key.destruction_date_ms {
            Some(ms) => (Outcome::Pass, format!("kmsd says so, since {}", time(ms))),
            None => (Outcome::Fail, "kmsd does not say when".to_owned()),
        };
        let worth = erasure_worth(&keystore.erasure, &keystore.root_slot);
        vec![
            check("state", format!("kmsd says that {}", gone(kind)), state),
            check(
                "window",
                "the window of deletion has passed, seven days or more",
                self.window(),
            ),
            check(
                "epoch",
                "the keystore has moved to another root key, without the key's material",
                self.epoch(),
            ),
            check(
                "erasure",
                "the medium of the old slot cannot give its content again",
                (Outcome::NotTested, worth),
            ),
            check(
                "mounted",
                "kmsd knows of no mount of anything that depended on the key",
                self.mounted(),
            ),
        ]
    }

    fn window(&self) -> (Outcome, String) {
        if self.keystore.drill {
            let why = "TEST CLOCK: the clock of this keystore can be shifted, and no window need really have passed";
            return (Outcome::NotTested, why.to_owned());
        }
        let key = &self.key;
        let (Some(asked), Some(due), Some(gone)) = (
            key.deletion_request_date_ms,
            key.deletion_due_date_ms,
            key.destruction_date_ms,
        ) else {
            let why = "it was asked for before kmsd kept when that was";
            return (Outcome::NotTested, why.to_owned());
        };
        let detail = format!(
            "asked for at {}, due at {}, done at {}, by kmsd's clocks",
            time(asked),
            time(due),
            time(gone)
        );
        match due.saturating_sub(asked) >= WINDOW_MIN_MS && gone >= due {
            true => (Outcome::Pass, detail),
            false => (Outcome::Fail, detail),
        }
    }

    fn epoch(&self) -> (Outcome, String) {
        let Some(left) = self.key.destruction_epoch else {
            let why = "it was before kmsd kept the epoch with the key";
            return (Outcome::NotTested, why.to_owned());
        };
        let detail = format!(
            "left behind in root epoch {left}; the keystore is at {}",
            self.keystore.epoch
        );
        match left < self.keystore.epoch {
            true => (Outcome::Pass, detail),
            false => (Outcome::Fail, detail),
        }
    }

    fn mounted(&self) -> (Outcome, String) {
        let mounted: Vec<&str> = self
            .dependants
            .iter()
            .filter(|dependant| dependant.mounted)
            .map(|dependant| dependant.location.as_str())
            .collect();
        match mounted.is_empty() {
            true => (
                Outcome::Pass,
                "of those that reported to it; it cannot know of others".to_owned(),
            ),
            // Its mount said that it is dark, or the key were there still: kmsd waits for that.
            false => (
                Outcome::NotTested,
                format!(
                    "mounted, and dark by what its mount said to kmsd; name it with --volume to have it asked: {}",
                    mounted.join(", ")
                ),
            ),
        }
    }

    fn fields(&self, kind: Kind, checks: &[Check]) -> Value {
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
            "statement": statement(self, checks),
            "not_a_drill_report": "This record is about one key of one keystore: it repeats what kmsd, its files and the people who are \
                named here say of that key. It shows nothing of what the software can do, and is no drill report.",
            "nonce": self.nonce.map(|nonce| nonce.text()),
            "nonce_origin": match self.nonce {
                Some(_) => "given by the operator",
                None => "none was given: this record answers no challenge",
            },
            "operator": self.operator,
            "witness": witness(self.witness.as_deref()),
            "time": { "recorded": self.made.recorded, "by_kmsd": time(keystore.now_ms) },
            "host": self.made.host,
            "tool": tool(&self.made),
            "media": { "what": "files on the host of kmsd, and the volumes that depended on the key. No medium was overwritten: the \
                ciphertext stays where it lies" },
            "key": of_key(key, self.material_gone_ms()),
            "keystore": self.of_keystore(),
            "clock": clock(keystore.drill),
            "key_hierarchy": hierarchy(&format!("root slot ({})", keystore.root_slot), &root),
            "always_encrypted": ALWAYS_ENCRYPTED,
            "algorithms": ALGORITHMS,
            "method": {
                "what": method(checks),
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
            "volumes": self.tried.volumes(),
            "home": Home::value(self.home.as_ref()),
            "known_copies": self.copies(),
            "audit": Log::value(self.log.as_ref()),
            "limits": limits(kind),
        })
    }

    fn of_keystore(&self) -> Value {
        let keystore = &self.keystore;
        json!({
            "id": keystore.keystore_id,
            "region": keystore.region,
            "account": keystore.account,
            "created": time(keystore.creation_date_ms),
            "epoch": keystore.epoch,
            "state_seq": keystore.state_seq,
            "audit_records": keystore.audit_records,
            "audit_head": hex::encode(&keystore.audit_head),
            "is_for_drills": keystore.drill,
        })
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
                false => "kmsd says that it made the material itself",
            },
            "unknown": UNKNOWN_COPIES,
        })
    }

    /// When the keystore had the key's material last. A key whose material was imported may come to its end long after that.
    pub(super) fn material_gone_ms(&self) -> Option<i64> {
        match self.is_external() {
            true => self.log.as_ref().and_then(Log::gone_ms),
            false => self.key.destruction_date_ms,
        }
    }
}

fn of_key(key: &KeyMetadata, material_gone_ms: Option<i64>) -> Value {
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
        "ended": key.destruction_date_ms.map(time),
        "material_gone": material_gone_ms.map(time),
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

fn tool(made: &Made) -> Value {
    json!({
        "name": TOOL,
        "version": made.tool_version,
        "sha256": { "cmkfs": made.tool_digest },
    })
}

/// Which clock the times are by.
const fn clock(is_for_drills: bool) -> &'static str {
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
         (mounts keep the last head) can be compared with the head in this record, and 'cmkfs drill verify --audit-log' looks for what \
         is quoted in a log that somebody else kept.",
        "Names, words of the operator and what programs answered are in it as they were given.",
        "An older copy of the keystore, its old slot included, opens the key's material: whoever may have made one has to be asked.",
        "A slot that was copied elsewhere, or into another file, is not seen by looking at kmsd's home.",
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
