#!/usr/bin/env bash
# From a fresh Debian machine with a Rust toolchain, git and a C compiler to an encrypted volume whose key is taken
# away and given back. Everything happens in a scratch directory. Exit 0 only if every step held.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

step "install what is missing"
scripts/setup.sh

step "build (the first time takes a quarter of an hour: RocksDB)"
build
held "kmsd, kmsctl and cmkfs are in $BIN"

scratch_begin "${TMPDIR:-/tmp}"

step "create a keystore and start kmsd"
kmsd_start
held "kmsd answers on $KMS_SOCKET"

step "create a customer master key"
KEY="$(key_create)"
kmsctl describe-key --key-id "$KEY" | jq -e 'any(.. | strings; . == "Enabled")' >/dev/null ||
    die "the new key is not Enabled"
held "key $KEY is Enabled"

step "create a volume under it and mount it"
"$BIN/cmkfs" create "$VOLUME" --key-id "$KEY"
"$BIN/cmkfs" mount "$VOLUME" "$MNT"
is_mounted "$MNT" || die "$MNT is not mounted though cmkfs mount succeeded"
held "$VOLUME is mounted on $MNT"
"$BIN/cmkfs" status "$MNT"

step "write real files: text, 20 MiB of noise, a git repository"
printf 'The quick brown fox jumps over the lazy dog.\n' >"$MNT/notes.txt"
head -c 20M /dev/urandom >"$SCRATCH/noise"
cp "$SCRATCH/noise" "$MNT/noise"
git init -q "$MNT/repository"
mkdir "$MNT/repository/src"
for number in $(seq 40); do
    printf 'pub fn f%d() -> u32 { %d }\n' "$number" "$number" >"$MNT/repository/src/f$number.rs"
done
in_repository() {
    git -C "$MNT/repository" -c user.name=quickstart -c user.email=quickstart@localhost "$@"
}
in_repository add .
in_repository commit -q -m "Add forty files"
held "$(find "$MNT" -type f | wc -l) files"

step "read them back"
[[ "$(cat "$MNT/notes.txt")" == "The quick brown fox jumps over the lazy dog." ]] || die "notes.txt differs"
cmp "$SCRATCH/noise" "$MNT/noise" || die "noise differs"
in_repository fsck --strict >/dev/null || die "git fsck found damage"
[[ -z "$(in_repository status --porcelain)" ]] || die "git status is not clean"
tree_checksums "$MNT" >"$SCRATCH/before"
held "text, noise and repository are what was written"

step "look for the text in what is on the disk"
if grep -rqaF 'quick brown fox' "$VOLUME" "$HOME_KMS" || find "$VOLUME" | grep -qF notes; then
    die "plaintext found under $VOLUME or $HOME_KMS"
fi
held "neither the volume nor the keystore holds the text or the name"

step "disable the key: reads must fail"
exec 8<"$MNT/noise"
read -r -N 16 -u 8 _ 2>/dev/null || true
refused() {
    local said
    said="$(cat "$MNT/notes.txt" 2>&1 >/dev/null || true)"
    [[ "$said" == *"Key has been revoked"* ]]
}
kmsctl disable-key --key-id "$KEY" >/dev/null
within 5 refused || die "notes.txt can be read, or fails otherwise, five seconds after disable-key: $(cat "$MNT/notes.txt" 2>&1)"
held "cat says: $(cat "$MNT/notes.txt" 2>&1 || true)"
if cat <&8 >/dev/null 2>"$SCRATCH/said"; then
    die "a file that was open can still be read"
fi
grep -qF 'Key has been revoked' "$SCRATCH/said" || die "the open file failed otherwise: $(cat "$SCRATCH/said")"
exec 8<&-
held "a file that was open before is refused, too"
if tree_checksums "$MNT" >/dev/null 2>&1; then
    die "the tree can be read"
fi

step "enable the key: the data is back"
kmsctl enable-key --key-id "$KEY" >/dev/null
readable() {
    cat "$MNT/notes.txt" >/dev/null 2>&1
}
within 5 readable || die "notes.txt cannot be read five seconds after enable-key: $(cat "$MNT/notes.txt" 2>&1)"
tree_checksums "$MNT" >"$SCRATCH/after"
cmp "$SCRATCH/before" "$SCRATCH/after" || die "checksums differ"
held "every checksum is the same"

step "unmount"
"$BIN/cmkfs" umount "$MNT"
if is_mounted "$MNT"; then
    die "$MNT is still mounted"
fi
[[ -z "$(ls -A "$MNT")" ]] || die "the mount point is not empty"

step "mount again and compare"
"$BIN/cmkfs" mount "$VOLUME" "$MNT"
tree_checksums "$MNT" >"$SCRATCH/after"
cmp "$SCRATCH/before" "$SCRATCH/after" || die "checksums differ after the remount"
in_repository fsck --strict >/dev/null || die "git fsck found damage after the remount"
held "every checksum is the same"

step "unmount and stop kmsd"
"$BIN/cmkfs" umount "$MNT"
kmsd_stop
held "all gone; nothing is left in $SCRATCH"
echo "quickstart: every step held"
