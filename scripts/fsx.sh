#!/usr/bin/env bash
# fsx on a scratch mount: random operations on one file, each read compared with what was written.
#   fsx.sh [SECONDS]     1200 unless said otherwise
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

DURATION="${1:-1200}"
[[ "$DURATION" =~ ^[1-9][0-9]*$ ]] || die "'$DURATION' is no number of seconds"
step "install what is missing, and build"
scripts/setup.sh --posix
build
scratch_begin

step "mount a scratch volume"
scratch_volume
cat >"$SCRATCH/fsx.toml" <<TOML
flen = 1048576
[opsize]
max = 262144
[weights]
close_open = 1.0
invalidate = 1.0
mapread = 1.0
mapwrite = 1.0
read = 2.0
write = 4.0
truncate = 1.0
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 0.5
punch_hole = 1.0
sendfile = 0.5
posix_fadvise = 0.2
copy_file_range = 1.0
TOML

step "run fsx for $DURATION seconds"
status=0
timeout --signal=INT "$DURATION" "$TOOLS/bin/fsx" -f "$SCRATCH/fsx.toml" -P "$SCRATCH" "$MNT/file" \
    >"$SCRATCH/fsx.log" 2>&1 || status=$?
# 124: it was still going on, without an error, when its time was up.
if [[ $status -ne 124 ]]; then
    tail -n 40 "$SCRATCH/fsx.log" >&2
    die "fsx ended with status $status"
fi
volume_umount
volume_check
held "no error in $DURATION seconds"
