//! How long sealing, opening, deriving and making a key take: medians, in nanoseconds. Built before and after a
//! change, and run side by side, it shows what the change costs.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use kms_crypto::{KeySalt, Label, NonceSource, Sealer, SecretKey, derive};
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 301;

fn median(calls: u32, mut work: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..calls {
                work();
            }
            start.elapsed().as_nanos() as f64 / f64::from(calls)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn main() {
    let key = SecretKey::generate().unwrap();
    let sealer = Sealer::new(derive(&key, KeySalt(&[1]), Label::Blob));
    let nonces = NonceSource::new().unwrap();
    let aad = [7; 44];
    for size in [64, 4096] {
        let mut block = vec![0x5a; size];
        let seal = median(200, || {
            black_box(sealer.seal(nonces.next().unwrap(), &aad, &mut block).unwrap());
        });
        let nonce = nonces.next().unwrap();
        let tag = sealer.seal(nonce, &aad, &mut block).unwrap();
        let sealed = block.clone();
        let copy = median(200, || {
            block.copy_from_slice(black_box(&sealed));
        });
        let open = median(200, || {
            block.copy_from_slice(&sealed);
            sealer.open(nonce, &aad, black_box(&mut block), tag).unwrap();
        });
        println!("{size:>5} bytes: seal {seal:.0}, open {:.0}", open - copy);
        let batches = median(10, || {
            let batch = sealer.batch();
            for _ in 0..32 {
                black_box(batch.seal(nonces.next().unwrap(), &aad, &mut block).unwrap());
            }
        });
        println!("{size:>5} bytes, 32 in a batch: seal {:.0}", batches / 32.0);
    }
    let derived = median(50, || {
        black_box(derive(&key, KeySalt(&aad), Label::Blob));
    });
    let filled = median(200, || {
        let fill = |bytes: &mut [u8; 32]| {
            bytes[0] = 1;
            Ok::<(), ()>(())
        };
        black_box(SecretKey::fill_with(fill).unwrap());
    });
    println!("derive {derived:.0}, key {filled:.0}");
}
