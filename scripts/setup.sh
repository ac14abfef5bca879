#!/usr/bin/env bash
# Installs what the build and the tests need beyond a Rust toolchain, git and a C compiler. Changes nothing when
# all of it is there.
set -euo pipefail

if ! command -v cargo >/dev/null; then
    echo "setup: no cargo found; install a Rust toolchain first" >&2
    exit 1
fi
echo "setup: nothing else to install"
