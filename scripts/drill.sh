#!/usr/bin/env bash
# From a fresh clone to a signed drill report: installs what is missing, builds, runs `cmkfs drill` on a scratch volume and
# verifies its report. Options go to `cmkfs drill`: --nonce HEX from whoever verifies, --witness NAME, --size-mib N.
#   DRILL_OUT   where report.json and report.html go [default: a new directory below the cache directory]
#   DRILL_KEY   the signing key [default: drill.key in the cache directory, made at first use; hand its .pub to the verifier]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

step "install what is missing"
scripts/setup.sh

step "build (the first time takes a quarter of an hour: RocksDB)"
build
[[ -x "$BIN/cmkfs-recover" ]] || die "the build left no $BIN/cmkfs-recover"

OUT="${DRILL_OUT:-$CMKFS_CACHE/drills/$(date -u +%Y%m%dT%H%M%SZ)}"
KEY="${DRILL_KEY:-$CMKFS_CACHE/drill.key}"
mkdir -p "$OUT"
if ! [[ -e "$KEY" ]]; then
    step "make a signing key"
    "$BIN/cmkfs" drill keygen "$KEY"
fi

step "drill"
failed=0
"$BIN/cmkfs" drill --scratch --report "$OUT/report.json" --html "$OUT/report.html" --signing-key "$KEY" "$@" || failed=1

step "verify the report, as whoever has the public key does"
"$BIN/cmkfs" drill verify "$OUT/report.json" --key "$KEY.pub" || failed=1
[[ $failed -eq 0 ]] || die "something did not hold: $OUT/report.html says what"
held "$OUT/report.json is genuine; $OUT/report.html is the same for people"
