#!/usr/bin/env bash
# Installs what is missing, then runs every test; arguments go to `cargo test`. The target directory lies outside
# the clone, so that a second clone on the same machine compiles nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

step "install what is missing"
scripts/setup.sh
step "build and run the tests (target directory: $CARGO_TARGET_DIR)"
exec cargo test --release --locked --workspace "$@"
