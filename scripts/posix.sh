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
kmsd_start
"$BIN/cmkfs" create "$VOLUME" --key-id "$(key_create)" >/dev/null
volume_mount
mkdir "$MNT/tests"
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

step "run pjdfstest"
"$TOOLS/bin/pjdfstest" -c "$SCRATCH/pjdfstest.toml" -p "$MNT/tests" >"$SCRATCH/pjdfstest.log" 2>&1 || failed=1
grep -aE 'FAILED|^Summary' "$SCRATCH/pjdfstest.log" || die "pjdfstest said nothing: $(tail -n 1 "$SCRATCH/pjdfstest.log")"
volume_umount
volume_check
[[ -z "${failed:-}" ]] || die "some tests failed"
