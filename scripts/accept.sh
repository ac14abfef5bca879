#!/usr/bin/env bash
# Real programs on a scratch mount: a source tree copied in and compared after a restart of everything, git, SQLite, cargo,
# fio with checksums; and a search of what lies on storage. Exit 0 only if all of it held.
#   accept.sh [SOURCE]     the tree to copy; cargo's registry unless said otherwise
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

SOURCE="$(readlink -f "${1:-${CARGO_HOME:-$HOME/.cargo}/registry/src}")"
[[ -d "$SOURCE" ]] || die "no directory $SOURCE: build once, or name a source tree"
step "install what is missing, and build"
scripts/setup.sh --accept
build
scratch_begin

step "mount a scratch volume"
scratch_volume

step "copy a source tree in"
mkdir "$SCRATCH/source"
rsync -a "$SOURCE/" "$SCRATCH/source/"
first="$(cd "$SCRATCH/source" && find . -name Cargo.toml | sort | sed -n 1p)"
ln "$SCRATCH/source/$first" "$SCRATCH/source/a hard link"
ln -s "../of no target" "$SCRATCH/source/a symlink"
install -m 4751 /dev/null "$SCRATCH/source/a program"
touch -h -d '1969-12-31 23:59:58.123456789 UTC' "$SCRATCH/source/a symlink"
cp -a "$SCRATCH/source" "$MNT/tree"
held "$(find "$SCRATCH/source" -type f | wc -l) files"

step "restart both daemons and compare"
volume_umount
kmsd_stop
kmsd_start
volume_mount
diff -r --no-dereference "$SCRATCH/source" "$MNT/tree" || die "contents differ"
for what in tree_attributes tree_hard_links; do
    "$what" "$SCRATCH/source" >"$SCRATCH/expected"
    "$what" "$MNT/tree" >"$SCRATCH/found"
    diff "$SCRATCH/expected" "$SCRATCH/found" >&2 || die "$what differ"
done
held "contents, modes, owners, sizes, times, symlinks and hard links are equal"

step "git clone and fsck"
git clone -q "$PWD" "$MNT/clone"
git -C "$MNT/clone" fsck --strict >/dev/null 2>&1 || die "git fsck found damage"
[[ -z "$(git -C "$MNT/clone" status --porcelain)" ]] || die "the clone is not clean"
held "$(git -C "$MNT/clone" rev-list --count HEAD) commits"

step "SQLite, 10,000 transactions"
{
    echo "CREATE TABLE t (n INTEGER PRIMARY KEY, v TEXT);"
    for number in $(seq 10000); do
        echo "INSERT INTO t VALUES ($number, hex(randomblob($((number % 300)))));"
    done
} | sqlite3 "$MNT/database"
[[ "$(sqlite3 "$MNT/database" 'PRAGMA integrity_check; SELECT count(*) FROM t;' | tr '\n' ' ')" == "ok 10000 " ]] ||
    die "the database is damaged"
held "integrity_check is ok"

step "cargo build of a small crate"
cargo init -q --vcs none --name small "$MNT/small"
CARGO_TARGET_DIR="$MNT/small/target" cargo build -q --offline --manifest-path "$MNT/small/Cargo.toml"
[[ "$("$MNT/small/target/debug/small")" == "Hello, world!" ]] || die "the program does not run"
held "it builds and runs"

step "fio with checksums, verified after a remount"
for job in verify-sequential verify-sequential-direct verify-random verify-random-direct; do
    DIR="$MNT" fio --aux-path="$SCRATCH" --output="$SCRATCH/fio.log" --do_verify=0 "scripts/fio/$job.fio" || die "fio failed: $job"
done
volume_umount
volume_mount
for job in verify-sequential verify-sequential-direct verify-random verify-random-direct; do
    DIR="$MNT" fio --aux-path="$SCRATCH" --output="$SCRATCH/fio.log" --verify_only "scripts/fio/$job.fio" || die "fio found damage: $job"
    held "$job"
done

step "10,000 files created: how many calls of the KMS"
key_calls() {
    kmsctl get-metrics | jq '[.. | objects | (.IssueDataKeys?, .OpenDataKeys?) | .Calls? // empty] | add'
}
before="$(key_calls)"
mkdir "$MNT/many"
for number in $(seq 10000); do
    : >"$MNT/many/$number"
done
calls=$(($(key_calls) - before))
[[ $calls -le 100 ]] || die "$calls calls"
held "$calls calls"

step "look for 20 names and 20 contents on storage"
mkdir "$MNT/secret"
for number in $(seq 20); do
    printf 'the content of secret number %d, known to nobody\n' "$number" >"$MNT/secret/name-of-secret-$number"
done
volume_umount
for number in $(seq 20); do
    for secret in "content of secret number $number," "name-of-secret-$number"; do
        if grep -rqaF "$secret" "$VOLUME" "$HOME_KMS" || find "$VOLUME" "$HOME_KMS" | grep -qF "$secret"; then
            die "'$secret' lies on storage"
        fi
    done
done
held "none of them"

step "check every record and every block"
volume_check
kmsd_stop
echo "accept: every step held"
