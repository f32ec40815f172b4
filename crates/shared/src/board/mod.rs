//! The board: shared memory in which processes show each other how they are.
//!
//! In:     the supervisor's word on each slot, each worker's signs of life, each shard's clock and ledger.
//! Out:    the same for the others, without a call to anybody.
//! Keeps:  one writer a cell, no locks; whatever a cell holds, reading it gives a value within range.
//! Knows:  the layout; how it is mapped. No policy.
//! Source: docs/supervision.md 2; docs/spec.md 2.6.

mod layout;
mod map;
mod owner;
mod show;
mod standing;
mod views;

pub use self::{
    layout::{Phase, SlotState},
    map::BoardError,
    owner::{BoardOwner, boards},
    show::{Row, View},
    standing::{Cause, Death, Standing},
    views::{
        Board, ClockWriter, Ledger, PublishedClock, SlotBeat, SupervisorCells, Totals, WorkerCells,
    },
};
