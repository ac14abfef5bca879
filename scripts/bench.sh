#!/usr/bin/env bash
# fio and small files: cmkfs against the raw directory it lies on and against gocryptfs, side by side in one run.
# Prints medians and ratios to the raw directory.
#   bench.sh [ROUNDS [DIRECTORY]]    3 rounds in $TMPDIR unless said otherwise
# "Cold" workloads run after a remount and with the host's caches dropped.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

ROUNDS="${1:-3}"
FILES=4000
[[ "$ROUNDS" =~ ^[1-9][0-9]*$ ]] || die "'$ROUNDS' is no number of rounds"
[[ $EUID -eq 0 ]] || die "it drops the host's caches: run it as root"

step "install what is missing, and build"
scripts/setup.sh --bench
build
scratch_begin "${2:-}"
rustc --edition 2024 -O -o "$SCRATCH/smallfiles" scripts/smallfiles.rs

SIDES=(raw cmkfs)
if command -v gocryptfs >/dev/null; then
    SIDES+=(gocryptfs)
else
    echo "SKIPPED: gocryptfs is not installed; its column is missing" >&2
fi
GOCRYPT_MNT="$SCRATCH/gocryptfs.mnt"
RESULTS="$SCRATCH/results"
mkdir -p "$SCRATCH/raw" "$SCRATCH/gocryptfs" "$GOCRYPT_MNT"

# Called by the library at exit.
script_end() {
    release_mount "$GOCRYPT_MNT"
}

# The directory under test of a side.
place() {
    case "$1" in
    raw) echo "$SCRATCH/raw" ;;
    cmkfs) echo "$MNT" ;;
    gocryptfs) echo "$GOCRYPT_MNT" ;;
    esac
}

side_mount() {
    case "$1" in
    cmkfs) volume_mount ;;
    gocryptfs) gocryptfs -q -extpass "echo bench" "$SCRATCH/gocryptfs" "$GOCRYPT_MNT" ;;
    esac
}

side_umount() {
    case "$1" in
    cmkfs) volume_umount ;;
    gocryptfs) fusermount3 -u "$GOCRYPT_MNT" ;;
    esac
}

# Drops every cache on the way to a side.
make_cold() {
    side_umount "$1"
    sync
    echo 3 >/proc/sys/vm/drop_caches
    side_mount "$1"
}

# $1: side, $2: workload, $3: value.
note() {
    printf '%s\t%s\t%s\n' "$2" "$1" "$3" >>"$RESULTS"
}

# $1: side, $2: job, $3: read or write, $4: bw (KiB/s) or iops.
fio_job() {
    local value
    value="$(DIR="$(place "$1")" fio --output-format=json "scripts/fio/$2.fio" | jq -er "[.jobs[].$3.$4] | add")" ||
        die "fio failed: $2 on $1"
    note "$1" "$2 ($4)" "$value"
}

# $1: side, $2: name of the workload, the rest: arguments of smallfiles behind the operation and the directory.
small_files() {
    local side="$1" name="$2" operation="$3" dir="$4" value
    shift 4
    value="$("$SCRATCH/smallfiles" "$operation" "$(place "$side")/$dir" "$@")" || die "smallfiles failed: $name on $side"
    note "$side" "$name (files/s)" "$value"
}

# How often per second a command can be done.
rate() {
    local side="$1" name="$2" begin
    shift 2
    begin="$(date +%s%N)"
    "$@" >/dev/null
    note "$side" "$name (1/s)" "$(awk -v begin="$begin" -v end="$(date +%s%N)" 'BEGIN { print 1e9 / (end - begin) }')"
}

run_side() {
    local side="$1" dir
    dir="$(place "$side")"
    fio_job "$side" seq-write write bw
    make_cold "$side"
    fio_job "$side" seq-read read bw
    fio_job "$side" rand-read-direct read iops
    fio_job "$side" rand-write write iops
    fio_job "$side" rand-write-sync-1 write iops
    fio_job "$side" rand-write-sync-4 write iops
    small_files "$side" "create, 1 job" create one "$FILES" 1
    small_files "$side" "create, 4 jobs" create four "$FILES" 4
    make_cold "$side"
    small_files "$side" "walk, cold" walk one
    make_cold "$side"
    small_files "$side" "read, cold" read one "$FILES" 1
    small_files "$side" "unlink" unlink one "$FILES" 1
    small_files "$side" "create and fsync each" create-fsync synced 500 1
    small_files "$side" "source tree of 38 MB" tree tree
    make_cold "$side"
    rate "$side" "grep -r, cold" grep -rc nothing-like-it "$dir/tree" || true
    rate "$side" "rm -rf" rm -rf "$dir/tree"
    find "$dir" -mindepth 1 -delete
}

step "start kmsd, make the volumes"
kmsd_start
KEY="$(key_create)"
"$BIN/cmkfs" create "$VOLUME" --key-id "$KEY" >/dev/null
if [[ " ${SIDES[*]} " == *" gocryptfs "* ]]; then
    gocryptfs -q -init -scryptn 10 -extpass "echo bench" "$SCRATCH/gocryptfs"
fi
for side in "${SIDES[@]}"; do
    side_mount "$side"
done

for round in $(seq "$ROUNDS"); do
    for side in "${SIDES[@]}"; do
        step "round $round of $ROUNDS: $side"
        run_side "$side"
    done
done

step "medians of $ROUNDS rounds; in brackets the ratio to the raw directory"
awk -F '\t' -v sides="${SIDES[*]}" '
    function median(list, count, i, j, value) {
        for (i = 2; i <= count; i++) {
            value = list[i]
            for (j = i - 1; j >= 1 && list[j] > value; j--) list[j + 1] = list[j]
            list[j + 1] = value
        }
        return count % 2 ? list[(count + 1) / 2] : (list[count / 2] + list[count / 2 + 1]) / 2
    }
    !($1 in known) { known[$1]; order[++workloads] = $1 }
    { values[$1, $2, ++counts[$1, $2]] = $3 }
    END {
        side_count = split(sides, side, " ")
        printf "%-32s", "workload"
        for (s = 1; s <= side_count; s++) printf "%22s", side[s]
        print ""
        for (w = 1; w <= workloads; w++) {
            printf "%-32s", order[w]
            for (s = 1; s <= side_count; s++) {
                n = counts[order[w], side[s]]
                split("", list)
                for (i = 1; i <= n; i++) list[i] = values[order[w], side[s], i] + 0
                m = n ? median(list, n) : 0
                if (s == 1) raw = m
                printf "%22s", sprintf(m >= 100 ? "%.0f [%.2f]" : "%.2f [%.2f]", m, raw ? m / raw : 0)
            }
            print ""
        }
    }' "$RESULTS"
for side in "${SIDES[@]}"; do
    side_umount "$side"
done
