//! Tests of the state machine: by table, and at random.

use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules {
    tick: Duration::from_millis(250),
    reap_limit: Duration::from_secs(10),
    max_restarts: 10,
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
        Backoff, Backpressured, Failed, Healthy, Killed, Starting, Stopped, Unkillable,
    };
    let idle = || look(beat(Phase::Idle, 1));
    let fork_failed = || Event::ForkFailed {
        cause: Cause::Fork("EAGAIN".into()),
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
fn causes_are_named() {
    let causes = [
        (Cause::Exit(0), "exit_0"),
        (Cause::Signal("RTMIN+3".into()), "signal_RTMIN+3"),
        (Cause::Exec("ENOENT".into()), "exec_ENOENT"),
        (Cause::Fork("EAGAIN".into()), "fork_EAGAIN"),
        (Cause::Unkillable, "unkillable"),
    ];
    for (cause, name) in causes {
        assert_eq!(cause.to_string(), name);
    }
}

fn phases() -> impl Strategy<Value = Phase> {
    prop_oneof![
        Just(Phase::Boot),
        Just(Phase::Idle),
        Just(Phase::Work),
        Just(Phase::Redis),
        Just(Phase::Kafka),
        Just(Phase::Drain)
    ]
}

fn causes() -> impl Strategy<Value = Cause> {
    // 78 is rare: it ends a run of events early.
    prop_oneof![20 => (0..78).prop_map(Cause::Exit), 20 => Just(Cause::Signal("KILL".into())), 1 => Just(Cause::Exit(78))]
}

fn events() -> impl Strategy<Value = Event> {
    let jitter = || any::<u64>().prop_map(Jitter::new);
    prop_oneof![
        10 => Just(Event::Look(None)),
        30 => (phases(), 0..3_u64, any::<bool>(), any::<bool>()).prop_map(|(phase, progress, healthy, pressed)| {
            let healthy_since = healthy.then_some(at(1));
            let backpressure_since = pressed.then_some(at(1));
            look(SlotBeat { healthy_since, backpressure_since, ..beat(phase, progress) })
        }),
        5 => jitter().prop_map(|jitter| Event::ForkFailed { cause: Cause::Fork("EAGAIN".into()), jitter }),
        20 => (causes(), jitter()).prop_map(|(cause, jitter)| Event::Died { cause, jitter }),
        1 => Just(Event::Stop),
        2 => Just(Event::Kill),
        1 => Just(Event::Retry),
    ]
}

proptest! {
    /// A world around the slot: a process is there from a start on until it is reaped.
    #[test]
    fn no_sequence_of_events_breaks_the_rules(max_restarts in 0..12_u32, steps in proptest::collection::vec((events(), 0..40_000_u64), 1..300)) {
        let mut slot = Slot::new(Rules { max_restarts, ..RULES }, at(0));
        let (mut now, mut alive, mut generation) = (0, false, 0);
        for (event, millis) in steps {
            now += millis;
            // Without a process nothing is reaped, and a fork fails only before there is one.
            let reaped = matches!(event, Event::Died { .. } | Event::ForkFailed { .. });
            if reaped && !alive {
                continue;
            }
            let (before, stopping, failures) = (slot.state(), slot.stopping, slot.cap().failures());
            let (next, actions) = step(slot, event.clone(), at(now));
            slot = next;
            let after = slot.state();
            // Dead is passed through within one step.
            let through_dead = allowed(before, SlotState::Dead) && allowed(SlotState::Dead, after);
            prop_assert!(before == after || allowed(before, after) || through_dead, "{before} -> {after}");
            if reaped && before != after {
                alive = false;
            }
            prop_assert!(slot.cap().failures() <= failures + 1);
            for action in &actions {
                match action {
                    Action::Start(started) => {
                        prop_assert!(!alive && !stopping, "a second process, or one while draining");
                        prop_assert!(*started > generation);
                        prop_assert!(slot.cap().failures() <= max_restarts);
                        (alive, generation) = (true, *started);
                    }
                    Action::Terminate | Action::Kill => prop_assert!(alive),
                    Action::Escalate(_) => prop_assert!(!stopping && after == SlotState::Failed),
                }
            }
            prop_assert_eq!(alive, lives(after));
        }
        // Whatever happened, draining ends.
        now += 1;
        let last = [Event::Stop, Event::Kill, Event::Look(None), died(1), Event::Look(None)];
        for event in last {
            let (next, actions) = step(slot, event, at(now));
            slot = next;
            prop_assert!(!actions.iter().any(|action| matches!(action, Action::Start(_) | Action::Escalate(_))));
        }
        prop_assert_eq!(slot.state(), SlotState::Stopped);
    }
}

#[test]
fn it_is_known_when_time_alone_moves_a_slot_on() {
    assert_eq!(Slot::new(RULES, at(7)).due(), Some(at(7)));
    assert_eq!(run(&[]).0.due(), None);
    assert_eq!(run(&[(5, Event::Kill)]).0.due(), Some(at(10_005)));
    let (slot, _) = run(&[(1, died(1)), (1, Event::Look(None)), (2, died(1))]);
    assert_eq!(
        (slot.due(), slot.wait()),
        (Some(at(1_002)), Duration::from_secs(1))
    );
}
