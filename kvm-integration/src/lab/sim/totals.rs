//! Sums since the start, and what they make of the time after the warm-up.

use std::time::Duration;

use super::clock::Nanos;
use super::reaper::Reaper;
use super::scenario::Scenario;
use super::vcpu::Vcpu;
use crate::lab::Measured;

#[derive(Debug, Default)]
pub(super) struct Totals {
    at: Nanos,
    full_exits: u64,
    stall: Nanos,
    /// Passes of full exits.
    passes: u64,
    stores: f64,
    /// Entries harvested of each ring.
    taken: Vec<u64>,
    reaper_cpu: Nanos,
    pass_time: Nanos,
    wakeups: u64,
    reaper_passes: u64,
}

impl Totals {
    pub(super) fn of(at: Nanos, vcpus: &[Vcpu<'_>], reaper: Option<&Reaper>, passes: u64) -> Self {
        let of_reaper = |count: fn(&Reaper) -> u64| reaper.map_or(0, count);
        Self {
            at,
            full_exits: vcpus.iter().map(|vcpu| vcpu.full_exits).sum(),
            stall: vcpus.iter().map(Vcpu::stall).sum(),
            passes,
            stores: vcpus.iter().map(|vcpu| vcpu.stores).sum(),
            taken: vcpus.iter().map(|vcpu| vcpu.taken).collect(),
            reaper_cpu: of_reaper(|reaper| reaper.cpu),
            pass_time: of_reaper(|reaper| reaper.pass_time),
            wakeups: of_reaper(|reaper| reaper.wakeups),
            reaper_passes: of_reaper(|reaper| reaper.passes),
        }
    }

    /// What has come since `first`.
    pub(super) fn since(&self, first: &Self, scenario: &Scenario) -> Measured {
        let before = first.taken.iter().copied().chain(std::iter::repeat(0));
        let taken = self.taken.iter().zip(before);
        let taken: Vec<_> = taken.map(|(now, before)| now - before).collect();
        let most = taken.iter().copied().max().unwrap_or(0);
        let reaper_passes = self.reaper_passes - first.reaper_passes;
        let time = |now: Nanos, before: Nanos| Duration::from_nanos(now - before);
        Measured {
            time: time(self.at, first.at),
            full_exits: self.full_exits - first.full_exits,
            stall: time(self.stall, first.stall),
            passes: self.passes - first.passes + reaper_passes,
            minimum: most as f64 / scenario.soft_limit.max(1) as f64,
            entries: taken.iter().sum(),
            stores: (self.stores - first.stores) as u64,
            reaper_cpu: time(self.reaper_cpu, first.reaper_cpu),
            pass_time: time(self.pass_time, first.pass_time),
            wakeups: self.wakeups - first.wakeups,
            reaper_passes,
            // How much of the time a load leaves to others is not modelled.
            vcpu_cpu: Duration::ZERO,
        }
    }
}
