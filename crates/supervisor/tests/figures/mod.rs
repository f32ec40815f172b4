//! What supervision costs, and how soon it sees: `cargo test -p supervisor --test whole figures -- --nocapture` prints it.

use std::{fs, time::Duration};

use nix::sys::signal::Signal;
use shared::time::Clock;

use crate::world::{World, boards_of, eventually, send, workers_of};

/// Time that a process has run on a core.
fn run_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Bytes that it holds.
fn resident_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Kills a worker and tells it all to begin anew; gives how long its end took to be known: the supervisor has reaped it.
fn kill_and_retry(world: &World, pid: u32) -> Duration {
    let workers = world.await_workers(2);
    let (victim, _) = workers[0];
    let path = format!("/proc/{victim}");
    let begun = Clock::mono_now();
    send(victim, Signal::SIGKILL);
    // Watched closely: this is what is measured.
    while fs::exists(&path).unwrap() {
        std::thread::yield_now();
    }
    let took = Clock::mono_now().since(begun);
    world.signal(Signal::SIGUSR2);
    eventually("a successor", || {
        let now = workers_of(pid);
        (now.len() == 2 && now != workers).then_some(())
    });
    took
}

#[test]
fn a_death_is_noticed_within_milliseconds() {
    let mut world = World::new("supervision.tick = \"10s\"");
    let pid = world.start(&["--shards", "0"], "");
    (0..2).for_each(|slot| drop(world.await_said(&format!("changed slot={slot} "))));
    let mut took: Vec<Duration> = (0..200).map(|_| kill_and_retry(&world, pid)).collect();
    took.sort_unstable();
    println!(
        "death to reaped: p10={:?} p50={:?} p99={:?} most={:?}",
        took[20], took[100], took[198], took[199]
    );
    // Other work of this machine is in the later ones; a look at the next tick would be in all.
    assert!(took[20] < Duration::from_millis(5), "{took:?}");
    world.stop_well();
}

#[test]
fn an_idle_supervisor_costs_next_to_nothing() {
    let mut world = World::new("");
    let pid = world.start(&["--shards", "0-7", "--max-workers", "4"], "");
    world.await_healthy(5);
    let (begun, before) = (Clock::mono_now(), run_time(pid));
    stand::pause(Duration::from_secs(10));
    let (length, ran) = (Clock::mono_now().since(begun), run_time(pid) - before);
    let resident = resident_bytes(pid);
    println!("idle supervisor: ran {ran:?} of {length:?}, resident {resident} bytes");
    assert!(ran < length / 1_000, "{ran:?} of {length:?}");
    assert!(resident < 10 << 20, "{resident}");
    world.stop_well();
}

#[test]
fn sixty_four_workers_start_and_stop() {
    let mut world = World::new("");
    let pid = world.start(&["--shards", "0-127", "--max-workers", "63"], "");
    world.await_workers(64);
    (0..64).for_each(|slot| drop(world.await_said(&format!("changed slot={slot} "))));
    assert_eq!(world.said("cause="), 0, "{}", world.log());
    world.stop_well();
    assert_eq!(boards_of(pid), 0);
}

#[test]
fn a_thousand_respawns_leave_nothing_behind() {
    let mut world = World::new("");
    let pid = world.start(&["--shards", "0"], "");
    (0..2).for_each(|slot| drop(world.await_said(&format!("changed slot={slot} "))));
    for _ in 0..100 {
        kill_and_retry(&world, pid);
    }
    let (open, resident) = (descriptors(pid), resident_bytes(pid));
    for _ in 0..900 {
        kill_and_retry(&world, pid);
    }
    let (open_after, resident_after) = (descriptors(pid), resident_bytes(pid));
    println!(
        "900 respawns: descriptors {open} and {open_after}, resident {resident} and {resident_after} bytes"
    );
    assert_eq!(open_after, open);
    assert!(
        resident_after < resident + (256 << 10),
        "{resident} {resident_after}"
    );
    assert_eq!(boards_of(pid), 1);
    world.stop_well();
}
