// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use std::num::NonZeroU64;

use clap::Parser;
use kvm_dirty_ring::RingEntries;
use kvm_integration::Policy;
use kvm_integration::cli::options::ring_entries;
use kvm_integration::cli::output::Teller;
use kvm_integration::guest::stamp::MAX_VCPUS;
use kvm_integration::guest::workload::Workload;
use kvm_integration::machine::Setup;

/// Holds a guest on KVM, which would write as fast as it can, to dirty limits, one after the other,
/// and counts what it does: by its own count of pages that it wrote, by the pages that syncs
/// report, and by what its vCPUs' rings have logged.
///
/// The guest walks through its memory, so that each page it writes is protected again by then. Exit
/// status: 0 if each limit held within the tolerance, 1 if not, 2 if it could not be tried, 130 if
/// interrupted.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// Pages per second that each vCPU may dirty, 1 to 1000000; may be repeated [default: 1000,
    /// 5000 and 20000, after a guest without limit]
    #[arg(long, value_name = "PAGES",
          value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub limit: Vec<u64>,

    /// Seconds for which each is measured, 1 to 3600
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,

    /// vCPUs of the guest, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: u32,

    /// Memory of the guest in MiB, 16 to 16384
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u64).range(16..=16_384))]
    pub memory_mib: u64,

    /// Entries of each vCPU's dirty ring, a power of two from 256 to 65536, or as the host allows
    #[arg(long, value_name = "N", default_value = "4096", value_parser = ring_entries)]
    pub ring_entries: RingEntries,

    /// When the reaper empties the rings
    #[arg(long, value_enum, default_value_t = Policy::Adaptive)]
    pub pacing: Policy,

    /// No thread enforces the limits, and rings are emptied only by syncs, each second, and by vCPUs
    /// whose ring is full: where these alone stop for their limits
    #[arg(long, conflicts_with = "pacing")]
    pub at_full_rings: bool,

    /// The limiter's thread is a real-time one (SCHED_FIFO): for machines with much else to do
    #[arg(long, conflicts_with = "at_full_rings")]
    pub fifo: bool,

    /// How far the guest may be from the limit, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub tolerance: u64,

    #[command(flatten)]
    pub teller: Teller,
}

impl Options {
    /// The limits to be tried, in order; `None` for a guest without one.
    pub fn limits(&self) -> Vec<Option<NonZeroU64>> {
        match &self.limit[..] {
            [] => [0, 1000, 5000, 20_000].map(NonZeroU64::new).into(),
            limits => limits.iter().map(|&limit| NonZeroU64::new(limit)).collect(),
        }
    }

    /// The guest.
    pub fn setup(&self) -> Setup {
        Setup {
            vcpus: self.vcpus,
            ring_entries: self.ring_entries,
            pages: self.memory_mib * 256,
            workload: Workload::Walk,
            seed: 1,
            write_rate: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_asked_for() {
        let limits = |args: &[&str]| Options::try_parse_from(args).unwrap().limits();
        let without = NonZeroU64::new(0);
        assert_eq!(limits(&["dirty-limit"])[0], without);
        assert_eq!(
            limits(&["dirty-limit", "--limit", "7", "--limit", "9"]),
            [NonZeroU64::new(7), NonZeroU64::new(9)]
        );
        for bad in ["0", "-1", "many", "1000001"] {
            assert!(Options::try_parse_from(["dirty-limit", "--limit", bad]).is_err());
        }
    }
}
