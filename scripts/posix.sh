#!/usr/bin/env bash
# pjdfstest on a scratch mount: how many of its tests pass. Exit 0 only if none fails.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

[[ $EUID -eq 0 ]] || die "pjdfstest changes owners and users: run it as root"
step "install what is missing, and build"
scripts/setup.sh --posix
build
scratch_begin
chmod 755 "$SCRATCH"

step "mount a scratch volume"
scratch_volume
mkdir "$MNT/tests"
# A second filesystem, for EXDEV.
mkdir "$SCRATCH/second"
mount -t tmpfs none "$SCRATCH/second"
script_end() { umount "$SCRATCH/second"; }
# mount(8) would have the filesystem's own program remount it read-only and back; the kernel alone does (-i).
mkdir "$SCRATCH/bin"
printf '#!/bin/sh\nexec %s -i "$@"\n' "$(command -v mount)" >"$SCRATCH/bin/mount"
chmod 755 "$SCRATCH/bin/mount"
cat >"$SCRATCH/pjdfstest.toml" <<TOML
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"]]
TOML

# $1: what to call it, then arguments. The summary, and what did not pass, go to the standard output.
run_tests() {
    local log="$SCRATCH/$1.log"
    shift
    PATH="$SCRATCH/bin:$PATH" "$TOOLS/bin/pjdfstest" -c "$SCRATCH/pjdfstest.toml" -p "$MNT/tests" -s "$SCRATCH/second" "$@" \
        >"$log" 2>&1 || failed=1
    grep -aE 'FAILED|skipped|^Summary' "$log" || die "pjdfstest said nothing: $(tail -n 1 "$log")"
}

step "run pjdfstest"
run_tests all
# In a process of their own: another test keeps a descriptor open, and a filesystem in use is not made read-only.
step "run its tests of a read-only filesystem"
sed -i 's/^allow_remount = .*/allow_remount = true/' "$SCRATCH/pjdfstest.toml"
run_tests erofs erofs
volume_umount
volume_check
[[ -z "${failed:-}" ]] || die "some tests failed"
