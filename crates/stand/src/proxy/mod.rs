//! A TCP proxy that holds, slows and cuts: what a network does, when a test wants it.
//!
//! In:     the addresses behind it; orders, which are the same for all of them.
//! Out:    an address before each; for Redis, the moment at which a chosen command or its reply stands here.
//! Keeps:  bytes in order; what a connection may buffer is bounded; all threads end with the proxy.
//! Knows:  TCP, and of the Redis protocol where commands and replies end. A stream that begins otherwise passes unread.
//! Source: docs/house.md 13.

mod control;
mod pump;

use std::{
    fmt,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::Duration,
};

use log::warn;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{StandError, pause};
use control::{Kind, Link, Shared};

/// How long the wait for a connection lasts before orders are looked at.
const TURN_MS: u16 = 10;
/// How long the server may take to accept.
const CONNECT: Duration = Duration::from_secs(2);

/// A proxy before one address, or before all nodes of a cluster: what it is told holds for all.
pub struct Proxy {
    shared: Arc<Shared>,
    doors: Vec<Door>,
}

/// Where clients of one address come in.
struct Door {
    address: SocketAddr,
    acceptor: JoinHandle<()>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("addresses", &self.addresses())
            .field("connections", &self.connections())
            .finish()
    }
}

impl Proxy {
    /// Starts a proxy before one address, which may come up later.
    ///
    /// # Errors
    /// As [`Proxy::add`].
    pub fn start(upstream: &str) -> Result<Self, StandError> {
        let mut proxy = Self::empty();
        proxy.add(upstream)?;
        Ok(proxy)
    }

    /// A proxy before nothing yet.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            shared: Arc::default(),
            doors: Vec::new(),
        }
    }

    /// Stands before one more address, which may come up later: gives where its clients are to come in.
    ///
    /// # Errors
    /// [`StandError`] when the address is none, or no port or thread is to be had.
    pub fn add(&mut self, upstream: &str) -> Result<String, StandError> {
        let upstream: SocketAddr =
            upstream
                .parse()
                .map_err(|error: std::net::AddrParseError| StandError::Malformed {
                    what: format!("address {upstream}"),
                    reason: error.to_string(),
                })?;
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .map_err(StandError::system("open a port for a proxy"))?;
        listener
            .set_nonblocking(true)
            .map_err(StandError::system("set up a proxy"))?;
        let address = listener
            .local_addr()
            .map_err(StandError::system("set up a proxy"))?;
        let acceptor = Acceptor {
            address,
            upstream,
            shared: Arc::clone(&self.shared),
            pumps: Vec::new(),
        };
        self.shared.change(|control| control.open += 1);
        let acceptor = Builder::new()
            .name("proxy".into())
            .spawn(move || acceptor.run(listener))
            .map_err(StandError::system("start a thread"))?;
        self.doors.push(Door { address, acceptor });
        Ok(address.to_string())
    }

    /// `127.0.0.1:<port>`, what clients are told: the first one, when it stands before several addresses.
    #[must_use]
    pub fn address(&self) -> String {
        self.doors
            .first()
            .map_or_else(String::new, |door| door.address.to_string())
    }

    /// What clients are told of all addresses, with commas between them.
    #[must_use]
    pub fn addresses(&self) -> String {
        let addresses: Vec<String> = self
            .doors
            .iter()
            .map(|door| door.address.to_string())
            .collect();
        addresses.join(",")
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.links().len()
    }

    /// Forwards nothing, either way; connections stay, and new ones are taken.
    pub fn hold(&self) {
        self.shared.change(|control| control.is_held = true);
    }

    /// Forwards at full speed again and takes connections; single commands that are held stay so.
    pub fn release(&self) {
        self.shared.change(|control| {
            (control.is_held, control.is_refusing, control.slow) = (false, false, Duration::ZERO);
        });
    }

    /// Waits that long before each piece of at most 16 KiB, either way.
    pub fn slow(&self, wait: Duration) {
        self.shared.change(|control| control.slow = wait);
    }

    /// Closes all connections, with what is held of them; new ones are taken.
    pub fn cut(&self) {
        self.shared
            .links()
            .iter()
            .for_each(|link| self.shared.close(link));
    }

    /// Refuses new connections until [`Proxy::release`]; open ones stay.
    pub fn refuse(&self) {
        self.shared.change(|control| control.is_refusing = true);
        self.shared
            .wait(Duration::from_secs(5), |control| control.open == 0);
    }

    /// Holds the first command of that name, in any case of letters, to whatever address, before it is forwarded.
    #[must_use]
    pub fn hold_command(&self, name: &str) -> Hold {
        self.hold_when(named(name))
    }

    /// Holds the first command whose arguments (the name first) are as told, before it is forwarded. What stands behind it
    /// on its connection waits with it; other connections go on. A client that gives up meanwhile does not take it back:
    /// released, it is forwarded; [`Proxy::cut`] drops it. Its reply may be held by another hold.
    #[must_use]
    pub fn hold_when(&self, wanted: impl FnMut(&[&[u8]]) -> bool + Send + 'static) -> Hold {
        self.add_hold(Kind::Command, Box::new(wanted))
    }

    /// Forwards the first command of that name and holds its reply.
    #[must_use]
    pub fn hold_reply(&self, name: &str) -> Hold {
        self.hold_reply_when(named(name))
    }

    /// Forwards the first command whose arguments are as told and holds its whole reply: reached, it was executed.
    #[must_use]
    pub fn hold_reply_when(&self, wanted: impl FnMut(&[&[u8]]) -> bool + Send + 'static) -> Hold {
        self.add_hold(Kind::Reply, Box::new(wanted))
    }

    fn add_hold(&self, kind: Kind, wanted: control::Wanted) -> Hold {
        Hold {
            id: self.shared.add_hold(kind, wanted),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.change(|control| control.is_stopping = true);
        self.cut();
        for Door { address, acceptor } in self.doors.drain(..) {
            if acceptor.join().is_err() {
                warn!("proxy address={address} ended in a panic");
            }
        }
    }
}

