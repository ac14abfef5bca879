//! Import through the front door, as its user does it.

use crate::fixture::{Kms, base64, bytes, text};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use serde_json::Value;

fn external(kms: &Kms) -> String {
    let made = kms.ctl(&["create-key", "--origin", "EXTERNAL"]).unwrap();
    assert_eq!(made["KeyMetadata"]["KeyState"], "PendingImport");
    assert_eq!(made["KeyMetadata"]["Origin"], "EXTERNAL");
    text(&made["KeyMetadata"]["KeyId"])
}

fn import(kms: &Kms, key: &str, material: &[u8], expire: &str) -> Result<Value, String> {
    let offered = kms.ctl(&["get-parameters-for-import", "--key-id", key]).unwrap();
    assert_eq!(offered["KeyId"], key);
    let public = PublicEncryptingKey::from_der(&bytes(&text(&offered["PublicKey"]))).unwrap();
    let public = OaepPublicEncryptingKey::new(public).unwrap();
    assert_eq!(public.key_size_bits(), 2048);
    let mut wrapped = vec![0; public.ciphertext_size()];
    public
        .encrypt(&OAEP_SHA256_MGF1SHA256, material, &mut wrapped, None)
        .unwrap();
    let (wrapped, token) = (base64(&wrapped), text(&offered["ImportToken"]));
    let mut arguments = vec!["import-key-material", "--key-id", key];
    arguments.extend(["--encrypted-key-material", &wrapped, "--import-token", &token]);
    arguments.extend(["--key-material-expire-unix", expire]);
    kms.ctl(&arguments)
}

#[test]
fn material_is_imported_deleted_and_imported_again() {
    let mut kms = Kms::start();
    let key = external(&kms);
    let plain = base64(b"attack at dawn");
    let encrypt = ["encrypt", "--key-id", &key, "--plaintext", &plain];
    assert_eq!(kms.code(&encrypt), "Rejected.PendingImport");
    assert_eq!(
        kms.code(&["enable-key", "--key-id", &key]),
        "Rejected.StateModifiedFailed"
    );
    import(&kms, &key, &[0x5a; 32], "0").unwrap();
    let blob = kms.encrypt(&key, &plain, "{}");
    kms.restart();
    assert_eq!(kms.decrypt(&blob, "{}").unwrap(), plain);

    kms.ctl(&["delete-key-material", "--key-id", &key]).unwrap();
    assert_eq!(kms.state(&key), "PendingImport");
    assert_eq!(kms.ctl(&["get-keystore-info"]).unwrap()["Epoch"], 2);
    assert!(!kms.home().join("slot-1").exists());
    assert!(
        kms.decrypt(&blob, "{}")
            .unwrap_err()
            .starts_with("Rejected.PendingImport: ")
    );
    let another = import(&kms, &key, &[0x5b; 32], "0").unwrap_err();
    assert_eq!(
        another,
        "InvalidParameter: EncryptedKeyMaterial is not the material that this key had before\n"
    );
    import(&kms, &key, &[0x5a; 32], "4102444800").unwrap();
    let described = kms.ctl(&["describe-key", "--key-id", &key]).unwrap();
    assert_eq!(
        described["KeyMetadata"]["MaterialExpireTime"],
        "2100-01-01T00:00:00Z"
    );
    assert_eq!(kms.decrypt(&blob, "{}").unwrap(), plain);
    kms.verify().unwrap();
}

#[test]
fn material_that_expires_in_a_drill_goes_with_the_clock() {
    let mut kms = Kms::initialized(&["--drill"]);
    kms.serve(&[]);
    let key = external(&kms);
    import(&kms, &key, &[0x5a; 32], "4102444800").unwrap();
    let advance = |kms: &Kms, seconds: &str| kms.ctl(&["advance-clock", "--seconds", seconds]).unwrap();
    // From some day of this century to one past the year 2100, in steps that a drill may take.
    while kms.state(&key) == "Enabled" {
        assert_eq!(
            advance(&kms, "316224000")["DestroyedKeyIds"],
            Value::Array(Vec::new())
        );
    }
    assert_eq!(kms.state(&key), "PendingImport");
    let now = text(&kms.ctl(&["get-keystore-info"]).unwrap()["Now"]);
    assert!(now.as_str() >= "2100", "{now}");
}
