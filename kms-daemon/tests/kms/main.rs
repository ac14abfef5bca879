//! Tests of the KMS through its own front doors: a real kmsd on a temporary home, kmsctl, and the client library.

// clippy.toml permits these in functions marked #[test] alone; here everything is a test, or helps one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod audit;
mod crash;
mod cryptography;
mod daemon;
mod dependants;
mod destruction;
mod fixture;
mod golden;
mod import;
mod keys;
mod sessions;
