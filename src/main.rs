//! The `cmkfs` program.

use std::process::ExitCode;

/// Plaintext is in freed memory no longer than until it is freed.
#[global_allocator]
static ALLOCATOR: kms_crypto::WipingAllocator = kms_crypto::WipingAllocator;

fn main() -> ExitCode {
    cmkfs::adapters::cli::run()
}
