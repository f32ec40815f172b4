#!/usr/bin/env bash
# Measures Spanbuf against the raw limit of Redis and against a model of the original's way, and writes docs/performance.md and README's table.
#
# scripts/bench.sh [PART…]     parts: store codecs kafka latency report; without one all of them, about half an hour
#   SPANBUF_RECORDINGS         files of real spans for `codecs`, as for scripts/acceptance.sh; without any it is left out
#   SPANBUF_RATE               spans a second of `latency`; without it half of what `kafka` found the whole way to take
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/needs.sh
need_toolchain
need setpriv util-linux "the private Redis dies with the bench"
# As it is installed.
cargo build --release --workspace --bins
cargo build --release --package e2e --example bench
bench=target/release/examples/bench
parts=("$@")
[ $# -gt 0 ] || parts=(store codecs kafka latency report)
for part in "${parts[@]}"; do
    # What a part found before is no longer true.
    [ "$part" = report ] || rm -f "target/bench/$part.tsv"
    [ "$part" != latency ] || rm -f target/bench/machine.tsv
    case $part in
    store)
        for size in 1 5 100 10000 100000; do "$bench" store "$size" lz4; done
        for size in 5 100; do "$bench" store "$size" none zstd; done
        ;;
    codecs)
        read -ra files <<<"${SPANBUF_RECORDINGS:-}"
        if [ ${#files[@]} -gt 0 ]; then "$bench" codecs "${files[@]}"; fi
        ;;
    kafka) "$bench" kafka ;;
    latency)
        rate=${SPANBUF_RATE:-$("$bench" half)}
        "$bench" latency "$rate" 30
        # A broker of its own takes a good part of a small machine: what it leaves is not half of the capacity without it.
        "$bench" latency 2000 30 real
        ;;
    report) "$bench" report "$(date -u +%Y-%m-%d)" ;;
    *)
        echo "error: no part of the bench: $part (store codecs kafka latency report)" >&2
        exit 64
        ;;
    esac
done
