// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Policies: when to empty the rings.
//!
//! A policy is a pure function of its observations and its memory: it has no clock and no thread, and allocates nothing. A
//! [`Pacer`] keeps it within its bounds. The [`Reaper`](crate::Reaper), a VMM's own event loop, or a simulation drives the pacer.
//!
//! | policy | rule |
//! |---|---|
//! | [`Adaptive`] | looks at the rings, and empties them only if one would be full before the next look |
//! | [`Fixed`] | empties all rings at a constant period: QEMU does so each second |
//! | [`RunLevels`] | six delays; a level up or down by how much a pass found |
//! | [`Aimd`] | halves its delay where a pass found much, lengthens it by 20 ms where little |

// May import: ground.

mod adaptive;
mod aimd;
pub(crate) mod alarm;
pub(crate) mod fading;
mod fixed;
mod pacer;
mod run_levels;

use core::time::Duration;

use crate::error;

pub use crate::error::PolicyError;
pub use adaptive::{Adaptive, Tuning};
pub use aimd::Aimd;
pub use fixed::Fixed;
pub use pacer::Pacer;
pub use run_levels::RunLevels;

/// The shortest delay that a policy may return.
pub const SHORTEST_LOOK: Duration = error::SHORTEST_LOOK;
/// The longest delay that a policy may return.
pub const LONGEST_LOOK: Duration = error::LONGEST_LOOK;

/// A policy: decides when which rings are emptied.
///
/// ```
/// use std::time::Duration;
/// use kvm_dirty_ring::pacing::{Observation, Pacer, Pacing, RingObservation};
///
/// /// Looks each millisecond, and empties a ring that is three quarters full.
/// struct ThreeQuarters;
///
/// impl Pacing for ThreeQuarters {
///     fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
///         for (ring, reap) in seen.rings.iter().zip(reap) {
///             *reap = ring.waiting * 4 >= ring.soft_limit * 3;
///         }
///         Duration::from_millis(1)
///     }
/// }
///
/// // It is tested without a clock, a thread or a guest.
/// let mut pacer = Pacer::new(ThreeQuarters);
/// let ring = |waiting| {
///     let mut ring = RingObservation::default();
///     (ring.soft_limit, ring.waiting) = (4032, waiting);
///     ring
/// };
/// pacer.look(Duration::ZERO, false, &mut [ring(100), ring(3024)])?;
/// assert_eq!(pacer.reap(), [false, true]);
/// assert_eq!(pacer.due(), Duration::from_millis(1));
/// # Ok::<(), kvm_dirty_ring::error::PolicyError>(())
/// ```
pub trait Pacing: Send {
    /// Chooses the rings to empty now, and returns the delay until the next look.
    ///
    /// `reap` has a place for each ring, all false: set those of the rings to empty. One reset serves all of them. The delay counts
    /// from the end of that pass. Keep it within [`SHORTEST_LOOK`] and [`LONGEST_LOOK`]; the [`Pacer`] clamps it. The policy is called
    /// early when a vCPU has stopped on a full ring.
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration;
}

impl<P: Pacing + ?Sized> Pacing for Box<P> {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        (**self).decide(seen, reap)
    }
}

/// The input of a policy.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Observation<'a> {
    /// Time since the observation before; zero at a policy's first.
    pub elapsed: Duration,
    /// How late the wake-up was: the time after the requested one. `None` if a full exit caused this look.
    pub lateness: Option<Duration>,
    /// The cost of the pass after the observation before; `None` if no ring was emptied.
    pub last_pass: Option<PassCost>,
    /// Every ring, in the order in which the vCPUs were attached.
    pub rings: &'a [RingObservation],
}

impl<'a> Observation<'a> {
    /// Creates an observation that comes in time, `elapsed` after the one before, with no pass in between.
    pub fn new(elapsed: Duration, rings: &'a [RingObservation]) -> Self {
        Self {
            elapsed,
            lateness: Some(Duration::ZERO),
            last_pass: None,
            rings,
        }
    }

    /// Returns the number of entries that wait in all rings together.
    pub fn waiting(&self) -> u64 {
        self.sum(|ring| ring.waiting)
    }

    /// Returns the number of exits for a full ring so far, of all vCPUs.
    pub fn full_exits(&self) -> u64 {
        self.sum(|ring| ring.full_exits)
    }

    fn sum(&self, count: impl Fn(&RingObservation) -> u64) -> u64 {
        let counts = self.rings.iter().map(count);
        counts.fold(0, u64::saturating_add)
    }
}

/// The cost of a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassCost {
    /// Time from the look that decided on it to its end: harvest, reset and publication.
    pub took: Duration,
    /// Entries that it found.
    pub entries: u64,
}

/// The state of one ring, as a policy sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct RingObservation {
    /// Size of the ring, in entries.
    pub entries: u64,
    /// Entries at which the vCPU stops: supposed, until a full exit has shown it.
    pub soft_limit: u64,
    /// Entries that wait in the ring to be harvested. The kernel also counts entries that are harvested and not yet reset; these
    /// remain for long only after a failed reset.
    pub waiting: u64,
    /// Entries harvested so far, by any thread.
    pub taken: u64,
    /// Exits for a full ring so far.
    pub full_exits: u64,
    /// Entries that the vCPU has logged since the observation before: the growth of the sum of `taken` and `waiting`. The
    /// [`Pacer`] fills it in.
    pub logged: u64,
    /// Entries per second that the vCPU has logged lately: a mean in which a sample that is one second old has half the weight. The
    /// [`Pacer`] fills it in.
    pub rate: f64,
}

/// The entries that a pass over all rings would find now, as a share of one ring's size. Policies that divide all rings'
/// entries by one ring's size use it.
fn found(seen: &Observation<'_>) -> f64 {
    let waiting = seen.waiting();
    let entries = seen.rings.iter().map(|ring| ring.entries).max();
    waiting as f64 / entries.unwrap_or(0).max(1) as f64
}
