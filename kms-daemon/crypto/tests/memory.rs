//! What keys leave behind in the memory of the process that used them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[allow(dead_code)]
#[path = "../../../tests/common/memory.rs"]
mod memory;

use kms_crypto::{KeySalt, Label, NonceSource, Prf, Sealer, SecretKey, derive};
use memory::{Findings, Needles};

fn here(needles: &Needles) -> Findings {
    needles.search(std::process::id())
}

/// One test: others' threads would have keys of their own about.
#[test]
fn keys_lie_in_the_arena_alone_and_nowhere_once_they_are_dropped() {
    let mut needles = Needles::default();
    let parent = SecretKey::generate().unwrap();
    needles.add_key("parent", parent.expose());
    let key = derive(&parent, KeySalt(b"salt"), Label::Blob);
    needles.add_key("derived", key.expose());
    let prf_key = SecretKey::generate().unwrap();
    needles.add_key("prf", prf_key.expose());
    // The helper's own copies are gone, too: it computed with them on this stack and heap.
    kms_crypto::wipe_stack::<65_536>();

    let (sealer, prf) = (Sealer::new(key), Prf::new(prf_key));
    let nonces = NonceSource::new().unwrap();
    let mut block = vec![1; 4096];
    let nonce = nonces.next().unwrap();
    let tag = sealer.seal(nonce, b"aad", &mut block).unwrap();
    sealer.open(nonce, b"aad", &mut block, tag).unwrap();
    assert_ne!(prf.of(&[b"name"]), [0; 32]);

    let live = here(&needles);
    for name in ["parent", "derived", "prf"] {
        assert!(live.has(name), "the search finds {name} while it is there");
    }
    for (form, places) in &live.places {
        assert!(
            form.ends_with("half") && places.len() == 1,
            "{form} is at {places:#?}"
        );
    }
    drop((parent, sealer, prf));
    let gone = here(&needles);
    assert!(gone.places.is_empty(), "{:#?}", gone.places);
    assert!(gone.searched > 0);
}
