// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest does.

use std::time::Duration;

use super::costs::Guest;
use super::recording::Recording;

/// What the guest's vCPUs do, as page stores per second that they want to make over time. What the
/// guest can't do, it doesn't: see [`Guest`].
#[derive(Debug, Clone, PartialEq)]
pub enum Load {
    /// Nothing.
    Idle,
    /// Stores to page after page, none of them twice before a long time has gone.
    Constant {
        /// Stores per second.
        rate: f64,
    },
    /// Now and then a chunk of stores, as fast as the guest can.
    Trickle {
        /// Stores per second on average.
        rate: f64,
        /// Stores in a chunk.
        chunk: u64,
    },
    /// Stores for a while, then none for a while.
    Bursts {
        /// Stores per second during a burst.
        rate: f64,
        /// How long one lasts.
        on: Duration,
        /// Time between two.
        off: Duration,
    },
    /// Faster and faster, then from the start again.
    Ramp {
        /// Stores per second at the start.
        from: f64,
        /// And at the end.
        to: f64,
        /// Time in between.
        over: Duration,
    },
    /// One vCPU stores, the others are idle.
    Skew {
        /// Stores per second of that one.
        rate: f64,
    },
    /// Each vCPU stores to the same pages in turn, as fast as it can, for ever.
    HotSet {
        /// How many pages of its own it has.
        pages: u64,
    },
    /// A rate that changes every 50 ms, by a factor of up to two either way.
    Walk {
        /// Stores per second at least.
        least: f64,
        /// And at most.
        most: f64,
    },
    /// What was recorded.
    Recorded(Recording),
}

impl Load {
    /// The names that [`named`](Self::named) knows.
    pub const NAMES: [&'static str; 9] = [
        "idle", "constant", "trickle", "bursts", "sliced", "ramp", "skew", "hot-set", "walk",
    ];

    /// The load of that name, as hard as `guest` can, for rings that stop their vCPU at
    /// `soft_limit` entries.
    pub fn named(name: &str, guest: &Guest, soft_limit: u64) -> Option<Self> {
        let rate = guest.fastest();
        let tenth = rate / 10.0;
        let ms = Duration::from_millis;
        Some(match name {
            "idle" => Self::Idle,
            "constant" => Self::Constant { rate },
            "trickle" => Self::Trickle {
                rate: 2_000.0,
                chunk: 128,
            },
            "bursts" => Self::Bursts {
                rate,
                on: ms(200),
                off: ms(200),
            },
            // Four vCPUs take turns on a core.
            "sliced" => Self::Bursts {
                rate,
                on: ms(4),
                off: ms(12),
            },
            "ramp" => Self::Ramp {
                from: tenth,
                to: rate,
                over: Duration::from_secs(5),
            },
            "skew" => Self::Skew { rate },
            "hot-set" => Self::HotSet {
                pages: soft_limit / 2,
            },
            "walk" => Self::Walk {
                least: tenth,
                most: rate,
            },
            _ => return None,
        })
    }

    /// Stores per second that a vCPU wants to make at most.
    pub fn peak(&self) -> f64 {
        match self {
            Self::Idle => 0.0,
            Self::Constant { rate } | Self::Bursts { rate, .. } | Self::Skew { rate } => *rate,
            Self::Ramp { from, to, .. } => from.max(*to),
            Self::Walk { most, .. } => *most,
            Self::Trickle { .. } | Self::HotSet { .. } => f64::INFINITY,
            Self::Recorded(recording) => recording.peak(),
        }
    }

    /// vCPUs of `vcpus` that ever store anything.
    pub fn busy(&self, vcpus: usize) -> usize {
        match self {
            Self::Idle => 0,
            Self::Skew { .. } => 1,
            Self::Recorded(recording) => recording.busy().min(vcpus),
            _ => vcpus,
        }
    }

    /// Pages that a vCPU stores to; endless for a load that comes to no page twice.
    pub(super) fn pages(&self) -> f64 {
        match self {
            Self::HotSet { pages } => *pages as f64,
            _ => f64::INFINITY,
        }
    }
}
