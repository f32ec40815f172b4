//! Real parts on a leash: for tests, benches and the demo.
//!
//! In:     what a run needs: a Redis, a Kafka, traffic, the built binaries.
//! Out:    fixtures that own their process, directory and port, and what came out, counted.
//! Keeps:  nothing is shared between fixtures; what one started ends with it; its log is shown when a test fails.
//! Knows:  rdkafka, redis, child processes. Never linked into supervisor or worker.
//! Source: docs/house.md 4, 9.

pub mod cluster;
pub mod kafka;
pub mod launch;
pub mod ledger;
pub mod offsets;
pub mod process;
pub mod proxy;
pub mod recording;
pub mod redis;
mod resp;
pub mod rng;
pub mod span;
pub mod step;
pub mod topics;
pub mod traffic;

use std::{io, net::TcpListener, path::PathBuf, time::Duration};

use rdkafka::error::KafkaError;
use shared::time::Clock;

/// Why a fixture could not do its part.
#[derive(Debug, thiserror::Error)]
pub enum StandError {
    /// A program is not installed.
    #[error("start {program}: not found ({hint})")]
    Missing {
        /// The program.
        program: String,
        /// How to get it.
        hint: String,
    },
    /// A program ended before it was of use.
    #[error("start {program}: it ended with {status} (its log: {log})")]
    Ended {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// Something did not come in time.
    #[error("await {what}: not within {after:?} (last seen: {seen})")]
    Late {
        /// What was waited for.
        what: String,
        /// The deadline.
        after: Duration,
        /// What stood there instead.
        seen: String,
    },
    /// A call of the operating system failed.
    #[error("{what}: {source} (check space, rights and limits)")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Redis refused or did not answer.
    #[error("ask redis: {0} (check its log)")]
    Redis(#[from] ::redis::RedisError),
    /// Kafka refused or did not answer.
    #[error("ask kafka: {0} (check its log)")]
    Kafka(#[from] KafkaError),
    /// Kafka did not acknowledge what was sent.
    #[error(
        "send to kafka: {failed} of {sent} messages not acknowledged, the last for {reason} (check the broker)"
    )]
    Unacknowledged {
        /// Messages sent.
        sent: u64,
        /// Messages refused.
        failed: u64,
        /// Why, for the last of them.
        reason: String,
    },
    /// A text is not of the form that it should have.
    #[error("read {what}: {reason} (check the file or the message)")]
    Malformed {
        /// What was read.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The binary was not built.
    #[error("find {name} beside {beside}: not there (cargo build --workspace)")]
    Unbuilt {
        /// The binary.
        name: String,
        /// Where it was looked for.
        beside: PathBuf,
    },
}

impl StandError {
    /// For `map_err`: a failed call of the operating system, with what was tried.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }

    /// For `map_err`: the same for an errno.
    pub(crate) fn errno(what: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Self {
        let what = what.into();
        move |errno| Self::System {
            what,
            source: errno.into(),
        }
    }
}

/// Waits that long, woken by nothing.
pub fn pause(length: Duration) {
    // The error is the end of the wait: nobody ever sends.
    crossbeam_channel::never::<()>().recv_timeout(length).ok();
}

/// What `check` finds, looked for every 20 ms.
///
/// # Errors
/// [`StandError::Late`] when it has found nothing by the deadline.
pub fn await_some<T>(
    deadline: Duration,
    what: &str,
    mut check: impl FnMut() -> Option<T>,
) -> Result<T, StandError> {
    let begun = Clock::mono_now();
    loop {
        if let Some(found) = check() {
            return Ok(found);
        }
        if Clock::mono_now().since(begun) >= deadline {
            return Err(StandError::Late {
                what: what.into(),
                after: deadline,
                seen: "nothing".into(),
            });
        }
        pause(Duration::from_millis(20));
    }
}

/// What `check` finds, looked for every 20 ms; the test fails with `what` when it has found nothing by the deadline.
#[expect(
    clippy::panic,
    reason = "the wait of a test: its failure is the test's"
)]
#[track_caller]
pub fn eventually<T>(deadline: Duration, what: &str, check: impl FnMut() -> Option<T>) -> T {
    match await_some(deadline, what, check) {
        Ok(found) => found,
        Err(error) => panic!("{error}"),
    }
}

/// A port of 127.0.0.1 that is free at this moment: another program may still take it.
///
/// # Errors
/// [`StandError::System`] when there is none.
pub fn free_port() -> Result<u16, StandError> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(StandError::system("find a free port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_what_it_found_or_at_its_deadline() {
        let mut looks = 0;
        let found = eventually(Duration::from_secs(5), "the third look", || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(found, 3);
        let late =
            await_some(Duration::from_millis(30), "nothing at all", || None::<()>).unwrap_err();
        assert!(
            late.to_string()
                .starts_with("await nothing at all: not within 30ms"),
            "{late}"
        );
    }

    #[test]
    #[should_panic(expected = "await the moon")]
    fn a_test_fails_with_the_name_of_what_did_not_come() {
        eventually(Duration::from_millis(1), "the moon", || None::<()>);
    }
}
