#!/usr/bin/env bash
# Installs what is missing, then runs every test; arguments go to `cargo test`, and leave the first runs, of
# the engine alone, out. The target directory lies outside the clone, so that a second clone on the same machine compiles
# nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# The engine's tests once more, with the order of its locks asserted, in a profile that compiles this package anew and no
# other. It leaves a `cmkfs` with the assertions in the target directory: the programs are built again after it.
order() {
    cargo --config 'profile.release.package.cmkfs.debug-assertions=true' \
        test --release --locked --workspace "$@"
}

step "install what is missing"
scripts/setup.sh
if [[ $# -eq 0 ]]; then
    step "run the engine's tests with the order of locks asserted"
    # The test that takes longest has one thread and takes its locks in one way.
    order --lib --test engine -- --skip one_bit_flipped || {
        build
        die "with the order of locks asserted the engine's tests fail"
    }
    step "run the models of the engine's concurrent parts"
    order --features cmkfs/shuttle --lib models::
fi
step "build and run the tests (target directory: $CARGO_TARGET_DIR)"
exec cargo test --release --locked --workspace "$@"
