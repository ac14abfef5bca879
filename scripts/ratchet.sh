#!/usr/bin/env bash
# Kills kmsd at each step of a ratchet, which destroys keys, and many a start that follows, and looks for a survivor that is
# lost, a destroyed key that is usable, and one that cmkfs-recover gets from any file that was ever written.
#   ratchet.sh [KILLS]    20 at each step, unless said otherwise
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

[[ $EUID -eq 0 ]] || die "tracing kmsd needs root"

export RATCHET_KILLS="${1:-20}"
step "install what is missing"
scripts/setup.sh
step "kill kmsd $RATCHET_KILLS times at each step of the ratchet"
cargo test --release --locked --workspace --test ratchet -- --nocapture
