#!/usr/bin/env bash
# fsx on a scratch mount: random operations on one file, each read compared with what was written. Four ways: through the page
# cache; mostly through mappings; directly; and with much punching, allocating, cutting and copying of ranges. After each the
# volume is unmounted and every block checked.
#   fsx.sh [OPERATIONS]     1000000 of each unless said otherwise
# FSX_SEED repeats a run.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

OPERATIONS="${1:-1000000}"
[[ "$OPERATIONS" =~ ^[1-9][0-9]*$ ]] || die "'$OPERATIONS' is no number of operations"
# fsx never unmaps what it read through a mapping, and a process may have 65,530 mappings (vm.max_map_count): it is started
# anew, with another seed, after this many operations.
ROUND=20000

step "install what is missing, and build"
scripts/setup.sh --posix
build
scratch_begin
rustc -O --edition 2024 --crate-type cdylib -o "$SCRATCH/libdirect.so" scripts/direct.rs

seed="${FSX_SEED:-$((RANDOM << 15 | RANDOM))}"
kmsd_start
"$BIN/cmkfs" create "$VOLUME" --key-id "$(key_create)" >/dev/null

# $1: the largest file, $2: the largest operation, in bytes, $3: whether pages written through a mapping stay dirty; then
# weights. No operation is of no bytes: fsx takes the EINVAL that every filesystem has for that for a fault. Sizes go from files
# that lie in the database to those of many slots.
configure() {
    local weight
    printf 'flen = %s\nnomsyncafterwrite = %s\n[opsize]\nmin = 1\nmax = %s\n[weights]\n' "$1" "$3" "$2" >"$SCRATCH/fsx.toml"
    shift 3
    for weight in close_open=1 read=10 write=10 truncate=2 fsync=1 fdatasync=1 mapread=0 mapwrite=0 invalidate=0 "$@"; do
        # The last of a name counts.
        sed -i "/^${weight%=*} /d" "$SCRATCH/fsx.toml"
        printf '%s = %s.0\n' "${weight%=*}" "${weight#*=}" >>"$SCRATCH/fsx.toml"
    done
}

# Runs fsx as configured. $1: operations; then `env` arguments.
run_fsx() {
    local left="$1" count
    shift
    while [[ $left -gt 0 ]]; do
        count=$((left < ROUND ? left : ROUND))
        left=$((left - count))
        seed=$((seed + 1))
        env "$@" "$TOOLS/bin/fsx" -f "$SCRATCH/fsx.toml" -P "$SCRATCH" -N "$count" -S "$seed" "$MNT/$seed" \
            >"$SCRATCH/fsx.log" 2>&1 9>&- || {
            tail -n 40 "$SCRATCH/fsx.log" >&2
            die "fsx failed with seed $seed, its configuration: $(tr '\n' ' ' <"$SCRATCH/fsx.toml")"
        }
    done
}

# $1: what it is, $2: a command that does it; then mount options.
check() {
    local what="$1" how="$2" begin first
    shift 2
    step "$what: $OPERATIONS operations, seeds from $((seed + 1))"
    volume_mount "$@"
    begin="$(date +%s%N)"
    first="$seed"
    "$how"
    local ms=$((($(date +%s%N) - begin) / 1000000 + 1))
    volume_umount
    volume_check
    held "$((seed - first)) runs, $((OPERATIONS * 1000 / ms)) operations a second, then every block"
}

buffered() {
    configure 1048576 65536 false sendfile=2 posix_fadvise=1
    run_fsx "$OPERATIONS"
}

mapped() {
    configure 1048576 65536 true mapread=15 mapwrite=15 invalidate=2 read=5 write=5
    run_fsx "$OPERATIONS"
}

# Half of them past the page cache that mappings go through, half without one.
direct() {
    configure 1048576 65536 true mapread=2 mapwrite=2 close_open=2
    run_fsx "$((OPERATIONS / 2))" LD_PRELOAD="$SCRATCH/libdirect.so"
    volume_umount
    volume_check
    volume_mount -o cache=none
    configure 1048576 65536 false
    run_fsx "$((OPERATIONS - OPERATIONS / 2))"
}

# On a file small enough to change often between lying in the database and in slots.
mixed() {
    configure 393216 65536 false mapread=4 mapwrite=4 invalidate=1 truncate=6 punch_hole=8 posix_fallocate=6 copy_file_range=8 \
        sendfile=1 posix_fadvise=1
    run_fsx "$OPERATIONS"
}

check "through the page cache" buffered
check "mostly through mappings" mapped
check "directly" direct
check "punching, allocating, cutting and copying ranges" mixed
