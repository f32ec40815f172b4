#!/usr/bin/env bash
# Formats, lints, builds, and runs every test: unit and property, store on a real Redis, process on the mock and on a real Kafka.
#
# scripts/test.sh                 everything, as root; the process tests on a single Redis
# scripts/test.sh process [n]     the process tests alone, n times in a row (default 1)
# scripts/test.sh cluster [n]     the process tests with a Redis Cluster of three in the place of the single server, n times in a row
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/needs.sh

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

need_toolchain
need setpriv util-linux "the servers of a test die with it"
need java default-jre-headless "the process tests run on a real Kafka too"
need mvn maven "it fetches Kafka"
need_file /usr/include/openssl/ssl.h libssl-dev "the feature ssl is checked"
need pkg-config pkg-config "the feature ssl is checked"

process() {
    for ((run = 1; run <= $1; run++)); do
        step "process tests, run $run of $1"
        cargo test --quiet --package e2e
    done
}

cluster() {
    for ((run = 1; run <= $1; run++)); do
        step "process tests on a cluster, run $run of $1"
        STORE=cluster cargo test --quiet --package e2e --test process
    done
}

case "${1:-}" in
process | cluster)
    cargo build --workspace --bins
    "$1" "${2:-1}"
    exit
    ;;
esac

step "format"
cargo fmt --all --check
step "lints"
cargo clippy --workspace --all-targets -- --deny warnings
step "feature ssl"
cargo check --package worker --features ssl
step "build"
cargo build --workspace --bins
step "systemd unit"
scripts/systemd.sh
step "unit and property tests"
cargo test --quiet --workspace --exclude e2e
process 1
step "done"
