//! Tests of the state machine: by table, and at random.

use super::*;

const RULES: Rules = Rules {
    tick: Duration::from_millis(250),
    reap_limit: Duration::from_secs(10),
    drain: Duration::from_secs(25),
    boot: Duration::from_secs(60),
    hang: Duration::from_secs(60),
    blocked: Duration::from_secs(300),
    stable: Duration::from_secs(300),
    max_restarts: 10,
    hang_signal: None,
    policy: Policy::Escalate,
};

fn at(millis: u64) -> MonoNanos {
    MonoNanos::default().after(Duration::from_millis(millis))
}

fn beat(phase: Phase, progress: u64) -> SlotBeat {
    SlotBeat {
        pid: 7,
        healthy_since: (phase != Phase::Boot).then_some(at(1)),
        backpressure_since: None,
        progress,
        phase,
        phase_since: at(1),
        in_flight: 0,
        queue_depth: 0,
        longest_gap: Duration::ZERO,
    }
}

fn pressed(phase: Phase) -> SlotBeat {
    SlotBeat {
        backpressure_since: Some(at(1)),
        ..beat(phase, 1)
    }
}

fn look(beat: SlotBeat) -> Event {
    Event::Look(Some(beat))
}

fn died(code: i32) -> Event {
    Event::Died {
        cause: Cause::Exit(code),
        jitter: Jitter::default(),
    }
}

/// Runs events from the first start on; gives the slot and the last actions.
fn run(events: &[(u64, Event)]) -> (Slot, Vec<Action>) {
    let first = step(Slot::new(RULES, at(0)), Event::Look(None), at(0));
    assert_eq!(first.1, [Action::Start(1)]);
    events.iter().fold(first, |(slot, _), (millis, event)| {
        step(slot, event.clone(), at(*millis))
    })
}

