#!/usr/bin/env bash
# Checks licences, bans and sources of all dependencies (deny.toml). Run by hand when Cargo.lock changes; its result goes into the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v cargo-deny >/dev/null; then
    echo "installing cargo-deny: it reads deny.toml"
    cargo install cargo-deny --locked
fi
cargo deny --all-features check licenses bans sources
