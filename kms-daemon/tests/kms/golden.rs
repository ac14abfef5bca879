//! A keystore and blobs that version 1 wrote: every later version opens them.
//!
//! tests/golden/v1 was made by `kmsd init` and `kmsctl`; its slot lies beside it, so it protects nothing.

use crate::fixture::{Kms, copy, text};
use std::path::PathBuf;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

#[test]
fn version_1_is_read_for_ever() {
    let mut kms = Kms::copied(&golden().join("home"));
    let cases = std::fs::read_to_string(golden().join("cases.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&cases).unwrap();
    let report = kms.verify().unwrap();
    assert_eq!(report["Head"], cases["AuditHead"]);
    kms.serve(&[]);
    for blob in cases["Blobs"].as_array().unwrap() {
        let plaintext = kms.decrypt(
            &text(&blob["CiphertextBlob"]),
            &blob["EncryptionContext"].to_string(),
        );
        assert_eq!(plaintext.unwrap(), text(&blob["Plaintext"]));
    }
    for key in cases["Keys"].as_array().unwrap() {
        let described = kms
            .ctl(&["describe-key", "--key-id", &text(&key["Name"])])
            .unwrap();
        // Later versions say more, and of what there was the same.
        for (name, value) in key["KeyMetadata"].as_object().unwrap() {
            assert_eq!(&described["KeyMetadata"][name], value, "{name}");
        }
    }
}

/// The slot is what the rest is worth nothing without.
#[test]
fn version_1_with_the_slot_of_another_keystore_is_refused() {
    let mut kms = Kms::copied(&golden().join("home"));
    let slot = kms.home().join("slot-1");
    let mut bytes = std::fs::read(&slot).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&slot, bytes).unwrap();
    assert!(kms.serve_fails().contains("they do not belong together"));
    copy(&golden().join("home"), &kms.home());
    kms.serve(&[]);
}
