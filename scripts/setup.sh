#!/usr/bin/env bash
# Installs what is missing beyond a Rust toolchain, git and a C compiler; changes nothing when all of it is there.
#   setup.sh            what the build, the tests and the quickstart need
#   setup.sh --accept   and what accept.sh needs
#   setup.sh --bench    and fio and the peers that bench.sh compares with
#   setup.sh --stress   and stress-ng
#   setup.sh --posix    and pjdfstest and fsx, built into the cache directory
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

with=""
for argument in "$@"; do
    case "$argument" in
    --accept | --bench | --posix | --stress) with="$with $argument" ;;
    *) die "unknown option '$argument'; known are --accept, --bench, --posix and --stress" ;;
    esac
done

missing=()

# $1: a command, $2: the Debian package that has it.
need_command() {
    if ! command -v "$1" >/dev/null && ! [[ -x "/usr/sbin/$1" ]]; then
        missing+=("$2")
    fi
}

# RocksDB's bindings are generated at build time, through libclang's unversioned name and its headers.
have_libclang() {
    [[ -n "${LIBCLANG_PATH:-}" ]] || compgen -G '/usr/lib/llvm-*/lib/libclang.so' >/dev/null ||
        compgen -G '/usr/lib/*/libclang.so' >/dev/null || compgen -G '/usr/lib*/libclang.so' >/dev/null
}

command -v cargo >/dev/null || die "no cargo found; install a Rust toolchain first (https://rustup.rs)"
need_command cc gcc
need_command c++ g++
need_command git git
need_command fusermount3 fuse3
need_command jq jq
need_command setfacl acl
need_command strace strace
have_libclang || missing+=(libclang-dev)

if [[ "$with" == *--accept* ]]; then
    need_command fio fio
    need_command getfattr attr
    need_command rsync rsync
    need_command sqlite3 sqlite3
fi
if [[ "$with" == *--bench* ]]; then
    need_command fio fio
fi
if [[ "$with" == *--stress* ]]; then
    need_command stress-ng stress-ng
fi
if [[ "$with" == *--posix* ]]; then
    [[ -e /usr/include/sys/acl.h ]] || missing+=(libacl1-dev)
fi

install_packages() {
    command -v apt-get >/dev/null ||
        die "missing: $*; there is no apt-get here, so install them with your package manager and run this again"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

if [[ ${#missing[@]} -gt 0 ]]; then
    step "install ${missing[*]}"
    if command -v apt-get >/dev/null; then
        as_root apt-get update -q || echo "setup: apt-get update failed; trying with the lists at hand" >&2
    fi
    install_packages "${missing[@]}" || die "could not install: ${missing[*]}"
fi

if [[ "$with" == *--bench* ]]; then
    # Peers only fill columns of a table: bench.sh says which it skips.
    for peer in gocryptfs securefs encfs; do
        if ! command -v "$peer" >/dev/null; then
            step "install the peer $peer"
            install_packages "$peer" || echo "setup: no package '$peer' here; bench.sh will skip it" >&2
        fi
    done
fi

if [[ "$with" == *--posix* ]]; then
    for tool in pjdfstest fsx; do
        if ! [[ -x "$TOOLS/bin/$tool" ]]; then
            step "build $tool"
            CARGO_TARGET_DIR="$TOOLS/target" cargo install --locked --root "$TOOLS" "$tool" ||
                die "could not build $tool"
        fi
    done
    # pjdfstest changes to users of these names.
    getent group tests >/dev/null || as_root groupadd --system tests
    getent passwd tests >/dev/null || as_root useradd --system --gid tests --no-create-home --shell /usr/sbin/nologin tests
fi

if ! [[ -c /dev/fuse ]]; then
    step "load the fuse module"
    as_root modprobe fuse || true
    [[ -c /dev/fuse ]] ||
        die "there is no /dev/fuse: the kernel lacks FUSE, or a container hides it (docker: --device /dev/fuse --cap-add SYS_ADMIN)"
fi
# Opened, not only looked at: a container may show the node and refuse it.
(: <>/dev/fuse) 2>/dev/null ||
    die "/dev/fuse is there but cannot be opened by $(id -un): run as root, or have it permitted"

if [[ $STEP -eq 0 ]]; then
    echo "setup: all is there"
else
    echo "setup: done"
fi
