#!/usr/bin/env bash
# Proves the unit where systemd need not run: installs below a folder, verifies the unit against what was installed, and holds its
# exposure to what it is now.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/needs.sh

need systemd-analyze systemd "the unit is verified"

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
DESTDIR="$root" BINARIES="${BINARIES:-target/debug}" packaging/install.sh --built > "$root/said"

# A second time: what was configured stays.
echo "# mine" >> "$root/etc/spanbuf/spanbuf.toml"
DESTDIR="$root" BINARIES="${BINARIES:-target/debug}" packaging/install.sh --built > "$root/said"
grep -qx "# mine" "$root/etc/spanbuf/spanbuf.toml"

# verify looks for the program on this machine: the unit names where it would be.
unit="$root/spanbuf.service"
sed "s|/usr/lib/spanbuf/|$root/usr/lib/spanbuf/|" packaging/systemd/spanbuf.service > "$unit"
said=$(systemd-analyze verify "$unit" 2>&1) || { echo "$said" >&2; exit 1; }
if [ -n "$said" ]; then
    echo "$said" >&2
    exit 1
fi
# In tenths: 20 is 2.0.
systemd-analyze security --offline=true --threshold=20 "$unit" | tail -1
