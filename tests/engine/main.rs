//! The engine, driven without FUSE, with a KMS in memory and a clock moved by hand.

// clippy.toml permits these in functions marked #[test] alone; here everything is a test, or helps one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod anchor;
mod check;
mod corruption;
mod crash;
mod directories;
mod domains;
mod full;
mod golden;
mod keys;
mod model;
mod reference;
mod roots;
mod space;
mod support;
mod tree;
