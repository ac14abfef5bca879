# shellcheck shell=bash
# What the scripts share: the build's place, announced steps, and a scratch kmsd with a mounted volume that are
# taken down again whatever happens. Source it after `cd` to the root of the clone.

CMKFS_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/cmkfs"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$CMKFS_CACHE/target}"
export LC_ALL=C.UTF-8
BIN="$CARGO_TARGET_DIR/release"
export TOOLS="$CMKFS_CACHE/tools"

SCRIPT="$(basename "$0" .sh)"
STEP=0
SCRATCH=""
KMSD_PID=""
MOUNT_PID=""

# Announces a step.
step() {
    STEP=$((STEP + 1))
    printf '== %s %d: %s\n' "$SCRIPT" "$STEP" "$*"
}

# Says what was found to hold.
held() {
    printf '   ok: %s\n' "$*"
}

die() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
    exit 1
}

# Builds the three programs, with the same selection of packages as test.sh: RocksDB is compiled once.
build() {
    cargo build --release --locked --workspace --bins
    local program
    for program in kmsd kmsctl cmkfs; do
        [[ -x "$BIN/$program" ]] || die "the build left no $BIN/$program"
    done
}

# Makes the scratch directory and has it, and all that runs in it, removed at exit. $1: the directory to make it in.
scratch_begin() {
    SCRATCH="$(mktemp -d "${1:-${TMPDIR:-/tmp}}/cmkfs-$SCRIPT.XXXXXX")"
    SCRATCH="$(readlink -f "$SCRATCH")"
    export KMS_SOCKET="$SCRATCH/kmsd.sock"
    HOME_KMS="$SCRATCH/keystore"
    VOLUME="$SCRATCH/volume"
    MNT="$SCRATCH/mnt"
    mkdir -p "$MNT"
    trap scratch_end EXIT
    trap 'exit 130' INT TERM
}

scratch_end() {
    local status=$?
    trap - EXIT INT TERM
    set +e
    if declare -F script_end >/dev/null; then
        script_end
    fi
    cd /
    release_mount "$MNT"
    end_process "$MOUNT_PID"
    end_process "$KMSD_PID"
    if [[ $status -ne 0 ]]; then
        show_log kmsd
        show_log mount
        printf '%s: FAILED (exit %d)\n' "$SCRIPT" "$status" >&2
    fi
    if [[ -n "${KEEP_SCRATCH:-}" ]]; then
        printf '%s: kept %s\n' "$SCRIPT" "$SCRATCH" >&2
    elif ! is_mounted "$MNT"; then
        rm -rf --one-file-system "$SCRATCH"
    fi
    exit "$status"
}

show_log() {
    if [[ -s "$SCRATCH/$1.log" ]]; then
        printf -- '-- the last lines of %s:\n' "$1" >&2
        tail -n 20 "$SCRATCH/$1.log" >&2
    fi
}

# Ends a child of this script: first politely, after five seconds not.
end_process() {
    local pid="$1" try
    [[ -n "$pid" ]] || return 0
    kill -TERM "$pid" 2>/dev/null || return 0
    for try in $(seq 50); do
        [[ -d "/proc/$pid" && "$(process_state "$pid")" != Z ]] || break
        sleep 0.1
        if [[ $try -eq 50 ]]; then
            kill -KILL "$pid" 2>/dev/null
        fi
    done
    wait "$pid" 2>/dev/null
    return 0
}

process_state() {
    awk '/^State:/ { print $2 }' "/proc/$1/status" 2>/dev/null
}

# Whether anything is mounted there, by the kernel's table: a dead or a dark mount answers no stat(2), which
# mountpoint(1) goes by.
is_mounted() {
    awk -v at="$1" '$5 == at { found = 1 } END { exit !found }' /proc/self/mountinfo
}

# Unmounts whatever way works.
release_mount() {
    is_mounted "$1" || return 0
    "$BIN/cmkfs" umount "$1" 2>/dev/null || fusermount3 -u "$1" 2>/dev/null || umount "$1" 2>/dev/null ||
        umount -l "$1" 2>/dev/null || fusermount3 -uz "$1"
}

