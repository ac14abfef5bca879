//! What connects the engine to the world: the kernel, the KMS, the command line.

pub mod cli;
pub mod drill;
pub mod fuse;
pub mod kms;
