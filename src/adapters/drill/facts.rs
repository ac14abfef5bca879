//! What a report says beside its checks: the fields of a certificate of sanitization (NIST SP 800-88), as far as they have a
//! meaning for a drill, and what is out of reach.

use super::destruction::program_digest;
use super::scratch::Programs;
use super::{Request, Subject};
use kms_client::proto::{GetKeystoreInfoResponse, KeyMetadata};
use serde_json::{Map, Value, json};
use std::path::Path;

pub(super) const ALWAYS_ENCRYPTED: &str = "By the design of cmkfs data is encrypted before it first reaches the host's storage: \
    AES-256-GCM-SIV under a key for each file, wrapped by the customer master key (docs/format.md). That it was never written otherwise \
    was not tested";
pub(super) const ALGORITHMS: &str = "AES-256-GCM-SIV (RFC 8452), HKDF-SHA-256 (RFC 5869), HMAC-SHA-256. AES-GCM-SIV is not a \
    NIST-approved mode of operation, and this module is not validated (FIPS 140-3): neither must be claimed";
pub(super) const UNKNOWN_COPIES: &str = "unknown copies are not covered";

/// In RFC 3339, in UTC.
pub(super) fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// The same of a time that kmsd told, in milliseconds since the Unix epoch.
pub(super) fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| format!("{ms} ms"), |time| time.to_string())
}

/// What [`time`] was made of.
pub(super) fn ms_of(text: &str) -> Option<i64> {
    let time = text.parse::<jiff::Timestamp>().ok();
    time.map(jiff::Timestamp::as_millisecond)
        .or_else(|| text.strip_suffix(" ms")?.parse().ok())
}

/// Where this runs.
pub(super) fn host() -> Value {
    json!({
        "name": line_of("/proc/sys/kernel/hostname"),
        "kernel": line_of("/proc/sys/kernel/osrelease"),
        "boot_id": line_of("/proc/sys/kernel/random/boot_id"),
    })
}

/// From what is destroyed down to what becomes noise.
pub(super) fn hierarchy(slot: &str, root: &str) -> String {
    format!(
        "{slot} -> {root} -> material of the customer master key -> volume key, data key of each file -> keys that seal records, \
         names and blocks (docs/kms-format.md, docs/format.md)"
    )
}

/// What destroying a slot is worth, and never more.
pub(super) fn erasure_worth(erasure: &str, slot: &str) -> String {
    if erasure == "device" {
        return "erasure = device: that the device keeps what it declares is its maker's claim".to_owned();
    }
    format!(
        "erasure = {erasure}: overwriting and unlinking a slot of the kind '{slot}' erases no medium; its bytes may live on in \
         flash, journals, snapshots and backups, and whoever has them recovers everything"
    )
}

pub(super) fn witness(named: Option<&str>) -> &str {
    named.unwrap_or("none named")
}

fn line_of(path: &str) -> Value {
    std::fs::read_to_string(path).map_or(Value::Null, |text| json!(text.trim()))
}

