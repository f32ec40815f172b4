//! Time, with its units; the only room that reads a clock.
//!
//! Out:    `UnixMillis` for a shard's clock and for messages, `MonoNanos` for ages and waits.
//! Keeps:  the two never mix: no arithmetic joins them.
//! Knows:  nothing else. Whoever decides takes `now` as an argument.
//! Source: docs/spec.md 2.6, docs/supervision.md 2.

use std::{fmt, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Milliseconds since 1970, of a message, of a shard's clock or of the wall clock.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct UnixMillis(pub u64);

/// Nanoseconds of CLOCK_MONOTONIC: the same in all processes of a machine.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct MonoNanos(pub u64);

impl UnixMillis {
    /// The latest moment that Redis keeps exactly as a score (2^53 milliseconds).
    pub const MAX: Self = Self(1 << 53);

    /// This moment plus a length of time, never past [`UnixMillis::MAX`].
    #[must_use]
    pub fn after(self, length: Duration) -> Self {
        Self(self.0.saturating_add(millis(length)).min(Self::MAX.0))
    }

    /// The length of time since `earlier`; zero when that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl MonoNanos {
    /// This moment plus a length of time.
    #[must_use]
    pub fn after(self, length: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// The length of time since `earlier`; zero when that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for UnixMillis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A length of time in whole milliseconds, saturating.
#[must_use]
pub fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// The only reader of time.
#[derive(Clone, Copy, Debug)]
pub struct Clock;

impl Clock {
    /// The wall clock: for messages without a time, for drift and for logs, never for a decision.
    #[must_use]
    pub fn wall_now() -> UnixMillis {
        let now = read(ClockId::CLOCK_REALTIME);
        UnixMillis(millis(now).min(UnixMillis::MAX.0))
    }

    /// CLOCK_MONOTONIC.
    #[must_use]
    pub fn mono_now() -> MonoNanos {
        MonoNanos::default().after(read(ClockId::CLOCK_MONOTONIC))
    }
}

/// Both clocks exist on every Linux, and are read without a system call; should one ever fail, time stands at zero.
fn read(clock: ClockId) -> Duration {
    clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_saturate_and_differences_stop_at_zero() {
        assert_eq!(
            UnixMillis(10).after(Duration::from_secs(1)),
            UnixMillis(1010)
        );
        assert_eq!(UnixMillis(10).after(Duration::MAX), UnixMillis::MAX);
        assert_eq!(UnixMillis(10).since(UnixMillis(20)), Duration::ZERO);
        assert_eq!(MonoNanos(10).after(Duration::MAX), MonoNanos(u64::MAX));
        assert_eq!(
            MonoNanos(1_500).since(MonoNanos(500)),
            Duration::from_nanos(1_000)
        );
    }

    #[test]
    fn the_monotonic_clock_moves_on() {
        let before = Clock::mono_now();
        assert!(before > MonoNanos(0));
        assert!(Clock::mono_now() >= before);
        assert!(Clock::wall_now() > UnixMillis(1_600_000_000_000));
    }
}
