// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is compared: a policy, and who empties what at a full exit.

use std::time::Duration;

use kvm_dirty_ring::pacing::{Adaptive, Aimd, Fixed, Observation, Pacing, RunLevels};

use crate::reaping::Shape;

/// One way to keep rings from filling up.
#[derive(Debug, Clone, Copy)]
pub struct Arm {
    /// Its name, in tables and on the command line.
    pub name: &'static str,
    /// What a full exit does.
    pub shape: Shape,
    /// Whether the reaper is a `SCHED_FIFO` thread.
    pub fifo: bool,
    /// Makes the policy; `None` for no reaper at all.
    pub policy: Option<fn() -> Box<dyn Pacing>>,
    /// How long the policy takes, from its start, until it does what it will go on doing.
    pub settles: Duration,
}

/// What most policies take.
const SETTLES: Duration = Duration::from_millis(500);
/// A delay of 1 s that is shortened pass by pass, down to its shortest.
const SETTLES_BY_PASSES: Duration = Duration::from_secs(2);

impl Arm {
    /// Every arm.
    pub const ALL: [Self; 10] = [
        Self::new("adaptive", || Box::new(Adaptive::default())),
        Self {
            fifo: true,
            ..Self::new("adaptive-fifo", || Box::new(Adaptive::default()))
        },
        Self::new("fixed", || Box::new(Fixed::default())),
        Self::new("fixed-10ms", || {
            Box::new(Fixed::new(Duration::from_millis(10)))
        }),
        Self::new("run-levels", || Box::new(RunLevels::as_meant())).by_passes(),
        Self::new("run-levels-as-posted", || Box::new(RunLevels::as_posted())).by_passes(),
        Self::new("aimd", || Box::new(Aimd::default())).by_passes(),
        Self::new("poll", || Box::new(Poll)),
        Self {
            shape: Shape::AllRings,
            ..Self::new("qemu", || Box::new(Fixed::default()))
        },
        Self {
            policy: None,
            ..Self::new("no-reaper", || Box::new(Fixed::default()))
        },
    ];

    const fn new(name: &'static str, policy: fn() -> Box<dyn Pacing>) -> Self {
        Self {
            name,
            shape: Shape::OwnRing,
            fifo: false,
            policy: Some(policy),
            settles: SETTLES,
        }
    }

    const fn by_passes(self) -> Self {
        Self {
            settles: SETTLES_BY_PASSES,
            ..self
        }
    }

    /// The arm of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arm| arm.name == name)
    }
}

/// Looks every 2 ms and empties what is half full: the simplest rule that looks.
#[derive(Debug, Clone, Copy)]
struct Poll;

impl Pacing for Poll {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        for (ring, reap) in seen.rings.iter().zip(reap) {
            *reap = ring.waiting * 2 >= ring.soft_limit;
        }
        Duration::from_millis(2)
    }
}