# Repeats a command until it succeeds; $1: seconds at most.
within() {
    local limit="$1" deadline
    shift
    deadline=$((SECONDS + limit))
    until "$@"; do
        [[ $SECONDS -lt $deadline ]] || return 1
        sleep 0.1
    done
}

# Starts kmsd and waits for its ready line. A first call creates the keystore.
kmsd_start() {
    local line
    [[ -d "$HOME_KMS" ]] || "$BIN/kmsd" init --home "$HOME_KMS" >>"$SCRATCH/kmsd.log" 2>&1 ||
        die "kmsd init failed: $(tail -n 1 "$SCRATCH/kmsd.log")"
    rm -f "$SCRATCH/kmsd.out"
    mkfifo "$SCRATCH/kmsd.out"
    "$BIN/kmsd" serve --home "$HOME_KMS" --socket "$KMS_SOCKET" >"$SCRATCH/kmsd.out" 2>>"$SCRATCH/kmsd.log" &
    KMSD_PID=$!
    # Opened for reading and writing, so that the daemon never meets a pipe without a reader.
    exec 9<>"$SCRATCH/kmsd.out"
    while read -r -t 30 -u 9 line; do
        if [[ "$line" == *ready* ]]; then
            return 0
        fi
    done
    die "kmsd did not become ready"
}

kmsd_stop() {
    end_process "$KMSD_PID"
    KMSD_PID=""
}

# Any operation of kmsctl; its JSON goes to the standard output.
kmsctl() {
    "$BIN/kmsctl" "$@"
}

# Makes a key and prints its id.
key_create() {
    kmsctl create-key --description "$SCRIPT" | jq -er 'first(.. | objects | (.KeyId // .key_id // empty))'
}

# Starts kmsd, makes a key and a volume under it, and mounts that.
scratch_volume() {
    kmsd_start
    "$BIN/cmkfs" create "$VOLUME" --key-id "$(key_create)" >/dev/null
    volume_mount
}

# Mounts in the foreground of a background process, so that its pid is known; extra arguments go to `mount`.
volume_mount() {
    "$BIN/cmkfs" mount "$VOLUME" "$MNT" --foreground "$@" >>"$SCRATCH/mount.log" 2>&1 9>&- &
    MOUNT_PID=$!
    within 30 mounted_or_dead
    is_mounted "$MNT" || die "the mount failed: $(tail -n 1 "$SCRATCH/mount.log")"
}

mounted_or_dead() {
    is_mounted "$MNT" || [[ "$(process_state "$MOUNT_PID")" =~ ^(Z|)$ ]]
}

# Unmounts and waits for the daemon to end, so that all is on disk.
volume_umount() {
    "$BIN/cmkfs" umount "$MNT" || die "cmkfs umount failed"
    within 60 mount_ended || die "the mount's daemon outlives its unmount"
    wait "$MOUNT_PID" || die "the mount's daemon ended with status $?"
    MOUNT_PID=""
}

# Checks every record and every block of the unmounted volume.
volume_check() {
    "$BIN/cmkfs" fsck --scrub "$VOLUME" || die "the volume is not consistent"
}

mount_ended() {
    [[ "$(process_state "$MOUNT_PID")" =~ ^(Z|)$ ]]
}

# Needs root or says so.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "root is needed for: $*; run it as root, or install sudo"
    fi
}

# Lines that say everything of a tree but its content: path, type, mode, owner, size, time in ns, symlink target.
tree_attributes() {
    (cd "$1" && find . -mindepth 1 \
        \( -type d -printf '%P|%y|%m|%U:%G|-|%T@|\n' -o -printf '%P|%y|%m|%U:%G|%s|%T@|%l\n' \) | sort)
}

# The content of every file.
tree_checksums() {
    (cd "$1" && find . -type f -print0 | sort -z | xargs -0 -r sha256sum)
}

# Which names are links to one inode: a line per name that names the first of its group.
tree_hard_links() {
    (cd "$1" && find . -type f -links +1 -printf '%i %P\n' | sort -k 2 |
        awk '{ inode = $1; sub(/^[^ ]* /, ""); if (!(inode in first)) first[inode] = $0; print $0 " = " first[inode] }')
}
