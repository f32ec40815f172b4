#!/usr/bin/env bash
# Installs Spanbuf as a systemd unit: binaries, unit, configuration, user. Run again, it upgrades; what was configured stays.
#
# packaging/install.sh            as root: builds for release first, then installs
# packaging/install.sh --built    takes the binaries of target/release, or of $BINARIES, as they are
#
# DESTDIR=/some/root installs below that folder, and makes no user there.
set -euo pipefail
cd "$(dirname "$0")/.."

root="${DESTDIR:-}"
binaries="${BINARIES:-target/release}"

case "$*" in
"") cargo build --release --workspace --bins ;;
--built) ;;
*)
    echo "install: unknown arguments: $* (packaging/install.sh, or packaging/install.sh --built)" >&2
    exit 64
    ;;
esac
for binary in supervisor worker spanctl; do
    if [ ! -x "$binaries/$binary" ]; then
        echo "install: $binaries/$binary is not there (build it, or set BINARIES)" >&2
        exit 1
    fi
done
if [ -z "$root" ] && [ "$(id -u)" != 0 ]; then
    echo "install: root is needed (or set DESTDIR)" >&2
    exit 1
fi

if [ -z "$root" ] && ! getent passwd spanbuf > /dev/null; then
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin spanbuf
fi

# Beside the old one and then in its place: a running supervisor keeps the worker that it opened until HUP.
put() {
    install -D -m "$1" "$2" "$root$3.new"
    mv -f "$root$3.new" "$root$3"
}
put 0755 "$binaries/supervisor" /usr/lib/spanbuf/supervisor
put 0755 "$binaries/worker" /usr/lib/spanbuf/worker
put 0755 "$binaries/spanctl" /usr/bin/spanctl
put 0644 packaging/systemd/spanbuf.service /usr/lib/systemd/system/spanbuf.service

# Configuration is the operator's: it is written once. It may hold secrets.
keep() {
    if [ ! -e "$root$2" ]; then
        install -D -m 0640 "$1" "$root$2"
        if [ -z "$root" ]; then chgrp spanbuf "$root$2"; fi
    fi
}
keep packaging/systemd/spanbuf.env /etc/spanbuf/spanbuf.env
keep packaging/spanbuf.toml /etc/spanbuf/spanbuf.toml

if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
cat <<'TEXT'
installed. Next:
  edit /etc/spanbuf/spanbuf.toml
  /usr/lib/spanbuf/supervisor --config /etc/spanbuf/spanbuf.toml --check
  systemctl enable --now spanbuf         after an upgrade: systemctl restart spanbuf
TEXT
