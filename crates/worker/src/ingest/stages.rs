//! Stages behind one another, each on a thread of its own: while one waits for Redis, the one before it works on the next batch.
//!
//! In:     batches, in their order.
//! Out:    what became of each, in the same order.
//! Keeps:  there is one batch a stage at most; after a failure nothing that came behind it is taken on; a panic of a thread ends the process.
//! Knows:  threads and channels. Not what a stage does.
//! Source: docs/house.md 3.

use std::{
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use shared::board::Phase;

use crate::{Ended, beat::Beat};

/// How long one wait for another stage may last: all show progress in between.
const SLICE: Duration = Duration::from_millis(250);

/// Stages that make `O` of `I`.
#[derive(Debug)]
pub struct Stages<I, O> {
    first: Sender<Result<I, Ended>>,
    last: Receiver<Result<O, Ended>>,
    threads: Vec<JoinHandle<()>>,
    /// How many were handed over and have not come out.
    on_their_way: usize,
}

impl<I: Send + 'static, O: Send + 'static> Stages<I, O> {
    /// Starts one stage.
    #[must_use]
    pub fn start(
        beat: Beat,
        work: impl FnMut(I, &mut Beat) -> Result<O, Ended> + Send + 'static,
    ) -> Self {
        let (first, given) = bounded(1);
        let (last, thread) = stage(given, beat, work);
        Self {
            first,
            last,
            threads: vec![thread],
            on_their_way: 0,
        }
    }

    /// Starts one more, behind the others.
    #[must_use]
    pub(super) fn then<P: Send + 'static>(
        mut self,
        beat: Beat,
        work: impl FnMut(O, &mut Beat) -> Result<P, Ended> + Send + 'static,
    ) -> Stages<I, P> {
        let (last, thread) = stage(self.last, beat, work);
        self.threads.push(thread);
        Stages {
            first: self.first,
            last,
            threads: self.threads,
            on_their_way: self.on_their_way,
        }
    }

    /// How many stages there are.
    #[must_use]
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Gives the next that came out; waits for it while more than `left` are on their way.
    ///
    /// # Errors
    /// What a stage ended with; [`Ended::Stopped`] when there is none any more.
    pub fn next(&mut self, left: usize, beat: &Beat) -> Result<Option<O>, Ended> {
        let came = loop {
            if self.on_their_way > left {
                match self.last.recv_timeout(SLICE) {
                    Ok(came) => break came,
                    // A stage ends by itself, once it hears of a stop.
                    Err(RecvTimeoutError::Timeout) => beat.progress(),
                    Err(RecvTimeoutError::Disconnected) => return Err(Ended::Stopped),
                }
            } else {
                match self.last.try_recv() {
                    Ok(came) => break came,
                    Err(TryRecvError::Empty) => return Ok(None),
                    Err(TryRecvError::Disconnected) => return Err(Ended::Stopped),
                }
            }
        };
        self.on_their_way -= 1;
        came.map(Some)
    }

    /// Hands one over, while fewer are on their way than there are stages.
    pub fn hand(&mut self, input: I) {
        debug_assert!(
            self.on_their_way < self.threads.len(),
            "a queue grows between stages"
        );
        self.on_their_way += 1;
        // Where the stage is gone, the next that is asked for says so.
        drop(self.first.send(Ok(input)));
    }

    /// Lets all that is on its way come out, as far as it does: what a stop keeps back is read again at the next start. Gives the panic of
    /// a stage as well, to be passed on when all else is in order.
    pub(super) fn end(self, beat: &Beat) -> (Vec<O>, thread::Result<()>) {
        drop(self.first);
        let mut came = Vec::new();
        loop {
            match self.last.recv_timeout(SLICE) {
                Ok(output) => came.extend(output),
                Err(RecvTimeoutError::Timeout) => beat.progress(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let ends = self.threads.into_iter().map(JoinHandle::join);
        (came, ends.fold(Ok(()), Result::and))
    }
}

/// Starts the thread of one stage, with a hold of its own on the worker's slot. It ends when the one before it has.
fn stage<I: Send + 'static, O: Send + 'static>(
    given: Receiver<Result<I, Ended>>,
    mut beat: Beat,
    mut work: impl FnMut(I, &mut Beat) -> Result<O, Ended> + Send + 'static,
) -> (Receiver<Result<O, Ended>>, JoinHandle<()>) {
    let (give, taken) = bounded(1);
    let thread = thread::spawn(move || {
        loop {
            match given.recv_timeout(SLICE) {
                Ok(input) => {
                    let output = input.and_then(|input| work(input, &mut beat));
                    let is_over = output.is_err();
                    // It waits for the next stage at most, or until the reader asks. What comes behind a failure is not taken on.
                    if give.send(output).is_err() || is_over {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            beat.phase(Phase::Idle);
        }
    });
    (taken, thread)
}

#[cfg(test)]
mod tests {
    use std::iter::from_fn;

    use shared::{
        board::BoardOwner,
        config::{Config, Flags},
    };

    use super::*;
    use crate::beat::tests::alone;

    fn beat() -> (Beat, BoardOwner) {
        let shards = ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into());
        let config = Config::load(None, std::iter::once(shards), &Flags::default()).unwrap();
        let (mut beat, board) = alone(&config);
        beat.ready();
        (beat, board)
    }

    /// Two stages; the first waits for a word before each.
    fn two(beat: &Beat) -> (Stages<u32, String>, Sender<()>) {
        let (go, word) = bounded(9);
        let stages = Stages::start(beat.another(), move |number: u32, _: &mut Beat| {
            word.recv().map(|()| number + 1).map_err(|_| Ended::Stopped)
        });
        let print = |number: u32, _: &mut Beat| match number {
            0..90 => Ok(number.to_string()),
            _ => panic!("the last stage"),
        };
        (stages.then(beat.another(), print), go)
    }

    fn all(stages: &mut Stages<u32, String>, left: usize, beat: &Beat) -> Vec<String> {
        from_fn(|| stages.next(left, beat).unwrap()).collect()
    }

    #[test]
    fn each_stage_has_one_and_all_come_out_in_their_order() {
        let (beat, _board) = beat();
        let (mut stages, go) = two(&beat);
        assert_eq!(stages.count(), 2);
        stages.hand(1);
        stages.hand(2);
        assert!(all(&mut stages, 2, &beat).is_empty(), "it does not wait");
        go.send(()).unwrap();
        assert_eq!(all(&mut stages, 1, &beat), ["2"], "there is room");
        stages.hand(3);
        go.send(()).unwrap();
        go.send(()).unwrap();
        assert_eq!(all(&mut stages, 0, &beat), ["3", "4"]);
        stages.hand(4);
        stages.hand(5);
        go.send(()).unwrap();
        drop(go);
        let (came, ended) = stages.end(&beat);
        assert_eq!(came, ["5"], "one had no word any more");
        assert!(ended.is_ok());
    }

    #[test]
    fn behind_a_failure_nothing_is_taken_on() {
        let (beat, _board) = beat();
        let fails = |number: u32, _: &mut Beat| match number {
            1 => Err(Ended::Stopped),
            _ => Ok(number),
        };
        let mut stages = Stages::start(beat.another(), fails).then(beat.another(), |number, _| {
            let passed: u32 = number;
            Ok(passed)
        });
        stages.hand(1);
        stages.hand(2);
        assert!(matches!(stages.next(1, &beat), Err(Ended::Stopped)));
        assert!(matches!(stages.next(0, &beat), Err(Ended::Stopped)));
        assert!(stages.end(&beat).0.is_empty());
    }

    #[test]
    fn a_panic_of_a_stage_stops_the_others_and_is_told() {
        let (beat, _board) = beat();
        let (mut stages, go) = two(&beat);
        go.send(()).unwrap();
        stages.hand(99);
        assert!(matches!(stages.next(0, &beat), Err(Ended::Stopped)));
        let (came, ended) = stages.end(&beat);
        assert!(came.is_empty() && ended.is_err() && beat.stopping());
    }
}
