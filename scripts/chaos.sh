#!/usr/bin/env bash
# Chaos under traffic: workers and the supervisor killed, stopped, continued, crashed; Redis cut off and restarted, Kafka cut off,
# the wall clock stepped. It ends with a ledger that is even, and with a line for each blow: when it was noticed, when all were at work again.
#
# scripts/chaos.sh [seconds] [seed]      default 600 seconds and a seed of its own, which is printed
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/needs.sh

need_toolchain
need setpriv util-linux "the servers die with the run"
need redis-server redis-server "the store"

cargo build --workspace --bins
export CHAOS_SECONDS="${1:-600}"
if [ -n "${2:-}" ]; then export CHAOS_SEED="$2"; fi
exec cargo test --package e2e --test process -- --exact process_chaos::chaos_loses_nothing_and_leaves_nothing --nocapture
