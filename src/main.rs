//! The `cmkfs` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    cmkfs::adapters::cli::run()
}
