// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Policies for the reaper: those of the crate, and some that nobody should use.

use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use kvm_dirty_ring::pacing::{Fixed, LONGEST_LOOK, Observation, Pacing, SHORTEST_LOOK};

use super::fault::{Counts, Fault};
use kvm_integration::random::SplitMix64;
use kvm_integration::reaping::policy::Policy;

/// Looks after which a failing policy fails.
const SOUND_LOOKS: u32 = 3;

/// Which policy.
#[derive(Debug, Clone, Copy)]
pub enum PolicyPlan {
    /// One of the crate's, at its defaults.
    Known(Policy),
    /// Empties all rings as often as it may.
    Busy,
    /// Empties all rings as seldom as it may.
    Lazy,
    /// Empties a ring or some at any time.
    Moody { seed: u64 },
    /// Looks often, and never empties a ring.
    Idle,
    /// Asks for times out of bounds, until it is replaced.
    Unbounded,
    /// Panics.
    Panicking,
}

impl PolicyPlan {
    pub fn draw(random: &mut SplitMix64) -> Self {
        let known = Policy::value_variants();
        match random.below(known.len() as u64 + 6) {
            0 => Self::Busy,
            1 => Self::Lazy,
            2 => Self::Moody {
                seed: random.next(),
            },
            3 => Self::Idle,
            4 => Self::Unbounded,
            5 => Self::Panicking,
            n => Self::Known(known[n as usize - 6]),
        }
    }

    pub fn make(self, counts: &Arc<Counts>) -> Box<dyn Pacing> {
        match self {
            Self::Known(policy) => policy.make(),
            Self::Busy => Box::new(Fixed::new(SHORTEST_LOOK)),
            Self::Lazy => Box::new(Fixed::new(LONGEST_LOOK)),
            Self::Moody { seed } => Box::new(Moody(SplitMix64(seed))),
            Self::Idle => Box::new(Idle),
            Self::Unbounded => Box::new(Unbounded(0, Arc::clone(counts))),
            Self::Panicking => Box::new(Panicking(0, Arc::clone(counts))),
        }
    }
}

struct Moody(SplitMix64);

impl Pacing for Moody {
    fn decide(&mut self, _: &Observation<'_>, reap: &mut [bool]) -> Duration {
        for reap in reap {
            *reap = self.0.below(2) == 0;
        }
        Duration::from_micros(100 + self.0.below(2000))
    }
}

struct Idle;

impl Pacing for Idle {
    fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
        SHORTEST_LOOK
    }
}

/// With the looks so far.
struct Unbounded(u32, Arc<Counts>);

impl Pacing for Unbounded {
    fn decide(&mut self, _: &Observation<'_>, reap: &mut [bool]) -> Duration {
        self.0 += 1;
        reap.fill(self.0 % 2 == 0);
        Duration::ZERO
    }
}

impl Drop for Unbounded {
    fn drop(&mut self) {
        // The reaper's patience ends after 64 looks.
        if self.0 >= 64 {
            self.1.add(Fault::PoliciesFailed);
        }
    }
}

/// With the looks so far.
struct Panicking(u32, Arc<Counts>);

impl Pacing for Panicking {
    fn decide(&mut self, _: &Observation<'_>, reap: &mut [bool]) -> Duration {
        self.0 += 1;
        if self.0 > SOUND_LOOKS {
            self.1.add(Fault::PoliciesFailed);
            // As `panic!`, without its message on stderr, and without memory: the pacer leaks payloads.
            std::panic::resume_unwind(Box::new(()));
        }
        reap.fill(true);
        Duration::from_micros(500)
    }
}
