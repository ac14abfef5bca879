#!/usr/bin/env bash
# Installs what is missing, then runs every test. The target directory lies outside the clone, so that a second
# clone on the same machine compiles nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/cmkfs/target}"

echo "== 1/2 install what is missing"
scripts/setup.sh
echo "== 2/2 run the tests"
cargo test --release --locked --workspace
