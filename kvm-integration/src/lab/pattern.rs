// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest does.

use std::time::Duration;

use strum::VariantArray;

use super::rhythm::Rhythm;

/// Page stores a second of a vCPU that has little to do.
const TRICKLE: f64 = 2000.0;

/// What the vCPUs of a guest do.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    strum::Display,
    strum::EnumString,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[strum(serialize_all = "kebab-case", parse_err_ty = String, parse_err_fn = unknown)]
pub enum Pattern {
    /// Each vCPU walks pages of its own, as fast as it goes, and leaves the guest for nothing.
    Constant,
    /// The same at 2,000 pages a second.
    Trickle,
    /// Bursts of 0.2 s at full speed, all vCPUs at once.
    Bursts,
    /// From next to nothing to nearly full speed within seconds, over and over.
    Ramp,
    /// One vCPU as in `Constant`; the others idle.
    Skew,
    /// Each vCPU stores to the same pages over and over, which all fit into its ring.
    HotSet,
    /// No vCPU runs.
    Idle,
    /// As `Constant`, by a guest that `kvm_pvm` emulates: it logs ten times as fast.
    Fast,
    /// As `Bursts`, by such a guest.
    FastBursts,
}

fn unknown(name: &str) -> String {
    let names: Vec<&str> = Pattern::VARIANTS.iter().map(Into::into).collect();
    format!(
        "no workload is called `{name}`: choose one of {}",
        names.join(", ")
    )
}

impl Pattern {
    /// Whether the guest is of the kind that `kvm_pvm` emulates.
    pub fn is_emulated(self) -> bool {
        matches!(self, Self::Fast | Self::FastBursts)
    }

    /// How many of `vcpus` vCPUs run at all.
    pub fn running(self, vcpus: u32) -> u32 {
        match self {
            Self::Idle => 0,
            Self::Skew => vcpus.min(1),
            _ => vcpus,
        }
    }

    /// Pages that each vCPU has for itself.
    ///
    /// Of pages that were stored to and are not protected again, a ring holds an entry each. So a
    /// vCPU that walks more pages than its ring has entries finds every one protected, and logs
    /// each store.
    pub fn pages_per_vcpu(self, ring_entries: u32) -> u64 {
        match self {
            Self::HotSet => u64::from(ring_entries) / 2,
            _ => u64::from(ring_entries) * 4,
        }
    }

    /// When a vCPU stores.
    pub fn rhythm(self) -> Rhythm {
        match self {
            Self::Trickle => Rhythm::Steady(TRICKLE),
            Self::Bursts | Self::FastBursts => Rhythm::Bursts,
            Self::Ramp => Rhythm::Ramp,
            _ => Rhythm::Unlimited,
        }
    }

    /// Stores between two exits of the guest's own; 0 for none.
    pub fn chunk(self) -> u32 {
        match self {
            // An emulated guest without exits overruns its ring.
            Self::Fast | Self::FastBursts => 32,
            Self::Trickle | Self::Bursts | Self::Ramp => 128,
            _ => 0,
        }
    }

    /// How long it takes to show all that it does: nothing shorter is a measurement.
    pub fn period(self, ring_entries: u32) -> Duration {
        match self {
            // Two fills of the ring.
            Self::Trickle => Duration::from_secs_f64(2.2 * f64::from(ring_entries) / TRICKLE),
            Self::Bursts | Self::FastBursts => 4 * Rhythm::BURST_PERIOD,
            Self::Ramp => Rhythm::RAMP_PERIOD,
            // Three of the longest sleeps.
            Self::Idle => Duration::from_secs(3),
            _ => Duration::ZERO,
        }
    }

    /// How long it takes to show whatever a policy can't know of but must learn.
    pub fn lesson(self) -> Duration {
        match self {
            // The first edge.
            Self::Bursts | Self::FastBursts => 2 * Rhythm::BURST_PERIOD,
            // Sleeps that are doubled until they are as long as they get.
            Self::Idle => Duration::from_secs(2),
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_are_longer_than_rings_and_hot_sets_shorter() {
        for &pattern in Pattern::VARIANTS {
            let pages = pattern.pages_per_vcpu(1024);
            assert_eq!(pattern == Pattern::HotSet, pages < 1024, "{pattern}");
            assert_eq!(pages % u64::from(pattern.chunk().max(1)), 0, "{pattern}");
        }
    }

    #[test]
    fn whoever_is_held_back_leaves_the_guest_to_be() {
        for &pattern in Pattern::VARIANTS {
            if pattern.rhythm() != Rhythm::Unlimited || pattern.is_emulated() {
                assert_ne!(pattern.chunk(), 0, "{pattern}");
            }
        }
    }
}
