# Sourced by the other scripts: installs what is missing, and says what and why.
#
# need COMMAND PACKAGE WHY        installs PACKAGE by apt when COMMAND is not there
# need_file FILE PACKAGE WHY      the same for a file

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_package() {
    local package=$1 why=$2
    echo "installing $package: $why"
    if ! command -v apt-get >/dev/null; then
        echo "error: $package is missing and there is no apt-get here (install it by hand: $why)" >&2
        exit 1
    fi
    # A package that brings a service would start it: ours run on ports of their own, as long as a test does.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
        made=1
    fi
    local failed=
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 ||
        { as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null; } ||
        failed=1
    if [ -n "$made" ]; then as_root rm -f "$policy"; fi
    if [ -n "$failed" ]; then
        echo "error: $package could not be installed (install it by hand: $why)" >&2
        exit 1
    fi
}

need() {
    command -v "$1" >/dev/null || install_package "$2" "$3"
}

need_file() {
    [ -e "$1" ] || install_package "$2" "$3"
}

need_toolchain() {
    if ! command -v cargo >/dev/null; then
        echo "error: cargo is missing (install a Rust toolchain: https://rustup.rs)" >&2
        exit 1
    fi
    need cc gcc "the C compiler builds librdkafka and zstd"
    need c++ g++ "librdkafka has parts in C++"
    need make make "librdkafka is built by make"
    need redis-server redis-server "spans are assembled in Redis; every run starts one of its own"
}
