#!/usr/bin/env bash
# Replays recordings through a supervisor that nobody configured, on a Kafka of its own at 9092 and a Redis of its own at 6379.
#
# scripts/acceptance.sh FILE…     lines of `<milliseconds since the first>` TAB `<message>`, plain or .zst
set -euo pipefail
files=()
for file in "$@"; do files+=("$(realpath "$file")"); done
cd "$(dirname "$0")/.."
. scripts/needs.sh
need_toolchain
need setpriv util-linux "the servers die with the run"
need java default-jre-headless "the run is on a real Kafka"
need mvn maven "it fetches Kafka"
cargo build --workspace --bins
exec cargo run --package e2e --example acceptance -- "${files[@]}"
