//! When to empty the rings.
//!
//! A policy is a pure function of what it is shown, with what it remembers: no clock, no thread, no
//! allocation. The [`Reaper`](crate::Reaper) drives it; so can a simulation or a fuzzer.

mod fixed;

use core::time::Duration;

pub use fixed::Fixed;

/// Decides when the rings are emptied.
pub trait Pacing: Send {
    /// Looks at the rings and says what to do, and when to look again at the latest. It is called
    /// again early when a vCPU has stopped on a full ring.
    fn decide(&mut self, seen: &Observation<'_>) -> Decision;
}

/// What a policy is shown.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Observation<'a> {
    /// Time since the observation before; zero at the first.
    pub elapsed: Duration,
    /// Every ring, in the order in which the vCPUs were attached.
    pub rings: &'a [RingObservation],
}

impl<'a> Observation<'a> {
    /// What is seen `elapsed` after the observation before.
    pub fn new(elapsed: Duration, rings: &'a [RingObservation]) -> Self {
        Self { elapsed, rings }
    }
}

/// What a policy is shown of one ring. Counts go up only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RingObservation {
    /// Entries at which the vCPU stops.
    pub soft_limit: u64,
    /// Entries harvested so far, by whomever.
    pub taken: u64,
    /// Exits for a full ring so far.
    pub full_exits: u64,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Whether to empty the rings now.
    pub reap: bool,
    /// When to look again. The reaper holds it within bounds of its own.
    pub look_again: Duration,
}
