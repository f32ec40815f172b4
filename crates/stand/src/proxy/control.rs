//! What a proxy is told to do, and its open connections.
//!
//! In:     orders from the test's thread.
//! Out:    waits for the threads that forward.
//! Keeps:  every wait ends when its connection is closed.
//! Knows:  no byte of a stream.
//! Source: docs/house.md 13.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use log::debug;

/// Says of a command's arguments whether it is the one.
pub(super) type Wanted = Box<dyn FnMut(&[&[u8]]) -> bool + Send>;

/// What is held of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Command,
    Reply,
}

struct HoldState {
    kind: Kind,
    /// Gone once a command was the one.
    wanted: Option<Wanted>,
    is_reached: bool,
}

#[derive(Default)]
pub(super) struct Control {
    pub(super) is_held: bool,
    pub(super) slow: Duration,
    pub(super) is_refusing: bool,
    /// Ports that are open: with none refusing has taken effect.
    pub(super) open: usize,
    pub(super) is_stopping: bool,
    pub(super) links: Vec<Arc<Link>>,
    holds: BTreeMap<u64, HoldState>,
    next_hold: u64,
}

impl Control {
    pub(super) fn is_reached(&self, hold: u64) -> bool {
        self.holds.get(&hold).is_some_and(|hold| hold.is_reached)
    }

    pub(super) fn remove_hold(&mut self, hold: u64) {
        self.holds.remove(&hold);
    }
}

#[derive(Default)]
pub(super) struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `is_so`; false at the deadline.
    pub(super) fn wait(&self, deadline: Duration, mut is_so: impl FnMut(&Control) -> bool) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), deadline, |control| !is_so(control));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.lock().is_stopping
    }

    pub(super) fn is_refusing(&self) -> bool {
        self.lock().is_refusing
    }

    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.lock().links.clone()
    }

    /// Ends a connection both ways, and every wait on it.
    pub(super) fn close(&self, link: &Arc<Link>) {
        link.is_closed.store(true, Ordering::SeqCst);
        for stream in [&link.client, &link.server] {
            if let Err(error) = stream.shutdown(Shutdown::Both) {
                debug!("shut down a connection: {error}");
            }
        }
        self.change(|control| control.links.retain(|other| !Arc::ptr_eq(other, link)));
    }

    /// Waits until bytes may pass.
    ///
    /// # Errors
    /// When the connection is closed meanwhile.
    pub(super) fn pass(&self, link: &Link) -> io::Result<()> {
        let open = |control: &mut Control| control.is_held && !link.is_closed();
        let control = self
            .changed
            .wait_while(self.lock(), open)
            .unwrap_or_else(PoisonError::into_inner);
        let slow = control.slow;
        if !slow.is_zero() {
            drop(
                self.changed
                    .wait_timeout_while(control, slow, |_| !link.is_closed()),
            );
        }
        link.check()
    }

    pub(super) fn add_hold(&self, kind: Kind, wanted: Wanted) -> u64 {
        let mut control = self.lock();
        let id = control.next_hold;
        control.next_hold += 1;
        control.holds.insert(
            id,
            HoldState {
                kind,
                wanted: Some(wanted),
                is_reached: false,
            },
        );
        id
    }

    /// The holds that this command is the one for: the first that holds a command, and the first that holds a reply.
    pub(super) fn claim(&self, arguments: &[&[u8]]) -> Vec<(u64, Kind)> {
        let mut control = self.lock();
        let mut claimed: Vec<(u64, Kind)> = Vec::new();
        for (&id, hold) in &mut control.holds {
            let is_taken = claimed.iter().any(|&(_, kind)| kind == hold.kind);
            if !is_taken && hold.wanted.as_mut().is_some_and(|wanted| wanted(arguments)) {
                hold.wanted = None;
                claimed.push((id, hold.kind));
            }
        }
        claimed
    }

    /// Tells that what is to be held stands here, and waits for its release.
    ///
    /// # Errors
    /// When the connection is closed meanwhile.
    pub(super) fn stand(&self, hold: u64, link: &Link) -> io::Result<()> {
        self.change(|control| {
            if let Some(hold) = control.holds.get_mut(&hold) {
                hold.is_reached = true;
            }
        });
        let held = |control: &mut Control| control.holds.contains_key(&hold) && !link.is_closed();
        drop(self.changed.wait_while(self.lock(), held));
        link.check()
    }
}

/// A client's connection and the one behind it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) client: TcpStream,
    pub(super) server: TcpStream,
    is_closed: AtomicBool,
    /// The client speaks the Redis protocol.
    pub(super) is_redis: AtomicBool,
    /// Replies to be held: their numbers on this connection, and the holds.
    replies: Mutex<VecDeque<(u64, u64)>>,
}

impl Link {
    pub(super) fn new(client: TcpStream, server: TcpStream) -> Self {
        let (is_closed, is_redis) = (AtomicBool::new(false), AtomicBool::new(false));
        Self {
            client,
            server,
            is_closed,
            is_redis,
            replies: Mutex::default(),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    fn check(&self) -> io::Result<()> {
        if self.is_closed() {
            Err(io::ErrorKind::ConnectionAborted.into())
        } else {
            Ok(())
        }
    }

    pub(super) fn hold_reply(&self, number: u64, hold: u64) {
        self.replies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back((number, hold));
    }

    /// The hold for a reply.
    pub(super) fn hold_of_reply(&self, number: u64) -> Option<u64> {
        let replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        replies
            .iter()
            .find(|(held, _)| *held == number)
            .map(|&(_, hold)| hold)
    }
}
