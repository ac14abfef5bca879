#!/usr/bin/env bash
# Revocation as an adversary sees it: processes that read and write all the time, through descriptors and mappings that they
# keep, while the key is disabled and enabled again and again, and while the mount or kmsd is stopped, killed or unmounted
# lazily. Fails if any access succeeds that began after DisableKey returned, if content that was acknowledged is lost, or if
# anything hangs.
#   revocation.sh [--quick]     the quick form is for a look in between
# CYCLES, INODES, CONTENT_MIB and FAULT_CYCLES (of each fault) in the environment say otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

case "${1:-}" in
"") defaults=(200 10000 1024 100) ;;
--quick) defaults=(20 1000 128 5) ;;
*) die "'$1' is no option" ;;
esac
export CYCLES="${CYCLES:-${defaults[0]}}" INODES="${INODES:-${defaults[1]}}" CONTENT_MIB="${CONTENT_MIB:-${defaults[2]}}"
FAULT_CYCLES="${FAULT_CYCLES:-${defaults[3]}}"
for number in "$CYCLES" "$INODES" "$CONTENT_MIB" "$FAULT_CYCLES"; do
    [[ "$number" =~ ^[0-9]+$ ]] || die "'$number' is no number"
done
[[ $EUID -eq 0 ]] || die "ending the mounts of a kmsd by force is tried as root"
# What the mount has to go dark before it is ended, where it is to be ended.
SHORT=(-o drain_max_ms=100)
HERDER=""

step "install what is missing, and build"
scripts/setup.sh
build
# shellcheck disable=SC2119
scratch_begin
# In memory: what is logged there is not to compete for the disk.
STATE="$(mktemp -d /dev/shm/cmkfs-revocation.XXXXXX)"
export MNT STATE KMSCTL="$BIN/kmsctl" KEY
rustc -O --edition 2024 -o "$SCRATCH/revocation" scripts/revocation/main.rs

script_end() {
    herd_stop
    # A stopped process does not end politely.
    local pid
    for pid in $MOUNT_PID $KMSD_PID; do
        kill -CONT "$pid" 2>/dev/null
    done
    rm -rf "$STATE"
}

# Starts the processes that hold files. $1: all, or readers alone.
herd_start() {
    export MOUNT_PID KMSD_PID
    coproc HERD { exec "$SCRATCH/revocation" herd "$1" 9>&-; }
    exec {HERD_IN}>&"${HERD[1]}" {HERD_OUT}<&"${HERD[0]}"
    HERDER="$HERD_PID"
    herd_answers 120
}

# Waits for the outcome of a command; REPLY says what it was. Everything else that is said is shown.
herd_answers() {
    while read -r -t "$1" -u "$HERD_OUT"; do
        case "$REPLY" in
        "done "*)
            REPLY="${REPLY#done }"
            return 0
            ;;
        "failed"*) die "$REPLY" ;;
        *) printf '%s\n' "$REPLY" ;;
        esac
    done
    die "the processes that hold files say nothing"
}

# $1: how long it may take; then the command.
herd() {
    local limit="$1"
    shift
    printf '%s\n' "$*" >&"$HERD_IN"
    herd_answers "$limit"
}

herd_stop() {
    [[ -n "$HERDER" ]] || return 0
    # What was started meanwhile has copies of these pipes: closing them says nothing.
    { printf 'end\n' >&"$HERD_IN"; } 2>/dev/null && within 10 herd_ended
    exec {HERD_IN}>&- {HERD_OUT}<&-
    end_process "$HERDER"
    HERDER=""
}

herd_ended() {
    [[ "$(process_state "$HERDER")" =~ ^(Z|)$ ]]
}

step "fill a volume: $INODES files, and $CONTENT_MIB MiB"
kmsd_start
KEY="$(key_create)"
"$BIN/cmkfs" create "$VOLUME" --key-id "$KEY" >/dev/null
# A disk that others keep busy is not to have the mount ended by force.
volume_mount -o drain_max_ms=28000
"$SCRATCH/revocation" fill

step "disable and enable the key $CYCLES times under load"
herd_start all
herd $((CYCLES * 60 + 60)) cycles "$CYCLES"
held "$REPLY"
herd_stop
lost="$(grep -c 'is lost' "$SCRATCH/mount.log" || true)"
[[ "$lost" -eq 0 ]] || die "the mount says that content is lost: $(grep -m 3 'is lost' "$SCRATCH/mount.log")"
volume_umount
volume_check
volume_mount
"$SCRATCH/revocation" verify unmounted
held "everything is there after a remount, too"

# SIGKILL, to a child of this script.
put_down() {
    kill -KILL "$1"
    wait "$1" 2>/dev/null || true
}

# One fault: $1. The key is enabled, the volume mounted and held by readers before; nothing is thereafter.
fault() {
    local what="$1" pid
    volume_mount "${SHORT[@]}"
    herd_start readers
    pid="$MOUNT_PID"
    sleep "0.$((RANDOM % 3))$((RANDOM % 10))"
    case "$what" in
    stop) kill -STOP "$pid" ;;
    kill) put_down "$pid" ;;
    lazy) umount -l "$MNT" ;;
    restart)
        put_down "$KMSD_PID"
        kmsd_start
        ;;
    stop-restart)
        kill -STOP "$pid"
        put_down "$KMSD_PID"
        kmsd_start
        ;;
    kill-restart)
        put_down "$KMSD_PID"
        put_down "$pid"
        kmsd_start
        ;;
    silent)
        # The mount's requests wait for a kmsd that does not answer.
        kill -STOP "$KMSD_PID"
        (cat "$MNT"/inodes/*/* >/dev/null 2>&1 9>&- &)
        sleep "0.$((RANDOM % 10))"
        kill -CONT "$KMSD_PID"
        ;;
    esac
    herd 120 revoke
    case "$what" in
    stop | kill | lazy | restart | silent)
        [[ "$REPLY" == revoked\ * ]] || die "$what: $REPLY"
        ;;
    *)
        [[ "$REPLY" == refused\ *RevocationIncomplete*"process $pid of"* ]] || die "$what: $REPLY"
        ;;
    esac
    read -r _ took accesses _ <<<"$REPLY"
    case "$what" in
    lazy | restart | silent)
        herd 120 restore
        herd_stop
        release_mount "$MNT"
        ;;
    *)
        herd_stop
        umount -l "$MNT"
        # With its users it is gone.
        kmsctl disable-key --key-id "$KEY" >/dev/null || die "$what: the key is not disabled though the mount is gone"
        kmsctl enable-key --key-id "$KEY" >/dev/null
        ;;
    esac
    within 60 mount_ended || die "$what: the mount's daemon does not end"
    wait "$MOUNT_PID" 2>/dev/null || true
    MOUNT_PID=""
}

volume_umount
[[ "$FAULT_CYCLES" -gt 0 ]] || exit 0
for what in stop kill lazy restart stop-restart kill-restart silent; do
    step "$FAULT_CYCLES times: $what"
    slowest=0 all=0
    for _ in $(seq "$FAULT_CYCLES"); do
        fault "$what"
        slowest=$((took > slowest ? took : slowest))
        [[ ! "$accesses" =~ ^[0-9]+$ ]] || all=$((all + accesses))
    done
    held "DisableKey took $slowest ms at most; $all accesses in the dark, none successful"
done
volume_check
