//! Where the programs under test are.

use std::path::{Path, PathBuf};

/// A program of this workspace.
pub fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_cmkfs")).with_file_name(name);
    assert!(
        path.exists(),
        "{} is missing: 'cargo test --workspace' builds it, as scripts/test.sh does",
        path.display()
    );
    path
}
