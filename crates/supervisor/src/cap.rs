//! The restart cap: how often a slot may fail, and how long it waits before it starts again.
//!
//! In:     failures; moments in which the slot's worker is Healthy; a jitter, drawn by the caller.
//! Out:    whether one more restart is allowed, and after which wait.
//! Keeps:  one number a slot: one more for each failure, one less for each `stable` in Healthy, never below zero.
//!         With a cap of 10 the tenth restart still happens, the eleventh does not.
//! Knows:  lengths of time. Pure.
//! Source: docs/supervision.md 3.

use std::time::Duration;

use shared::time::MonoNanos;

/// The waits before the first, the second, … restart, in seconds; the last one stands for all that follow.
const BACKOFF_SECONDS: [u64; 7] = [0, 1, 2, 4, 8, 16, 30];

/// A share of up to 20 % by which a wait is made longer, so that slots that failed together do not start together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Jitter(u16);

impl Jitter {
    /// The largest share, in thousandths.
    pub const MAX: u16 = 200;

    /// Takes any number: what is drawn need not be in range.
    #[must_use]
    pub fn new(drawn: u64) -> Self {
        Self(u16::try_from(drawn % (u64::from(Self::MAX) + 1)).unwrap_or(0))
    }

    fn lengthen(self, wait: Duration) -> Duration {
        wait + wait * u32::from(self.0) / 1_000
    }
}

/// The failures of one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cap {
    failures: u32,
    lifetime: u64,
    /// Time in Healthy that has not healed a failure yet; a failure ends it, Backpressured only interrupts it.
    healthy: Duration,
    /// When the slot was last seen Healthy, while it is.
    seen: Option<MonoNanos>,
}

impl Cap {
    /// One more failure.
    pub fn fail(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.lifetime = self.lifetime.saturating_add(1);
        self.healthy = Duration::ZERO;
        self.seen = None;
    }

    /// The worker is Healthy now, and has been since this was last said; each `stable` of it heals a failure.
    pub fn healthy(&mut self, now: MonoNanos, stable: Duration) {
        self.healthy += self.seen.map_or(Duration::ZERO, |seen| now.since(seen));
        self.seen = Some(now);
        while self.failures > 0 && self.healthy >= stable {
            self.failures -= 1;
            self.healthy -= stable;
        }
        if self.failures == 0 {
            self.healthy = Duration::ZERO;
        }
    }

    /// The worker is not Healthy now.
    pub fn interrupt(&mut self) {
        self.seen = None;
    }

    /// Forgets the failures, but not how many there were in a lifetime.
    pub fn forget(&mut self) {
        self.failures = 0;
        self.healthy = Duration::ZERO;
    }

    /// Whether one more restart would be one too many.
    #[must_use]
    pub fn passed(&self, max_restarts: u32) -> bool {
        self.failures > max_restarts
    }

    /// The wait before the next restart.
    #[must_use]
    pub fn backoff(&self, jitter: Jitter) -> Duration {
        let [.., longest] = BACKOFF_SECONDS;
        let nth = usize::try_from(self.failures.saturating_sub(1)).unwrap_or(usize::MAX);
        jitter.lengthen(Duration::from_secs(
            BACKOFF_SECONDS.get(nth).copied().unwrap_or(longest),
        ))
    }

    /// Failures that have not healed.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// All failures since the supervisor started; only shown.
    #[must_use]
    pub fn lifetime(&self) -> u64 {
        self.lifetime
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STABLE: Duration = Duration::from_secs(300);

    fn at(seconds: u64) -> MonoNanos {
        MonoNanos::default().after(Duration::from_secs(seconds))
    }

    #[test]
    fn the_tenth_restart_still_happens_and_the_eleventh_does_not() {
        let mut cap = Cap::default();
        for _ in 0..10 {
            cap.fail();
            assert!(!cap.passed(10));
        }
        cap.fail();
        assert!(cap.passed(10));
        assert_eq!((cap.failures(), cap.lifetime()), (11, 11));
    }

    #[test]
    fn the_backoff_grows_to_thirty_seconds_and_follows_the_same_number() {
        let mut cap = Cap::default();
        let waits: Vec<u64> = (0..9)
            .map(|_| {
                cap.fail();
                cap.backoff(Jitter::default()).as_secs()
            })
            .collect();
        assert_eq!(waits, [0, 1, 2, 4, 8, 16, 30, 30, 30]);
        cap.healthy(at(0), STABLE);
        cap.healthy(at(300 * 6), STABLE);
        assert_eq!(cap.failures(), 3);
        cap.fail();
        assert_eq!(cap.backoff(Jitter::default()).as_secs(), 4);
    }

    #[test]
    fn jitter_lengthens_by_at_most_a_fifth() {
        let mut cap = Cap::default();
        (0..8).for_each(|_| cap.fail());
        assert_eq!(cap.backoff(Jitter::new(200)), Duration::from_secs(36));
        assert_eq!(cap.backoff(Jitter::new(201)), Duration::from_secs(30));
        assert_eq!(cap.backoff(Jitter::new(100)), Duration::from_secs(33));
    }

    #[test]
    fn each_five_minutes_in_healthy_forget_one_failure() {
        let mut cap = Cap::default();
        (0..3).for_each(|_| cap.fail());
        cap.healthy(at(0), STABLE);
        cap.healthy(at(299), STABLE);
        assert_eq!(cap.failures(), 3);
        // Time out of Healthy heals nothing, and takes nothing away.
        cap.interrupt();
        cap.healthy(at(5_000), STABLE);
        cap.healthy(at(5_001), STABLE);
        assert_eq!(cap.failures(), 2);
        cap.healthy(at(50_000), STABLE);
        assert_eq!((cap.failures(), cap.lifetime()), (0, 3));
        // Nothing is saved for later.
        cap.fail();
        cap.healthy(at(50_001), STABLE);
        cap.healthy(at(50_300), STABLE);
        assert_eq!(cap.failures(), 1);
    }

    #[test]
    fn a_failure_begins_the_healing_anew() {
        let mut cap = Cap::default();
        cap.fail();
        cap.healthy(at(0), STABLE);
        cap.healthy(at(299), STABLE);
        cap.fail();
        cap.healthy(at(400), STABLE);
        cap.healthy(at(401), STABLE);
        assert_eq!(cap.failures(), 2);
    }

    proptest! {
        #[test]
        fn the_number_is_failures_less_healed_and_never_below_zero(steps in proptest::collection::vec((any::<bool>(), 0..1_000_u64), 1..200)) {
            let (mut cap, mut now, mut fails) = (Cap::default(), 0, 0);
            for (fail, seconds) in steps {
                now += seconds;
                let before = cap.failures();
                if fail {
                    cap.fail();
                    fails += 1;
                    prop_assert_eq!(cap.failures(), before + 1);
                } else {
                    cap.healthy(at(now), STABLE);
                    prop_assert!(u64::from(before - cap.failures()) <= now / 300 + 1);
                }
                prop_assert_eq!(cap.lifetime(), fails);
                prop_assert!(cap.backoff(Jitter::new(now)) <= Duration::from_secs(36));
            }
        }
    }
}
