//! The whole product: a real kmsd, a real mount, real programs' system calls.

// clippy.toml permits these in functions marked #[test] alone; here everything is a test, or helps one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod acl;
mod attributes;
mod crash;
mod directories;
mod domains;
mod drill;
mod errors;
mod fencing;
mod files;
mod fsck;
mod handles;
mod integrity;
mod locks;
mod names;
mod posix;
mod privacy;
mod privileges;
#[path = "../common/program.rs"]
mod program;
mod random;
mod record;
mod remount;
mod revocation;
mod secrecy;
mod status;
mod times;
mod twin;
mod world;
