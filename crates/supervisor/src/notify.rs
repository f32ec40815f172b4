//! Tells the service manager how it goes: ready, alive, stopping, and a line of status.
//!
//! In:     `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` of the environment; the fleet's health after each turn.
//! Out:    datagrams to systemd, or to whatever took its place.
//! Keeps:  a datagram never waits; the watchdog is fed by a completed turn alone; what could not be sent is sent after the next.
//! Knows:  the protocol of sd_notify. Nothing of workers.
//! Source: docs/supervision.md 4; systemd sd_notify(3).

use std::{
    ffi::OsString,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{ffi::OsStrExt, net::SocketAddr, net::UnixDatagram},
    },
    process,
    time::Duration,
};

use log::{debug, warn};
use shared::time::MonoNanos;

/// What is told after a turn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Health {
    /// All workers but `http` have been healthy once.
    pub(crate) ready: bool,
    /// How long stopping may take, once it has begun.
    pub(crate) stopping: Option<Duration>,
    /// One line.
    pub(crate) status: String,
}

/// The way to the service manager; without one it says nothing.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// The service manager waits so long for a sign of life.
    watchdog: Option<Duration>,
    fed: Option<MonoNanos>,
    told: Health,
}

impl Notify {
    /// As the environment says.
    pub(crate) fn new(variables: impl Iterator<Item = (OsString, OsString)>) -> Self {
        let (mut address, mut watchdog, mut is_ours) = (None, None, true);
        for (name, value) in variables {
            let number = || value.to_str().and_then(|text| text.parse::<u64>().ok());
            match name.as_bytes() {
                b"NOTIFY_SOCKET" => address = Some(value),
                b"WATCHDOG_USEC" => watchdog = number().filter(|&micros| micros > 0),
                // It may be meant for whoever started us.
                b"WATCHDOG_PID" => is_ours = number() == Some(process::id().into()),
                _ => {}
            }
        }
        let socket = address.and_then(|address| match open(address.as_bytes()) {
            Ok(socket) => Some(socket),
            Err(error) => {
                warn!(
                    "open NOTIFY_SOCKET={}: {error} (the service manager is told nothing)",
                    address.to_string_lossy()
                );
                None
            }
        });
        Self {
            socket,
            watchdog: watchdog.filter(|_| is_ours).map(Duration::from_micros),
            ..Self::default()
        }
    }

    /// Tells what is new after a completed turn, and that there was one.
    pub(crate) fn turn(&mut self, health: &Health, now: MonoNanos) {
        let mut lines = Vec::new();
        if health.ready && !self.told.ready {
            lines.push("READY=1".to_owned());
        }
        if let Some(length) = health.stopping.filter(|_| self.told.stopping.is_none()) {
            lines.push("STOPPING=1".to_owned());
            lines.push(format!("EXTEND_TIMEOUT_USEC={}", length.as_micros()));
        }
        if health.status != self.told.status {
            lines.push(format!("STATUS={}", health.status));
        }
        let is_hungry = self.watchdog.is_some_and(|limit| {
            // Well before it bites, and not at every turn.
            self.fed.is_none_or(|fed| now.since(fed) >= limit / 4)
        });
        if is_hungry {
            lines.push("WATCHDOG=1".to_owned());
        }
        if lines.is_empty() || !self.send(&lines.join("\n")) {
            return;
        }
        self.told = Health {
            // Ready once is ready for good.
            ready: health.ready || self.told.ready,
            ..health.clone()
        };
        if is_hungry {
            self.fed = Some(now);
        }
    }

    fn send(&self, text: &str) -> bool {
        let Some((socket, address)) = &self.socket else {
            return true;
        };
        match socket.send_to_addr(text.as_bytes(), address) {
            Ok(_) => true,
            Err(error) => {
                debug!("tell the service manager: {error}");
                false
            }
        }
    }
}

fn open(address: &[u8]) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match address.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        Some((b'/', _)) => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(address))?,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> MonoNanos {
        MonoNanos::default().after(Duration::from_millis(millis))
    }

    fn variables(pairs: &[(&str, &str)]) -> impl Iterator<Item = (OsString, OsString)> {
        let pairs: Vec<(OsString, OsString)> = pairs
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        pairs.into_iter()
    }

    fn health(ready: bool, status: &str) -> Health {
        Health {
            ready,
            stopping: None,
            status: status.into(),
        }
    }

    fn heard(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 512];
        match socket.recv(&mut bytes) {
            Ok(length) => String::from_utf8(bytes[..length].to_vec()).unwrap(),
            Err(_) => "-".into(),
        }
    }

    #[test]
    fn each_thing_is_told_once_and_the_watchdog_is_fed() {
        let name = format!("spanbuf-test-{}", process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        manager.set_nonblocking(true).unwrap();
        let mut notify = Notify::new(variables(&[
            ("NOTIFY_SOCKET", &format!("@{name}")),
            ("WATCHDOG_USEC", "4000000"),
            ("WATCHDOG_PID", &process::id().to_string()),
        ]));
        notify.turn(&health(false, "a"), at(0));
        assert_eq!(heard(&manager), "STATUS=a\nWATCHDOG=1");
        notify.turn(&health(false, "a"), at(999));
        assert_eq!(heard(&manager), "-");
        notify.turn(&health(true, "b"), at(1_000));
        assert_eq!(heard(&manager), "READY=1\nSTATUS=b\nWATCHDOG=1");
        notify.turn(&health(false, "b"), at(1_001));
        notify.turn(&health(true, "b"), at(1_002));
        assert_eq!(heard(&manager), "-");
        let stopping = Health {
            stopping: Some(Duration::from_secs(30)),
            ..health(true, "c")
        };
        notify.turn(&stopping, at(1_003));
        assert_eq!(
            heard(&manager),
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=30000000\nSTATUS=c"
        );
        notify.turn(&stopping, at(1_004));
        assert_eq!(heard(&manager), "-");
    }

    #[test]
    fn what_did_not_arrive_is_told_again_and_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let mut notify = Notify::new(variables(&[("NOTIFY_SOCKET", path.to_str().unwrap())]));
        // Nobody is there yet.
        notify.turn(&health(true, "a"), at(0));
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        notify.turn(&health(true, "a"), at(1));
        assert_eq!(heard(&manager), "READY=1\nSTATUS=a");
        // Somebody who does not listen.
        for turn in 0..10_000 {
            notify.turn(&health(true, &turn.to_string()), at(turn));
        }
    }

    #[test]
    fn without_a_manager_nothing_is_told() {
        let mut notify = Notify::new(variables(&[("WATCHDOG_USEC", "1"), ("WATCHDOG_PID", "1")]));
        assert_eq!(notify.watchdog, None);
        notify.turn(&health(true, "a"), at(0));
        for address in ["", "relative", "vsock:2:1"] {
            let notify = Notify::new(variables(&[("NOTIFY_SOCKET", address)]));
            assert!(notify.socket.is_none(), "{address}");
        }
    }
}
