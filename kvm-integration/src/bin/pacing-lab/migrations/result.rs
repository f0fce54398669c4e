// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of a run.

#[cfg(tiny_guest)]
use kvm_integration::lab::migrations::kvm::LastSync;
use kvm_integration::lab::migrations::{Figures, Load};

/// What came of the migrations of a guest.
#[derive(Debug)]
pub struct GuestResult {
    /// What it writes.
    pub load: Load,
    /// In the order of [`Arm::ALL`](kvm_integration::lab::migrations::Arm::ALL).
    pub arms: Vec<Figures>,
}

/// All that is known in the end.
#[derive(Debug, Default)]
pub struct Results {
    /// Of each guest.
    pub guests: Vec<GuestResult>,
    /// On real KVM, unless the run was a quick one.
    pub last_sync: Option<LastSync>,
    /// The share of the machine that others took.
    pub others: Option<f64>,
}

#[cfg(not(tiny_guest))]
type LastSync = std::convert::Infallible;

impl GuestResult {
    /// Of all arms together.
    pub fn missed_pages(&self) -> u64 {
        self.arms.iter().map(|figures| figures.missed_pages).sum()
    }
}

impl Results {
    /// Of all guests together.
    pub fn missed_pages(&self) -> u64 {
        self.guests.iter().map(GuestResult::missed_pages).sum()
    }
}