/// A name, moments and events, the state they lead to, what is to be done at last.
type Row = (&'static str, Vec<(u64, Event)>, SlotState, Vec<Action>);

#[test]
fn events_lead_where_the_table_says() {
    use SlotState::{
        Backoff, Backpressured, Failed, Healthy, Killed, Starting, Stopped, Suspect, Unkillable,
    };
    let idle = || look(beat(Phase::Idle, 1));
    let fork_failed = || Event::ForkFailed {
        cause: Cause::Fork(11),
        jitter: Jitter::default(),
    };
    let rows: Vec<Row> = vec![
        (
            "no beat yet",
            vec![(1, Event::Look(None))],
            Starting,
            vec![],
        ),
        (
            "a beat in boot",
            vec![(1, look(beat(Phase::Boot, 1)))],
            Starting,
            vec![],
        ),
        ("the first loop", vec![(1, idle())], Healthy, vec![]),
        (
            "waiting in boot",
            vec![(1, look(pressed(Phase::Boot)))],
            Backpressured,
            vec![],
        ),
        (
            "pressed",
            vec![(1, idle()), (2, look(pressed(Phase::Work)))],
            Backpressured,
            vec![],
        ),
        (
            "just cleared",
            vec![(1, look(pressed(Phase::Work))), (2, idle()), (251, idle())],
            Backpressured,
            vec![],
        ),
        (
            "cleared for a tick",
            vec![(1, look(pressed(Phase::Work))), (2, idle()), (252, idle())],
            Healthy,
            vec![],
        ),
        (
            "cleared but in boot",
            vec![
                (1, look(pressed(Phase::Boot))),
                (2, look(beat(Phase::Boot, 2))),
                (999, look(beat(Phase::Boot, 3))),
            ],
            Backpressured,
            vec![],
        ),
        (
            "silent in kafka",
            vec![
                (1, look(beat(Phase::Kafka, 1))),
                (5_002, look(beat(Phase::Kafka, 1))),
            ],
            Backpressured,
            vec![],
        ),
        (
            "busy in redis",
            vec![
                (1, look(beat(Phase::Redis, 1))),
                (5_002, look(beat(Phase::Redis, 2))),
            ],
            Healthy,
            vec![],
        ),
        (
            "silent at work",
            vec![
                (1, look(beat(Phase::Work, 1))),
                (5_002, look(beat(Phase::Work, 1))),
            ],
            Healthy,
            vec![],
        ),
        ("first failure", vec![(1, died(1))], Backoff, vec![]),
        (
            "and its restart, at once",
            vec![(1, died(0)), (1, Event::Look(None))],
            Starting,
            vec![Action::Start(2)],
        ),
        ("no fork", vec![(1, fork_failed())], Backoff, vec![]),
        (
            "second failure waits",
            vec![
                (1, fork_failed()),
                (1, Event::Look(None)),
                (2, died(1)),
                (1_001, Event::Look(None)),
            ],
            Backoff,
            vec![],
        ),
        (
            "for a second",
            vec![
                (1, fork_failed()),
                (1, Event::Look(None)),
                (2, died(1)),
                (1_002, Event::Look(None)),
            ],
            Starting,
            vec![Action::Start(3)],
        ),
        (
            "a refusal",
            vec![(1, died(78))],
            Failed,
            vec![Action::Escalate(Exit::Config)],
        ),
        (
            "asked",
            vec![(1, idle()), (2, Event::Stop)],
            Healthy,
            vec![Action::Terminate],
        ),
        (
            "asked once",
            vec![(1, idle()), (2, Event::Stop), (3, Event::Stop)],
            Healthy,
            vec![],
        ),
        (
            "asked and ended",
            vec![(1, idle()), (2, Event::Stop), (3, died(0))],
            Stopped,
            vec![],
        ),
        (
            "asked and refused",
            vec![(1, idle()), (2, Event::Stop), (3, died(78))],
            Stopped,
            vec![],
        ),
        (
            "stopped before it was due",
            vec![(1, died(1)), (1, Event::Stop), (9_000, Event::Look(None))],
            Stopped,
            vec![],
        ),
        (
            "failed and stopped",
            vec![(1, died(78)), (1, Event::Stop)],
            Stopped,
            vec![],
        ),
        (
            "no judging when draining",
            vec![
                (1, idle()),
                (2, Event::Stop),
                (3, look(pressed(Phase::Work))),
            ],
            Healthy,
            vec![],
        ),
        (
            "killed",
            vec![(1, idle()), (2, Event::Stop), (3, Event::Kill)],
            Killed,
            vec![Action::Kill],
        ),
        (
            "killed once",
            vec![(1, Event::Stop), (2, Event::Kill), (3, Event::Kill)],
            Killed,
            vec![],
        ),
        (
            "killed and reaped",
            vec![(1, Event::Stop), (2, Event::Kill), (3, died(1))],
            Stopped,
            vec![],
        ),
        (
            "not to be killed",
            vec![
                (1, Event::Stop),
                (2, Event::Kill),
                (10_003, Event::Look(None)),
            ],
            Unkillable,
            vec![],
        ),
        (
            "reaped at last",
            vec![
                (1, Event::Kill),
                (10_002, Event::Look(None)),
                (10_003, died(1)),
            ],
            Backoff,
            vec![],
        ),
        (
            "tried again",
            vec![(1, died(78)), (2, Event::Retry)],
            Starting,
            vec![Action::Start(2)],
        ),
        (
            "not while draining",
            vec![
                (1, idle()),
                (2, Event::Stop),
                (3, Event::Retry),
                (4, died(1)),
                (5, Event::Retry),
            ],
            Stopped,
            vec![],
        ),
        (
            "silent for its budget",
            vec![(1, idle()), (60_000, idle()), (60_001, idle())],
            Suspect,
            vec![],
        ),
        (
            "suspect, and looked at again too soon",
            vec![(1, idle()), (60_001, idle()), (60_250, idle())],
            Suspect,
            vec![],
        ),
        (
            "hung",
            vec![(1, idle()), (60_001, idle()), (60_251, idle())],
            Killed,
            vec![Action::Capture, Action::Kill],
        ),
        (
            "it moved in time",
            vec![
                (1, idle()),
                (60_001, idle()),
                (60_251, look(beat(Phase::Idle, 2))),
            ],
            Healthy,
            vec![],
        ),
        (
            "another phase is a sign of life",
            vec![(1, idle()), (60_001, look(beat(Phase::Redis, 1)))],
            Healthy,
            vec![],
        ),
        (
            "kafka has a budget of its own",
            vec![
                (1, look(beat(Phase::Kafka, 1))),
                (300_000, look(beat(Phase::Kafka, 1))),
            ],
            Backpressured,
            vec![],
        ),
        (
            "and an end",
            vec![
                (1, look(beat(Phase::Kafka, 1))),
                (300_001, look(beat(Phase::Kafka, 1))),
            ],
            Suspect,
            vec![],
        ),
        (
            "backpressure excuses nothing and condemns nobody",
            vec![
                (1, look(pressed(Phase::Work))),
                (59_999, look(pressed(Phase::Work))),
            ],
            Backpressured,
            vec![],
        ),
        (
            "no beat at all",
            vec![(60_000, Event::Look(None)), (60_250, Event::Look(None))],
            Killed,
            vec![Action::Capture, Action::Kill],
        ),
        (
            "suspect in boot, and back",
            vec![
                (60_000, Event::Look(None)),
                (60_250, look(beat(Phase::Boot, 1))),
            ],
            Starting,
            vec![],
        ),
        (
            "ages start anew",
            vec![
                (1, idle()),
                (60_001, idle()),
                (60_100, Event::Anew),
                (60_251, idle()),
            ],
            Healthy,
            vec![],
        ),
        (
            "not judged while draining",
            vec![(1, idle()), (2, Event::Stop), (90_000, idle())],
            Healthy,
            vec![],
        ),
        (
            "recycled",
            vec![(1, idle()), (2, Event::Recycle), (3, idle())],
            Healthy,
            vec![],
        ),
        (
            "recycled, deaf to TERM",
            vec![(1, idle()), (2, Event::Recycle), (25_002, idle())],
            Killed,
            vec![Action::Kill],
        ),
        (
            "recycled and ended",
            vec![(1, idle()), (2, Event::Recycle), (3, died(0))],
            Starting,
            vec![Action::Start(2)],
        ),
        (
            "recycled, killed and ended",
            vec![
                (1, idle()),
                (2, Event::Recycle),
                (25_002, idle()),
                (25_003, died(1)),
            ],
            Starting,
            vec![Action::Start(2)],
        ),
        (
            "recycled on a new record that is refused",
            vec![
                (1, idle()),
                (2, Event::Recycle),
                (3, died(0)),
                (4, died(78)),
            ],
            Failed,
            vec![],
        ),
        (
            "refused later on",
            vec![
                (1, idle()),
                (2, Event::Recycle),
                (3, died(0)),
                (4, idle()),
                (5, died(78)),
            ],
            Failed,
            vec![Action::Escalate(Exit::Config)],
        ),
        (
            "stopped while recycled",
            vec![
                (1, idle()),
                (2, Event::Recycle),
                (3, Event::Stop),
                (4, died(0)),
            ],
            Stopped,
            vec![],
        ),
        (
            "a failed one is recycled at once",
            vec![(1, died(78)), (2, Event::Recycle)],
            Starting,
            vec![Action::Start(2)],
        ),
    ];
    for (what, events, state, actions) in rows {
        let (slot, last) = run(&events);
        assert_eq!((slot.state(), last), (state, actions), "{what}");
    }
}

#[test]
fn the_eleventh_failure_is_one_too_many() {
    let (mut slot, mut now, mut starts) = (Slot::new(RULES, at(0)), 0, 0);
    loop {
        now += 40_000;
        let (next, actions) = step(slot, Event::Look(None), at(now));
        assert_eq!(actions.len(), 1);
        starts += 1;
        let (next, actions) = step(next, died(1), at(now));
        slot = next;
        if !actions.is_empty() {
            assert_eq!(actions, [Action::Escalate(Exit::Restarts)]);
            break;
        }
    }
    // The first start and ten restarts.
    assert_eq!(
        (starts, slot.state(), slot.deaths().len()),
        (11, SlotState::Failed, DEATHS_KEPT)
    );
}

#[test]
fn a_worker_that_could_not_be_killed_is_one_failure() {
    let (slot, _) = run(&[(1, Event::Kill), (10_002, Event::Look(None))]);
    assert_eq!((slot.cap().failures(), slot.due()), (1, None));
    let (slot, _) = step(slot, died(1), at(10_003));
    assert_eq!(slot.cap().failures(), 1);
    assert_eq!(
        slot.deaths()
            .map(|death| death.cause.to_string())
            .collect::<Vec<_>>(),
        ["unkillable"]
    );
}

#[test]
fn healthy_once_is_kept_over_deaths_and_a_stop_is_no_failure() {
    let (slot, _) = run(&[
        (1, look(beat(Phase::Idle, 1))),
        (2, died(1)),
        (2, Event::Look(None)),
        (3, Event::Stop),
    ]);
    assert!(slot.healthy_once());
    let (slot, _) = step(slot, died(0), at(4));
    assert_eq!(
        (slot.state(), slot.cap().lifetime()),
        (SlotState::Stopped, 1)
    );
}

#[test]
fn the_age_of_a_beat_begins_when_it_was_last_seen_to_change() {
    let (slot, _) = run(&[
        (1, look(beat(Phase::Idle, 1))),
        (500, look(beat(Phase::Idle, 1))),
    ]);
    assert_eq!(slot.beat_age(at(600)), Some(Duration::from_millis(599)));
    let (slot, _) = step(slot, look(beat(Phase::Idle, 2)), at(700));
    assert_eq!(slot.beat_age(at(700)), Some(Duration::ZERO));
    // Another life begins without one.
    let (slot, _) = step(slot, died(1), at(701));
    let (slot, _) = step(slot, Event::Look(None), at(701));
    assert_eq!(slot.beat_age(at(702)), None);
}

#[test]
fn a_hung_worker_has_five_seconds_for_its_core() {
    let rules = Rules {
        hang_signal: Some(HangSignal::Abrt),
        ..RULES
    };
    let events = [
        (0, Event::Look(None)),
        (1, look(beat(Phase::Work, 1))),
        (60_001, look(beat(Phase::Work, 1))),
        (60_251, look(beat(Phase::Work, 1))),
    ];
    let (slot, actions) = events.iter().fold(
        (Slot::new(rules, at(0)), Vec::new()),
        |(slot, _), (millis, event)| step(slot, event.clone(), at(*millis)),
    );
    assert_eq!(
        (slot.state(), actions),
        (
            SlotState::Hung,
            vec![Action::Capture, Action::Signal(HangSignal::Abrt)]
        )
    );
    assert_eq!(slot.due(), Some(at(65_251)));
    let (killed, actions) = step(slot.clone(), Event::Look(None), at(65_251));
    assert_eq!(
        (killed.state(), actions),
        (SlotState::Killed, vec![Action::Kill])
    );
    // It ended by the signal: it is the hang that is counted, once.
    let (slot, _) = step(slot, died(134), at(60_300));
    assert_eq!(
        (slot.state(), slot.cap().failures()),
        (SlotState::Backoff, 1)
    );
    assert_eq!(
        slot.deaths().last().map(|death| death.cause),
        Some(Cause::Hang(Phase::Work))
    );
}

#[test]
fn a_recycle_is_no_failure_and_isolation_drains_nobody() {
    let (slot, _) = run(&[
        (1, look(beat(Phase::Idle, 1))),
        (2, Event::Recycle),
        (3, died(0)),
    ]);
    assert_eq!((slot.cap().lifetime(), slot.deaths().len()), (0, 0));
    assert!(slot.on_trial() && !slot.recycling());
    let isolated = Rules {
        policy: Policy::Isolate,
        ..RULES
    };
    let (slot, _) = step(Slot::new(isolated, at(0)), Event::Look(None), at(0));
    let (slot, actions) = step(slot, died(78), at(1));
    assert_eq!((slot.state(), actions), (SlotState::Failed, vec![]));
}

/// xorshift: a million sequences are too many for a generator that shrinks.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn event(&mut self) -> Event {
        const PHASES: [Phase; 6] = [
            Phase::Boot,
            Phase::Idle,
            Phase::Work,
            Phase::Redis,
            Phase::Kafka,
            Phase::Drain,
        ];
        let jitter = Jitter::new(self.0);
        match self.below(100) {
            0..20 => Event::Look(None),
            20..60 => {
                let phase = PHASES[usize::try_from(self.below(6)).unwrap()];
                let mut beat = beat(phase, self.below(2));
                beat.healthy_since = (self.below(2) == 0).then_some(at(1));
                beat.backpressure_since = (self.below(3) == 0).then_some(at(1));
                look(beat)
            }
            60..65 => Event::ForkFailed {
                cause: Cause::Fork(11),
                jitter,
            },
            65..85 => Event::Died {
                cause: match self.below(40) {
                    0 => Cause::Exit(78),
                    1..20 => Cause::Exit(1),
                    _ => Cause::Signal(9),
                },
                jitter,
            },
            85..86 => Event::Stop,
            86..88 => Event::Kill,
            88..91 => Event::Anew,
            91..96 => Event::Recycle,
            _ => Event::Retry,
        }
    }
}

