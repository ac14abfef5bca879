#!/usr/bin/env bash
# Makes the host's storage fail at every request of a workload, one after the other, and looks for what had been acknowledged
# and is gone, for panics, and for what hangs.
#   faults.sh [INJECTIONS]    every one there is, unless a number is said
#   faults.sh --prove         plants each bug of tests/faults/bugs in a copy of this clone, and wants it found
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

[[ $EUID -eq 0 ]] || die "mounting a FUSE filesystem needs root"

# Runs the test in the current directory.
fail_storage() {
    cargo test --release --locked --workspace --test faults -- --nocapture
}

if [[ "${1:-}" != --prove ]]; then
    export FAULTS_INJECTIONS="${1:-0}"
    step "install what is missing"
    scripts/setup.sh
    step "make storage fail"
    fail_storage
    exit
fi

step "install what is missing"
scripts/setup.sh
COPY="$(mktemp -d "${TMPDIR:-/tmp}/cmkfs-faults.XXXXXX")"
trap 'rm -rf "$COPY"' EXIT
export FAULTS_INJECTIONS=240
for bug in "$PWD"/tests/faults/bugs/*.patch; do
    step "plant '$(basename "$bug" .patch)'"
    rm -rf "$COPY/clone"
    git clone -q . "$COPY/clone"
    git -C "$COPY/clone" apply "$bug"
    (cd "$COPY/clone" && cargo build --release --locked --workspace --bins) || die "with the bug planted it does not build"
    if (cd "$COPY/clone" && fail_storage) >"$COPY/log" 2>&1; then
        die "the bug was not found: $(grep 'silent losses' "$COPY/log")"
    fi
    summary="$(grep 'silent losses' "$COPY/log")" || die "the test broke off: $(tail -n 3 "$COPY/log")"
    held "$summary; the first: $(grep -m 1 '^violation' "$COPY/log" | cut -c 1-300)"
done
