//! Encrypt, Decrypt and data keys.

use crate::fixture::{Kms, base64, bytes, text};
use kms_api::proto;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

#[test]
fn a_blob_opens_with_its_own_context_only() {
    let kms = Kms::start();
    let key = kms.create_key();
    let blob = kms.encrypt(&key, "AAECAw==", r#"{"b": "2", "a": "1"}"#);
    assert_eq!(kms.decrypt(&blob, r#"{"a": "1", "b": "2"}"#).unwrap(), "AAECAw==");
    for context in [
        "{}",
        r#"{"a": "1"}"#,
        r#"{"A": "1", "b": "2"}"#,
        r#"{"a": "1", "b": "2", "c": ""}"#,
        r#"{"a": "2", "b": "1"}"#,
    ] {
        let error = kms.decrypt(&blob, context).unwrap_err();
        assert!(
            error.starts_with("InvalidParameter: CiphertextBlob"),
            "{context}: {error}"
        );
    }
}

#[test]
fn every_changed_byte_of_a_blob_is_refused() {
    let kms = Kms::start();
    let key = kms.create_key();
    let good = bytes(&kms.encrypt(&key, "c2VjcmV0", "{}"));
    let client = kms.client();
    let decrypt = |ciphertext_blob: Vec<u8>| {
        let request = proto::DecryptRequest {
            ciphertext_blob,
            encryption_context: BTreeMap::new(),
        };
        client.call(|mut kms| async move { kms.decrypt(request).await })
    };
    let mut messages = std::collections::BTreeSet::new();
    for at in 0..good.len() {
        for flip in [1, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            match decrypt(bad) {
                Err(kms_client::ClientError::Kms(error)) => messages.insert(error.to_string()),
                Err(error) => panic!("byte {at}: {error}"),
                Ok(_) => panic!("byte {at} was decrypted"),
            };
        }
    }
    // What is not the name of a key or a region gives one answer.
    let uniform: Vec<_> = messages
        .iter()
        .filter(|message| message.starts_with("InvalidParameter"))
        .collect();
    assert_eq!(uniform.len(), 1, "{messages:?}");
    for length in 0..good.len() {
        assert!(decrypt(good[..length].to_vec()).is_err(), "{length} bytes");
    }
    assert!(decrypt([good.clone(), vec![0]].concat()).is_err());
    assert_eq!(decrypt(good).unwrap().plaintext, b"secret");
}

#[test]
fn a_blob_of_another_keystore_or_region_is_not_known_here() {
    let (mine, theirs) = (Kms::start(), Kms::start());
    let mut far = Kms::initialized(&["--region", "far"]);
    far.serve(&[]);
    mine.create_key();
    for other in [&theirs, &far] {
        let blob = other.encrypt(&other.create_key(), "AAAA", "{}");
        let error = mine.decrypt(&blob, "{}").unwrap_err();
        assert!(error.starts_with("Forbidden.KeyNotFound: "), "{error}");
    }
}

#[test]
fn limits_are_what_the_documentation_says() {
    let kms = Kms::start();
    let key = kms.create_key();
    let encrypt = |length: usize, context: &str| {
        let plaintext = base64(&vec![7; length]);
        kms.ctl(&[
            "encrypt",
            "--key-id",
            &key,
            "--plaintext",
            &plaintext,
            "--encryption-context",
            context,
        ])
    };
    assert!(encrypt(6144, "{}").is_ok());
    assert!(
        encrypt(6145, "{}")
            .unwrap_err()
            .starts_with("InvalidParameter: Plaintext")
    );
    assert!(
        encrypt(0, "{}")
            .unwrap_err()
            .starts_with("InvalidParameter: Plaintext")
    );
    let long = format!(r#"{{"n": "{}"}}"#, "x".repeat(8192));
    assert!(
        encrypt(1, &long)
            .unwrap_err()
            .starts_with("InvalidParameter: EncryptionContext")
    );

    let generate = |flags: &[&str]| kms.ctl(&[&["generate-data-key", "--key-id", &key], flags].concat());
    for (flags, length) in [
        (&[] as &[&str], 32),
        (&["--key-spec", "AES_256"], 32),
        (&["--key-spec", "AES_128"], 16),
        (&["--number-of-bytes", "1"], 1),
        (&["--number-of-bytes", "1024"], 1024),
    ] {
        let answer = generate(flags).unwrap();
        assert_eq!(bytes(&text(&answer["Plaintext"])).len(), length);
        let again = kms.decrypt(&text(&answer["CiphertextBlob"]), "{}").unwrap();
        assert_eq!(again, text(&answer["Plaintext"]));
    }
    for flags in [["--number-of-bytes", "1025"], ["--key-spec", "AES_512"]] {
        assert!(generate(&flags).unwrap_err().starts_with("InvalidParameter: "));
    }
    let wrapped = kms
        .ctl(&["generate-data-key-without-plaintext", "--key-id", &key])
        .unwrap();
    assert!(wrapped.get("Plaintext").is_none());
    assert_eq!(
        bytes(&kms.decrypt(&text(&wrapped["CiphertextBlob"]), "{}").unwrap()).len(),
        32
    );
}

#[test]
fn a_batch_has_an_outcome_for_each_item() {
    let kms = Kms::start();
    let (good, disabled) = (kms.create_key(), kms.create_key());
    kms.ctl(&["disable-key", "--key-id", &disabled]).unwrap();
    let codes = |answer: &serde_json::Value| -> Vec<String> {
        let items = answer["Items"].as_array().unwrap().iter();
        items
            .map(|item| item["Error"]["Code"].as_str().unwrap_or("ok").to_owned())
            .collect()
    };
    let expected = [
        "ok",
        "Rejected.Disabled",
        "Forbidden.KeyNotFound",
        "Forbidden.NoPermission",
        "InvalidParameter",
    ];
    let items = |last: serde_json::Value| {
        let mut items = serde_json::json!([
            {"KeyId": good, "Plaintext": "AAAA", "EncryptionContext": {"a": "b"}},
            {"KeyId": disabled, "Plaintext": "AAAA"},
            {"KeyId": "alias/none", "Plaintext": "AAAA"},
            {"KeyId": good, "Plaintext": "AAAA", "EncryptionContext": {"purpose": "dek"}},
        ]);
        items.as_array_mut().unwrap().push(last);
        items.to_string()
    };
    let encrypted = kms
        .ctl(&[
            "batch-encrypt",
            "--items",
            &items(serde_json::json!({"KeyId": good, "Plaintext": ""})),
        ])
        .unwrap();
    assert_eq!(codes(&encrypted), expected);
    let bad_length = items(serde_json::json!({"KeyId": good, "NumberOfBytes": 2000}));
    let generated = kms
        .ctl(&["batch-generate-data-key", "--items", &bad_length])
        .unwrap();
    assert_eq!(codes(&generated), expected);
    let wrapped = kms
        .ctl(&[
            "batch-generate-data-key-without-plaintext",
            "--items",
            &bad_length,
        ])
        .unwrap();
    let mut withheld = expected;
    withheld[3] = "ok";
    assert_eq!(
        codes(&wrapped),
        withheld,
        "a filesystem's key may be made, if it is not shown"
    );

    let blob = &encrypted["Items"][0]["CiphertextBlob"];
    let items = serde_json::json!([
        {"CiphertextBlob": blob, "EncryptionContext": {"a": "b"}},
        {"CiphertextBlob": blob},
        {"CiphertextBlob": "AAAA"},
        {"CiphertextBlob": wrapped["Items"][3]["CiphertextBlob"], "EncryptionContext": {"purpose": "dek"}},
    ]);
    let decrypted = kms
        .ctl(&["batch-decrypt", "--items", &items.to_string()])
        .unwrap();
    assert_eq!(
        codes(&decrypted),
        [
            "ok",
            "InvalidParameter",
            "InvalidParameter",
            "Forbidden.NoPermission"
        ]
    );
    assert_eq!(decrypted["Items"][0]["Plaintext"], "AAAA");

    let many = |count: usize| serde_json::json!(vec![serde_json::json!({"KeyId": good}); count]).to_string();
    assert!(
        kms.ctl(&["batch-generate-data-key", "--items", &many(256)])
            .is_ok()
    );
    assert_eq!(
        kms.code(&["batch-generate-data-key", "--items", &many(257)]),
        "InvalidParameter"
    );
    assert_eq!(
        kms.code(&["batch-generate-data-key", "--items", "[]"]),
        "InvalidParameter"
    );
}

#[test]
fn a_filesystem_s_keys_do_not_leave_outside_a_session() {
    let kms = Kms::start();
    let key = kms.create_key();
    for context in [r#"{"purpose": "vk", "volume": "x"}"#, r#"{"purpose": "dek"}"#] {
        let flags = ["--encryption-context", context];
        let wrap = ["generate-data-key-without-plaintext", "--key-id", &key];
        let wrapped = kms.ctl(&[wrap.as_slice(), &flags].concat()).unwrap();
        let blob = text(&wrapped["CiphertextBlob"]);
        let refused: [&[&str]; 3] = [
            &["decrypt", "--ciphertext-blob", &blob],
            &["encrypt", "--key-id", &key, "--plaintext", "AA=="],
            &["generate-data-key", "--key-id", &key],
        ];
        for call in refused {
            assert_eq!(
                kms.code(&[call, &flags].concat()),
                "Forbidden.NoPermission",
                "{call:?}"
            );
        }
    }
}

/// The promise: no call that begins after DisableKey has returned succeeds.
#[test]
fn disable_key_is_a_line_in_time() {
    let kms = Kms::start();
    let key = kms.create_key();
    for round in 0..5 {
        kms.ctl(&["enable-key", "--key-id", &key]).unwrap();
        let stop = AtomicBool::new(false);
        let (last_success, returned) = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let client = kms.client();
                        let mut last = None;
                        while !stop.load(Ordering::Relaxed) {
                            let request = proto::GenerateDataKeyRequest {
                                key_id: key.clone(),
                                ..Default::default()
                            };
                            let begun = Instant::now();
                            if client
                                .call(|mut kms| async move { kms.generate_data_key(request).await })
                                .is_ok()
                            {
                                last = Some(begun);
                            }
                        }
                        last
                    })
                })
                .collect();
            let control = kms.client();
            let counted = || {
                let request = proto::GetMetricsRequest {};
                let answer = control.call(|mut kms| async move { kms.get_metrics(request).await });
                answer.unwrap().data_keys_issued
            };
            let before = counted();
            while counted() < before + 50 {}
            let request = proto::DisableKeyRequest { key_id: key.clone() };
            control
                .call(|mut kms| async move { kms.disable_key(request).await })
                .unwrap();
            let returned = Instant::now();
            let before = counted();
            for _ in 0..50 {
                assert_eq!(
                    counted(),
                    before,
                    "round {round}: a key was issued after DisableKey"
                );
            }
            stop.store(true, Ordering::Relaxed);
            let last = workers
                .into_iter()
                .filter_map(|worker| worker.join().unwrap())
                .max();
            (last.unwrap(), returned)
        });
        assert!(last_success < returned, "round {round}");
    }
}
