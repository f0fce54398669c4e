// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pacing policies by name.

use clap::ValueEnum;
use kvm_dirty_ring::pacing::{Adaptive, Aimd, Fixed, Pacing, RunLevels};

/// A policy of the crate, at its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Policy {
    /// Looks at the rings, and empties them only if one would be full before the next look
    Adaptive,
    /// Empties all rings once a second, as QEMU does
    Fixed,
    /// Six delays, a level up or down after each pass
    RunLevels,
    /// The same with the slip that keeps the level from ever falling
    RunLevelsAsPosted,
    /// Half the delay after a rich pass, 20 ms more after a poor one
    Aimd,
}

impl Policy {
    /// A new one.
    pub fn make(self) -> Box<dyn Pacing> {
        match self {
            Self::Adaptive => Box::new(Adaptive::default()),
            Self::Fixed => Box::new(Fixed::default()),
            Self::RunLevels => Box::new(RunLevels::as_meant()),
            Self::RunLevelsAsPosted => Box::new(RunLevels::as_posted()),
            Self::Aimd => Box::new(Aimd::default()),
        }
    }
}