/// What is known before anything is done.
pub(super) fn of_run(request: &Request) -> Map<String, Value> {
    let (mode, media) = match &request.subject {
        Subject::Scratch => (
            "scratch: a keystore, a volume and a mount that were made for this drill and are gone",
            json!({
                "what": "files on this host, made for this drill",
                "is_production_data": false,
            }),
        ),
        Subject::Volume(live) => (
            "volume: the reversible part alone, in a directory made for this drill on a volume in use",
            json!({
                "what": "files in a directory made for this drill",
                "volume": live.volume.to_string_lossy(),
                "mountpoint": live.mountpoint.to_string_lossy(),
                "is_production_data": false,
            }),
        ),
    };
    let fields = json!({
        "title": "DRILL REPORT",
        "mode": mode,
        "nonce": request.nonce.text(),
        "nonce_origin": if request.is_challenge { "given by the operator" } else { "drawn by the drill itself" },
        "operator": request.operator,
        "witness": witness(request.witness.as_deref()),
        "host": host(),
        "time": { "began": now(), "clock_of_logs": "CLOCK_BOOTTIME, nanoseconds" },
        "tool": tool(None),
        "media": media,
        "method": "revocation and, on a scratch volume, cryptographic erase: the key is destroyed, the ciphertext stays. Key by key; \
                   no medium is overwritten",
        "always_encrypted": ALWAYS_ENCRYPTED,
        "algorithms": ALGORITHMS,
        "key_hierarchy": hierarchy("root slot", "root key of an epoch"),
        "known_copies": known_copies(&request.subject),
        "observer": if rustix::process::geteuid().is_root() {
            format!("a process of its own, uid {}", super::course::NOBODY)
        } else {
            format!("a process of its own, uid {}, as the drill", rustix::process::geteuid().as_raw())
        },
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn known_copies(subject: &Subject) -> Value {
    let unknown = UNKNOWN_COPIES;
    match subject {
        Subject::Scratch => json!({
            "backups": "none: nothing was backed up in this drill",
            "escrow": "none",
            "snapshots": "those that this drill made itself, and removed",
            "customers": "none: the key's material was not imported",
            "unknown": unknown,
        }),
        Subject::Volume(_) => {
            let why = "not recorded: nothing is destroyed here, and the drill knows of its own markers alone";
            json!({ "backups": why, "escrow": why, "snapshots": why, "customers": why, "unknown": unknown })
        }
    }
}

/// Which programs ran.
pub(super) fn tool(programs: Option<&Programs>) -> Value {
    let digest = |path: fn(&Programs) -> &Path| {
        programs.map_or(Value::Null, |programs| program_digest(path(programs)))
    };
    json!({
        "name": "cmkfs drill",
        "version": env!("CARGO_PKG_VERSION"),
        "sha256": {
            "cmkfs": digest(|programs| &programs.cmkfs),
            "kmsd": digest(|programs| &programs.kmsd),
            "cmkfs-recover": digest(|programs| &programs.recover),
        },
    })
}

/// What is known of the key.
pub(super) fn of_key(facts: &mut Map<String, Value>, key: &KeyMetadata, keystore: &GetKeystoreInfoResponse) {
    let clock = if keystore.drill {
        "TEST CLOCK: this keystore was made for drills (kmsd init --drill); its clock was shifted, and no window of deletion in \
         this report is one that really passed"
    } else {
        "the host's clock"
    };
    facts.insert(
        "key".to_owned(),
        json!({
            "arn": key.arn,
            "origin": key.origin,
            "spec": key.key_spec,
            "strength_bits": 256,
            "protection_level": key.protection_level,
            "version": key.primary_key_version,
            "description": key.description,
        }),
    );
    facts.insert(
        "keystore".to_owned(),
        json!({ "id": keystore.keystore_id, "epoch": keystore.epoch, "is_for_drills": keystore.drill }),
    );
    facts.insert("clock".to_owned(), json!(clock));
    facts.insert("root_slot".to_owned(), json!(keystore.root_slot));
    facts.insert("erasure".to_owned(), json!(keystore.erasure));
}

/// When it was over.
pub(super) fn end(facts: &mut Map<String, Value>) {
    if let Some(time) = facts.get_mut("time").and_then(Value::as_object_mut) {
        time.insert("ended".to_owned(), json!(now()));
    }
}

/// What no check here is about.
pub(super) fn limits() -> Vec<String> {
    [
        "Unknown copies are not covered.",
        "Root on the machine while keys are in use, and whoever debugs a daemon, has the keys.",
        "Pages that a process pinned (vmsplice, io_uring buffers, DMA) or copied before the call are its own.",
        "Names that are open are shown by /proc.",
        "Pages that the kernel freed keep their content unless it clears them (init_on_free=1).",
        "A snapshot of the whole virtual machine, memory included, is out of scope.",
        "The drill shows what this build does on this host at this time; it says nothing of a production key.",
    ]
    .map(str::to_owned)
    .to_vec()
}
