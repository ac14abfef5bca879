//! Vectors of others: RFC 8452, and Wycheproof, which collects what broke implementations.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use kms_crypto::{CryptoError, Nonce, Prf, Sealer, SecretKey, Tag};
use wycheproof::{TestResult, aead, mac};

fn key(bytes: &[u8]) -> SecretKey {
    SecretKey::fill_with(|key| {
        key.copy_from_slice(bytes);
        Ok::<(), CryptoError>(())
    })
    .unwrap()
}

fn hex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

/// Of one key: what is sealed with which additional data, and what that gives, the tag at its end.
struct Vector(&'static str, &'static str, &'static str);

/// RFC 8452, appendix C.2: key and nonce of the first table, whose plaintexts and additional data grow.
const RFC_8452: [Vector; 8] = [
    Vector("", "", "07f5f4169bbf55a8400cd47ea6fd400f"),
    Vector(
        "0100000000000000",
        "",
        "c2ef328e5c71c83b843122130f7364b761e0b97427e3df28",
    ),
    Vector(
        "010000000000000000000000",
        "",
        "9aab2aeb3faa0a34aea8e2b18ca50da9ae6559e48fd10f6e5c9ca17e",
    ),
    Vector(
        "01000000000000000000000000000000",
        "",
        "85a01b63025ba19b7fd3ddfc033b3e76c9eac6fa700942702e90862383c6c366",
    ),
    Vector(
        "0200000000000000",
        "01",
        "1de22967237a813291213f267e3b452f02d01ae33e4ec854",
    ),
    Vector(
        "020000000000000000000000",
        "01",
        "163d6f9cc1b346cd453a2e4cc1a4a19ae800941ccdc57cc8413c277f",
    ),
    Vector(
        "02000000000000000000000000000000",
        "01",
        "c91545823cc24f17dbb0e9e807d5ec17b292d28ff61189e8e49f3875ef91aff7",
    ),
    Vector(
        "02000000",
        "010000000000000000000000",
        "22b3f4cd1835e517741dfddccfa07fa4661b74cf",
    ),
];

#[test]
fn what_rfc_8452_seals_is_sealed_so() {
    let mut bytes = [0; 32];
    bytes[0] = 1;
    let sealer = Sealer::new(key(&bytes));
    let mut nonce = [0; 12];
    nonce[0] = 3;
    for Vector(plain, aad, sealed) in RFC_8452 {
        let mut buffer = hex(plain);
        let tag = sealer.seal(Nonce(nonce), &hex(aad), &mut buffer).unwrap();
        assert_eq!([buffer.as_slice(), &tag.0].concat(), hex(sealed), "{plain} {aad}");
    }
}

#[test]
fn what_wycheproof_has_of_the_cipher_is_sealed_so_and_nothing_else_opens() {
    let set = aead::TestSet::load(aead::TestName::AesGcmSiv).unwrap();
    let (mut good, mut bad) = (0, 0);
    for group in set.test_groups.iter().filter(|group| group.key_size == 256) {
        assert_eq!((group.nonce_size, group.tag_size), (96, 128));
        for test in &group.tests {
            let what = format!("{}: {}", test.tc_id, test.comment);
            let sealer = Sealer::new(key(&test.key));
            let nonce = Nonce(test.nonce.to_vec().try_into().unwrap());
            let tag = Tag(test.tag.to_vec().try_into().unwrap());
            let mut opened = test.ct.to_vec();
            let outcome = sealer.open(nonce, &test.aad, &mut opened, tag);
            match test.result {
                TestResult::Valid => {
                    outcome.unwrap();
                    assert_eq!(opened, test.pt.to_vec(), "{what}");
                    let made = sealer.seal(nonce, &test.aad, &mut opened).unwrap();
                    assert_eq!((opened, made), (test.ct.to_vec(), tag), "{what}");
                    good += 1;
                }
                TestResult::Invalid => {
                    assert_eq!(outcome, Err(CryptoError::Authentication), "{what}");
                    assert!(opened.iter().all(|byte| *byte == 0), "{what}");
                    bad += 1;
                }
                TestResult::Acceptable => panic!("{what}: nothing here is merely acceptable"),
            }
        }
    }
    assert!(good > 50 && bad > 20, "{good} {bad}");
}

#[test]
fn what_wycheproof_has_of_the_prf_is_what_it_gives() {
    let set = mac::TestSet::load(mac::TestName::HmacSha256).unwrap();
    let mut count = 0;
    let groups = set.test_groups.iter();
    for group in groups.filter(|group| group.key_size == 256 && group.tag_size == 256) {
        for test in &group.tests {
            let (head, tail) = test.msg.split_at(test.msg.len() / 2);
            let given = Prf::new(key(&test.key)).of(&[head, tail]);
            let is_same = given.as_slice() == &test.tag[..];
            assert_eq!(
                is_same,
                test.result == TestResult::Valid,
                "{}: {}",
                test.tc_id,
                test.comment
            );
            count += 1;
        }
    }
    assert!(count > 50, "{count}");
}
