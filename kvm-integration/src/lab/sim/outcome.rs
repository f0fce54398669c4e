// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a simulation shows.

use kvm_dirty_ring::error::PolicyError;

use crate::lab::{Measured, Sample};

/// What a simulation shows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// What was measured after the warm-up.
    pub measured: Measured,
    /// The rings over time, from the start.
    pub samples: Vec<Sample>,
    /// Every exit for a full ring, from the start.
    pub full_exits: Vec<FullExit>,
    /// Each ring at the end.
    pub rings: Vec<RingTotals>,
    /// How often the policy was replaced, for it had failed.
    pub failures: Vec<PolicyError>,
}

/// An exit for a full ring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FullExit {
    /// Seconds since the start.
    pub at: f64,
    /// Whose ring was full.
    pub vcpu: usize,
    /// Entries per second that it had logged since the last look at the rings, on average.
    pub rate: f64,
    /// The highest rate that the policy could know of by that look, see [`is_edge`](Self::is_edge).
    pub known: f64,
}

impl FullExit {
    /// A rate so many times the highest one known is new.
    pub const NEW: f64 = 1.15;

    /// Whether the guest did something that no policy could have known of: since the last look, or,
    /// where that has led to a pass that was under way, since the one before, this vCPU has logged
    /// more than 1.15 times as fast as was known by then. Known is how fast the fastest vCPU was
    /// between two looks, and what this vCPU's full exits have shown since; it fades with a
    /// half-life of five seconds.
    ///
    /// A rate is measured over at least the time in which four million entries a second would fill a
    /// ring: what comes in less is a spurt.
    ///
    /// So a vCPU is excused once for a rise of its rate, and only until the rise was there to be
    /// seen.
    pub fn is_edge(&self) -> bool {
        self.rate > Self::NEW * self.known
    }
}

/// What became of one ring's entries since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RingTotals {
    /// Entries logged; the last one may be under way.
    pub logged: f64,
    /// Entries harvested.
    pub taken: u64,
    /// Entries waiting at the end.
    pub waiting: u64,
    /// Full exits.
    pub full_exits: u64,
}
