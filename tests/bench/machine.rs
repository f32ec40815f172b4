//! Whether the machine ran at its speed: a host may stop a virtual machine's processors for a moment, and count it nowhere.
//!
//! Out:    the moments at which the same work took a thread more CPU time than usual.
//! Keeps:  what a thread waits for its turn is no CPU time: a machine that is merely busy is not taken for a slow one.
//! Source: clock_gettime(2), CLOCK_THREAD_CPUTIME_ID.

use std::{hint::black_box, thread::JoinHandle, time::Duration};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use nix::time::{ClockId, clock_gettime};
use shared::time::{Clock, UnixMillis};

/// How often it is looked.
const EVERY: Duration = Duration::from_millis(5);
/// Steps of the work: some 10 µs, within the processor's registers.
const STEPS: u64 = 10_000;
/// How often it is done at one look, of which the quickest counts: an interrupt is counted as its thread's time.
const TRIES: usize = 3;
/// So many times the usual CPU time is slow. Twice may be a neighbour on the same core.
pub(crate) const SLOW: i64 = 3;
/// What a pause of the machine held up has been caught up on so long after it.
pub(crate) const CAUGHT_UP: Duration = Duration::from_millis(200);

/// A look-out on a thread of its own.
pub(crate) struct Lookout {
    stop: Sender<()>,
    thread: JoinHandle<Vec<(UnixMillis, i64)>>,
}

/// When the machine was slow, in order.
pub(crate) struct Pauses {
    looks: usize,
    slow: Vec<UnixMillis>,
}

impl Lookout {
    pub(crate) fn start() -> Self {
        let (stop, stopped) = bounded(1);
        let thread = std::thread::spawn(move || {
            let mut looks = Vec::new();
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let times = [(); TRIES].map(|()| cpu_time_of_work());
                looks.push((
                    Clock::wall_now(),
                    times.into_iter().min().unwrap_or_default(),
                ));
            }
            looks
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self) -> Pauses {
        self.stop.send(()).unwrap();
        let looks = self.thread.join().unwrap();
        let mut times: Vec<i64> = looks.iter().map(|&(_, time)| time).collect();
        times.sort_unstable();
        let usual = times.get(times.len() / 2).copied().unwrap_or_default();
        let slow = looks.iter().filter(|&&(_, time)| time > SLOW * usual);
        Pauses {
            looks: looks.len(),
            slow: slow.map(|&(at, _)| at).collect(),
        }
    }
}

impl Pauses {
    /// Whether the machine was slow between two moments, or so shortly before that it had to catch up.
    pub(crate) fn touch(&self, from: UnixMillis, to: UnixMillis) -> bool {
        let place = self.slow.partition_point(|at| at.after(CAUGHT_UP) < from);
        self.slow.get(place).is_some_and(|&at| at <= to)
    }

    /// How much of the time it was slow, in percent.
    pub(crate) fn percent(&self) -> f64 {
        100.0 * self.slow.len() as f64 / self.looks as f64
    }
}

/// In nanoseconds.
fn cpu_time_of_work() -> i64 {
    let cpu_time = || {
        let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
        time.tv_sec() * 1_000_000_000 + time.tv_nsec()
    };
    let begun = cpu_time();
    let mut sum = black_box(1_u64);
    for step in 0..STEPS {
        sum = sum.wrapping_mul(31).wrapping_add(step);
    }
    black_box(sum);
    cpu_time() - begun
}
