#!/usr/bin/env bash
# Builds Spanbuf and runs the whole way on this machine: a private Redis, a Kafka inside the process, the real supervisor and workers.
#
# scripts/demo.sh [--spans N] [--file FILE] [--keep] …     arguments go to `spanctl demo`
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/needs.sh
need_toolchain
need setpriv util-linux "the private Redis dies with the demo"
cargo build --workspace --bins
exec target/debug/spanctl demo "$@"
