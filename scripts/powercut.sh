#!/usr/bin/env bash
# Cuts the power of a simulated machine, over and over, and looks for what had been acknowledged and is gone.
#   powercut.sh [WORKLOADS] [STATES]    200 workloads and 12 states of the disk from each, unless said otherwise; and 300 kills
#                                       of each daemon
#   powercut.sh --prove                 plants each bug of tests/powercut/bugs in a copy of this clone, and wants it found
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

[[ $EUID -eq 0 ]] || die "loop devices and mounts need root"

# Runs the test in the current directory.
cut_power() {
    cargo test --release --locked --workspace --test powercut -- --nocapture
}

if [[ "${1:-}" != --prove ]]; then
    export POWERCUT_WORKLOADS="${1:-200}" POWERCUT_STATES="${2:-12}" POWERCUT_KILLS=300
    step "install what is missing"
    scripts/setup.sh
    # The test's own build makes none of the daemons.
    build
    step "cut the power $POWERCUT_STATES times in each of $POWERCUT_WORKLOADS workloads"
    cut_power
    exit
fi

step "install what is missing"
scripts/setup.sh
COPY="$(mktemp -d "${TMPDIR:-/tmp}/cmkfs-powercut.XXXXXX")"
# Cargo takes what it built of the copy for what this clone would give: it goes by the times of files.
trap 'cargo clean -q --release -p cmkfs; rm -rf "$COPY"' EXIT
export POWERCUT_WORKLOADS=60 POWERCUT_STATES=12
for bug in "$PWD"/tests/powercut/bugs/*.patch; do
    step "plant '$(basename "$bug" .patch)'"
    rm -rf "$COPY/clone"
    git clone -q . "$COPY/clone"
    git -C "$COPY/clone" apply "$bug"
    (cd "$COPY/clone" && cargo build --release --locked --workspace --bins) || die "with the bug planted it does not build"
    if (cd "$COPY/clone" && cut_power) >"$COPY/log" 2>&1; then
        die "the bug was not found: $(grep 'power cuts in' "$COPY/log")"
    fi
    summary="$(grep 'power cuts in' "$COPY/log")" || die "the test broke off: $(tail -n 3 "$COPY/log")"
    held "$summary; the first: $(grep -m 1 'power cut at' "$COPY/log")"
done