/// Whether a step may lead from one state to the other: some states are passed through within one.
fn leads(before: SlotState, after: SlotState) -> bool {
    use SlotState::{Dead, Hung, Killed, Starting, Suspect};
    before == after
        || allowed(before, after)
        || (allowed(before, Dead) && (allowed(Dead, after) || after == Starting))
        || (before == Suspect && allowed(Suspect, Hung) && after == Killed)
}

/// A world around the slot: a process is there from a start on until it is reaped.
fn play(dice: &mut Dice, length: u64) {
    let max_restarts = u32::try_from(dice.below(12)).unwrap();
    let rules = Rules {
        max_restarts,
        hang_signal: (dice.below(2) == 0).then_some(HangSignal::Abrt),
        policy: if dice.below(4) == 0 {
            Policy::Isolate
        } else {
            Policy::Escalate
        },
        ..RULES
    };
    let mut slot = Slot::new(rules, at(0));
    let (mut now, mut alive, mut generation) = (0, false, 0);
    for _ in 0..length {
        now += dice.below(40_000);
        let event = dice.event();
        // Without a process nothing is reaped, and a fork fails only before there is one.
        let reaped = matches!(event, Event::Died { .. } | Event::ForkFailed { .. });
        if reaped && !alive {
            continue;
        }
        let (before, stopping, failures) = (slot.state, slot.stopping, slot.cap.failures());
        let given = slot.generation;
        let is_retry = matches!(event, Event::Retry);
        let was_suspect_long =
            before == SlotState::Suspect && at(now).since(slot.since) >= RULES.tick;
        let recycled = slot.recycling.is_some();
        let killed_by_order = matches!(event, Event::Kill);
        let (next, actions) = step(slot, event, at(now));
        slot = next;
        let after = slot.state;
        assert!(leads(before, after), "{before} -> {after}");
        if reaped && (before != after || slot.generation != given) {
            alive = false;
        }
        assert!(
            slot.cap.failures() <= failures + 1
                && (is_retry || slot.cap.failures() <= max_restarts + 1)
        );
        for action in &actions {
            match action {
                Action::Start(started) => {
                    assert!(
                        !alive && !stopping,
                        "a second process, or one while draining"
                    );
                    assert!(*started > generation);
                    (alive, generation) = (true, *started);
                }
                Action::Terminate | Action::Capture | Action::Signal(_) => assert!(alive),
                Action::Kill => assert!(
                    alive
                        && (killed_by_order
                            || recycled
                            || was_suspect_long
                            || before == SlotState::Hung),
                    "killed without a reason: {before}"
                ),
                Action::Escalate(_) => assert!(
                    !stopping && after == SlotState::Failed && rules.policy == Policy::Escalate
                ),
            }
        }
        assert_eq!(alive, lives(after));
    }
    // Whatever happened, draining ends.
    now += 1;
    let last = [
        Event::Stop,
        Event::Kill,
        Event::Look(None),
        died(1),
        Event::Look(None),
    ];
    for event in last {
        let (next, actions) = step(slot, event, at(now));
        slot = next;
        assert!(
            !actions
                .iter()
                .any(|action| matches!(action, Action::Start(_) | Action::Escalate(_)))
        );
    }
    assert_eq!(slot.state, SlotState::Stopped);
}

#[test]
fn a_million_sequences_of_events_break_no_rule() {
    let seed = shared::time::Clock::mono_now().0 | 1;
    println!("seed={seed}");
    let mut dice = Dice(seed);
    for _ in 0..1_000_000 {
        let length = 1 + dice.below(30);
        play(&mut dice, length);
    }
}

#[test]
fn it_is_known_when_time_alone_moves_a_slot_on() {
    assert_eq!(Slot::new(RULES, at(7)).due(), Some(at(7)));
    assert_eq!(run(&[]).0.due(), Some(at(60_000)));
    let suspect = run(&[(60_000, Event::Look(None))]).0;
    assert_eq!(suspect.due(), Some(at(60_250)));
    assert_eq!(run(&[(1, Event::Stop)]).0.due(), None);
    assert_eq!(run(&[(1, Event::Recycle)]).0.due(), Some(at(25_001)));
    assert_eq!(run(&[(5, Event::Kill)]).0.due(), Some(at(10_005)));
    let (slot, _) = run(&[(1, died(1)), (1, Event::Look(None)), (2, died(1))]);
    assert_eq!(
        (slot.due(), slot.wait()),
        (Some(at(1_002)), Duration::from_secs(1))
    );
}
