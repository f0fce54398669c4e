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
    /// Entries per second that it was logging.
    pub rate: f64,
    /// The highest rate that a policy could have known of by then, see [`is_edge`](Self::is_edge).
    pub known: f64,
}

impl FullExit {
    /// A rate so many times the highest one known is new.
    pub const NEW: f64 = 1.5;

    /// Whether the guest did something that no policy could have known of: it logged more than 1.5
    /// times as fast as any vCPU had before, as far as looks at the rings could show, and as the
    /// same vCPU had at a full exit. What is known fades with a half-life of five seconds.
    ///
    /// So each vCPU is excused once for each such rise of its rate, and only until the rise was
    /// there to be seen.
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
