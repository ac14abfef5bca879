#!/usr/bin/env bash
# Makes the host's storage fail at every request of a workload, one after the other, and looks for what had been acknowledged
# and is gone, for panics, and for what hangs.
#   faults.sh [INJECTIONS]    every one there is, or so many of each fault
#   faults.sh --prove         plants each bug of tests/faults/bugs in a copy of this clone, and wants it found
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

[[ $EUID -eq 0 ]] || die "mounting a FUSE filesystem needs root"

LOGS="$(mktemp -d "${TMPDIR:-/tmp}/cmkfs-faults.XXXXXX")"
trap 'rm -rf "$LOGS"' EXIT

# Runs the test in the current directory, each fault in a process of its own: RocksDB has one pool of threads in each, and
# a thread that met an error sleeps for a second. Fails if one fails, or is found in what it must not be.
fail_storage() {
    local fault status=0 pids=()
    cargo test --release --locked --workspace --test faults --no-run
    for fault in Eio Enospc Short Torn Lost Unreadable; do
        FAULTS_ONLY="$fault" cargo test --release --locked --workspace --test faults -- --nocapture >"$LOGS/$fault" 2>&1 &
        pids+=($!)
    done
    for fault in "${pids[@]}"; do
        wait "$fault" || status=1
    done
    grep -hE -A 100 '^violation|hang:|panicked at' "$LOGS"/[A-Z]* || true
    grep -hE '^[A-Z][a-z]+: [0-9]+ injections' "$LOGS"/[A-Z]* || true
    # A process that broke off has no summary.
    [[ $(cat "$LOGS"/[A-Z]* | grep -c 'silent losses$') -eq 6 ]] || status=1
    cat "$LOGS"/[A-Z]* | awk '/ silent losses$/ { if ($1 > sites) sites = $1; injections += $3; panics += $5; hangs += $7; losses += $9 }
        / hang: / { hangs += 1 }
        END { printf "%d sites, %d injections, %d panics, %d hangs, %d silent losses\n", sites, injections, panics, hangs, losses }'
    return "$status"
}

if [[ "${1:-}" != --prove ]]; then
    export FAULTS_INJECTIONS="${1:-0}"
    step "install what is missing"
    scripts/setup.sh
    step "make storage fail"
    fail_storage || die "storage that fails does what it must not"
    exit
fi

step "install what is missing"
scripts/setup.sh
COPY="$LOGS/copy"
mkdir "$COPY"
export FAULTS_INJECTIONS=40
# Cargo takes what it built of the copy for what this clone would give: it goes by the times of files.
trap 'cargo clean -q --release -p cmkfs; rm -rf "$LOGS"' EXIT
for bug in "$PWD"/tests/faults/bugs/*.patch; do
    step "plant '$(basename "$bug" .patch)'"
    rm -rf "$COPY/clone"
    git clone -q . "$COPY/clone"
    git -C "$COPY/clone" apply "$bug"
    (cd "$COPY/clone" && cargo build --release --locked --workspace --bins) || die "with the bug planted it does not build"
    if (cd "$COPY/clone" && fail_storage) >"$COPY/log" 2>&1; then
        die "the bug was not found: $(tail -n 1 "$COPY/log")"
    fi
    grep -q '^violation' "$COPY/log" || die "the test broke off: $(tail -n 3 "$COPY/log")"
    summary="$(grep ' sites, ' "$COPY/log" | tail -n 1)"
    held "$summary; the first: $(grep -m 1 '^violation' "$COPY/log" | cut -c 1-300)"
done