/// A command or reply that is to be held; released when dropped.
pub struct Hold {
    id: u64,
    shared: Arc<Shared>,
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.id).finish()
    }
}

impl Hold {
    /// Waits until it stands here; false when it did not come by the deadline.
    #[must_use]
    pub fn reached(&self, deadline: Duration) -> bool {
        self.shared
            .wait(deadline, |control| control.is_reached(self.id))
    }

    /// Lets it go on; one that has not come yet is held no more.
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.change(|control| control.remove_hold(self.id));
    }
}

fn named(name: &str) -> impl FnMut(&[&[u8]]) -> bool + Send + 'static {
    let name = name.to_owned();
    move |arguments| {
        arguments
            .first()
            .is_some_and(|first| first.eq_ignore_ascii_case(name.as_bytes()))
    }
}

/// The thread that takes connections.
struct Acceptor {
    address: SocketAddr,
    upstream: SocketAddr,
    shared: Arc<Shared>,
    pumps: Vec<JoinHandle<()>>,
}

impl Acceptor {
    fn run(mut self, listener: TcpListener) {
        let mut listener = Some(listener);
        while !self.shared.is_stopping() {
            if self.shared.is_refusing() {
                // Gone from the kernel's table before anybody is told.
                if listener.take().is_some() {
                    self.shared.change(|control| control.open -= 1);
                }
                pause(Duration::from_millis(5));
                continue;
            }
            match &listener {
                Some(listener) => self.take_one(listener),
                None => listener = self.listen_again(),
            }
        }
        // Links that were made since the last cut.
        self.shared
            .links()
            .iter()
            .for_each(|link| self.shared.close(link));
        for pump in self.pumps {
            if pump.join().is_err() {
                warn!(
                    "proxy address={}: a connection ended in a panic",
                    self.address
                );
            }
        }
    }

    fn listen_again(&self) -> Option<TcpListener> {
        let listener = TcpListener::bind(self.address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        match listener {
            Ok(listener) => {
                self.shared.change(|control| control.open += 1);
                Some(listener)
            }
            Err(error) => {
                warn!(
                    "open proxy address={} again: {error} (another program has the port)",
                    self.address
                );
                pause(Duration::from_millis(50));
                None
            }
        }
    }

    fn take_one(&mut self, listener: &TcpListener) {
        let mut polled = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(TURN_MS)).is_ok_and(|ready| ready == 0) {
            return;
        }
        // An error is the end of a connection that its client has given up already.
        let Ok((client, _)) = listener.accept() else {
            return;
        };
        if let Err(error) = self.join(client) {
            // The client sees its connection closed, as with a server that is away.
            warn!(
                "connect proxy address={} to upstream={}: {error}",
                self.address, self.upstream
            );
        }
    }

    fn join(&mut self, client: TcpStream) -> std::io::Result<()> {
        let server = TcpStream::connect_timeout(&self.upstream, CONNECT)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let link = Arc::new(Link::new(client, server));
        self.shared
            .change(|control| control.links.push(Arc::clone(&link)));
        for pump in [pump::commands, pump::replies] {
            let (shared, link) = (Arc::clone(&self.shared), Arc::clone(&link));
            self.pumps
                .push(Builder::new().name("proxy-pump".into()).spawn(move || {
                    pump(&shared, &link);
                    shared.close(&link);
                })?);
        }
        self.pumps.retain(|pump| !pump.is_finished());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
