#!/usr/bin/env bash
# From a fresh clone to a signed drill report: installs what is missing, builds, runs `cmkfs drill` on a scratch volume and
# verifies its report; then destroys a key of a scratch keystore, records that with `cmkfs drill record`, and verifies the record,
# whose title says that it is of a keystore for drills. Options go to `cmkfs drill`: --nonce HEX from whoever verifies,
# --witness NAME, --size-mib N.
#   DRILL_OUT   where report.json, report.html, record.json and record.html go [default: a new directory below the cache directory]
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
"$BIN/cmkfs" drill verify "$OUT/report.json" --key "$KEY.pub" --kind drill-report || failed=1

step "destroy a key of another scratch keystore, and record it"
scratch_begin "${TMPDIR:-/tmp}"
"$BIN/kmsd" init --drill --home "$HOME_KMS" >"$SCRATCH/kmsd.log" 2>&1 || die "kmsd init --drill failed"
kmsd_start
key_id="$(key_create)"
"$BIN/cmkfs" create "$VOLUME" --key-id "$key_id"
kmsctl schedule-key-deletion --key-id "$key_id" --pending-window-in-days 7 --yes >"$SCRATCH/said" 2>&1
kmsctl advance-clock --seconds 691200 >"$SCRATCH/said"
"$BIN/cmkfs" drill record --key-id "$key_id" --kms-home "$HOME_KMS" --volume "$VOLUME" --report "$OUT/record.json" \
    --html "$OUT/record.html" --signing-key "$KEY" || failed=1

step "verify the record"
"$BIN/cmkfs" drill verify "$OUT/record.json" --key "$KEY.pub" --kind destruction-record || failed=1

[[ $failed -eq 0 ]] || die "something did not hold: the pages in $OUT say what"
held "$OUT/report.json and record.json are genuine; the pages beside them are the same for people"
