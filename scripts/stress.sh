#!/usr/bin/env bash
# Many processes at once on a scratch mount; then every record and every block is checked.
#   stress.sh [SECONDS]     600 of stress-ng's filesystem stressors, with --verify, and a storm of a tenth of that, unless said
#                           otherwise
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

DURATION="${1:-600}"
[[ "$DURATION" =~ ^[1-9][0-9]*$ ]] || die "'$DURATION' is no number of seconds"
STORM=$((DURATION / 10 + 1))
PROCESSES=16
# Of the class 'filesystem' those that work in the directory they are started in.
STRESSORS=(access chdir chmod chown copy-file dentry dir dirdeep dirmany dup fallocate fcntl fiemap filename flock fpunch fsize
    fstat getdent handle hdd io iomix lease link locka lockf lockofd mknod open rename symlink sync-file touch utime xattr)

step "install what is missing, and build"
scripts/setup.sh --stress
build
scratch_begin

step "mount a scratch volume"
scratch_volume

# One process of the storm: makes, links, renames, exchanges and removes names that the others do, too. What it was that lost a
# race does not matter, as long as nothing but a lost race is reported.
storm() {
    local random="$1" end=$((SECONDS + STORM)) from to error
    RANDOM="$random"
    while [[ $SECONDS -lt $end ]]; do
        from="$MNT/storm/$((RANDOM % 4))/$((RANDOM % 20))"
        to="$MNT/storm/$((RANDOM % 4))/$((RANDOM % 20))"
        case $((RANDOM % 8)) in
        0 | 1) error="$( { echo "$from" >>"$from"; } 2>&1)" ;;
        2) error="$(ln "$from" "$to" 2>&1)" ;;
        3) error="$(mv -T "$from" "$to" 2>&1)" ;;
        4) error="$(mv -T --exchange "$from" "$to" 2>&1)" ;;
        5) error="$(rm "$from" 2>&1)" ;;
        6) error="$(mkdir "$from" 2>&1)" ;;
        7) error="$(rmdir "$from" 2>&1)" ;;
        esac
        case "$error" in
        "" | *"No such file"* | *"File exists"* | *"Is a directory"* | *"Not a directory"* | *"not empty"* | *"same file"* | \
            *"hard link not allowed"* | *"cannot overwrite"* | *"unrecognized option"* | *"Try 'mv"* | *"Too many links"*) ;;
        *)
            echo "$error" >>"$SCRATCH/storm.errors"
            return 1
            ;;
        esac
    done
}

step "a storm of $PROCESSES processes on the same names, for $STORM seconds"
mkdir -p "$MNT"/storm/{0,1,2,3}
pids=()
for number in $(seq "$PROCESSES"); do
    (
        trap - EXIT
        set +e
        storm "$number"
    ) 9>&- &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
[[ -z "${failed:-}" ]] || die "$(sort "$SCRATCH/storm.errors" | uniq -c | sort -rn | head -n 5)"
volume_umount
volume_check

step "stress-ng, ${#STRESSORS[@]} stressors, for $DURATION seconds in all"
volume_mount
mkdir "$MNT/stress"
each=$((DURATION / ${#STRESSORS[@]} + 1))
for stressor in "${STRESSORS[@]}"; do
    stress-ng --temp-path "$MNT/stress" "--$stressor" 4 --verify --timeout "$each" >"$SCRATCH/stress-ng.log" 2>&1 9>&- ||
        die "$stressor: $(grep -E 'fail|error' "$SCRATCH/stress-ng.log" | head -n 5)"
done
held "${#STRESSORS[@]} stressors, $each seconds each"
volume_umount
volume_check
