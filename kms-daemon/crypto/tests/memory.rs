//! What keys leave behind in the memory of the process that used them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use kms_crypto::{KeySalt, Label, NonceSource, Prf, Sealer, SecretKey, derive};
use secret_search::Needles;
use std::sync::Barrier;

/// One test: others' threads would have keys of their own about. The keys are used on a thread that stands still while
/// another searches, so that nothing is written over what it left on its stack.
#[test]
fn keys_lie_in_the_arena_alone_and_nowhere_once_they_are_dropped() {
    let (used, dropped, go_on) = (Barrier::new(2), Barrier::new(2), Barrier::new(2));
    let (send, needles) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut needles = Needles::default();
            let parent = SecretKey::generate().unwrap();
            needles.add_key("parent", parent.expose());
            let (sealer, prf) = use_keys(&parent, &mut needles);
            send.send(needles).unwrap();
            used.wait();
            go_on.wait();
            drop((parent, sealer, prf));
            dropped.wait();
            go_on.wait();
        });
        let needles = needles.recv().unwrap();
        used.wait();
        let live = needles.search(std::process::id()).unwrap();
        go_on.wait();
        dropped.wait();
        let gone = needles.search(std::process::id()).unwrap();
        go_on.wait();

        for name in ["parent", "derived", "prf"] {
            assert!(live.has(name), "the search finds {name} while it is there");
        }
        for (form, places) in &live.places {
            assert!(
                form.ends_with("half") && places.len() == 1,
                "{form} is at {places:#?}"
            );
        }
        assert!(gone.places.is_empty(), "{:#?}", gone.places);
        assert!(gone.searched > 0);
    });
}

fn use_keys(parent: &SecretKey, needles: &mut Needles) -> (Sealer, Prf) {
    // What is looked for has to be known first; the helper computes with it on this stack.
    let twin = derive(parent, KeySalt(b"salt"), Label::Blob);
    needles.add_key("derived", twin.expose());
    drop(twin);
    let prf_key = SecretKey::generate().unwrap();
    needles.add_key("prf", prf_key.expose());
    wipe_all_below();

    let sealer = Sealer::new(derive(parent, KeySalt(b"salt"), Label::Blob));
    let prf = Prf::new(prf_key);
    let nonces = NonceSource::new().unwrap();
    let mut block = vec![1; 4096];
    let nonce = nonces.next().unwrap();
    let tag = sealer.seal(nonce, b"aad", &mut block).unwrap();
    sealer.open(nonce, b"aad", &mut block, tag).unwrap();
    // Last, as what goes least deep: nothing is written over it.
    assert_ne!(prf.of(&[b"name"]), [0; 32]);
    (sealer, prf)
}

/// Independent of what is tested.
#[inline(never)]
fn wipe_all_below() {
    let mut below = [0_u8; 65_536];
    std::hint::black_box(&mut below);
}
