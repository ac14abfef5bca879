#!/usr/bin/env bash
# Many files on a scratch mount: in one directory, then in a tree of a thousand. Prints the seconds that making, listing, looking
# at (after a remount, so that nothing is cached) and removing all of them takes, and the most memory that the mount's daemon
# had. Fails if one is lost or doubled, or if the memory passes its bound.
#   scale.sh [FILES]     1000000 of each unless said otherwise
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

FILES="${1:-1000000}"
[[ "$FILES" =~ ^[1-9][0-9]*$ ]] || die "'$FILES' is no number of files"
# docs/ARCHITECTURE.md, "Memory", says what it is made of.
MEMORY_MAX_MIB=512

step "install what is missing, and build"
scripts/setup.sh
build
scratch_begin
rustc -O --edition 2024 -o "$SCRATCH/scale" scripts/scale.rs
kmsd_start
"$BIN/cmkfs" create "$VOLUME" --key-id "$(key_create)" >/dev/null

# Notes what the daemon has had at most; to be called before it ends.
note_memory() {
    local now
    now="$(awk '/^VmHWM:/ { print int($2 / 1024) + 1 }' "/proc/$MOUNT_PID/status")"
    peak=$((now > peak ? now : peak))
}

# $1: what it is called; then what to run.
timed() {
    local what="$1" begin
    shift
    begin="$(date +%s%N)"
    "$@"
    printf '   %-12s %8.1f s\n' "$what" "$(jq -n "($(date +%s%N) - $begin) / 1e9")"
}

# $1: directories.
check() {
    local work=("$MNT/tree" "$FILES" "$1")
    peak=0
    volume_mount
    timed create "$SCRATCH/scale" create "${work[@]}"
    timed list "$SCRATCH/scale" list "${work[@]}"
    note_memory
    timed umount volume_umount
    timed fsck "$BIN/cmkfs" fsck "$VOLUME"
    timed mount volume_mount
    timed "cold list" "$SCRATCH/scale" list "${work[@]}"
    note_memory
    volume_umount
    volume_mount
    timed "cold stat" "$SCRATCH/scale" stat "${work[@]}"
    note_memory
    timed remove "$SCRATCH/scale" remove "${work[@]}"
    rmdir "$MNT/tree"
    note_memory
    timed umount volume_umount
    timed fsck volume_check
    [[ $peak -le $MEMORY_MAX_MIB ]] || die "the daemon had $peak MiB, more than $MEMORY_MAX_MIB"
    held "nothing lost or doubled; the daemon had $peak MiB at most"
}

step "$FILES files in one directory"
check 1
step "$FILES files in a tree of 1000 directories"
check 1000
