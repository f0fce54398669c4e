//! All counters at one moment.

use std::time::{Duration, Instant};

use kvm_dirty_ring::Stats;

use super::error::LabError;
use super::guest::Guest;
use super::reaping::Reaping;
use crate::cpu_time::CpuTime;
use crate::lab::measure::Measured;
use crate::shape::qemu::Counts;

pub(super) struct Snapshot {
    at: Instant,
    stats: Stats,
    full_exits: u64,
    stall: Duration,
    stores: u64,
    vcpu_cpu: Duration,
    reaper: Counts,
    cpu: Duration,
}

impl Snapshot {
    /// `cpu` is the reaper's; `None` where there is no reaper.
    pub(super) fn take(
        guest: &Guest,
        reaping: &Reaping,
        cpu: Option<&CpuTime>,
    ) -> Result<Self, LabError> {
        let cpu = match cpu {
            Some(cpu) => cpu.read().ok_or(LabError::CpuTime)?,
            None => Duration::ZERO,
        };
        let (full_exits, stall) = guest.full_exits.counts();
        Ok(Self {
            at: Instant::now(),
            stats: guest.log.stats(),
            full_exits,
            stall,
            stores: guest.stores(),
            vcpu_cpu: guest.cpu()?,
            reaper: reaping.counts(),
            cpu,
        })
    }

    /// What has happened since an earlier one.
    pub(super) fn since(&self, before: &Self) -> Measured {
        let rings = self.stats.vcpus.iter().zip(&before.stats.vcpus);
        let fills = rings.map(|(now, before)| {
            (now.entries - before.entries) as f64 / now.soft_limit.max(1) as f64
        });
        Measured {
            time: self.at - before.at,
            full_exits: self.full_exits - before.full_exits,
            stall: self.stall - before.stall,
            passes: self.stats.passes - before.stats.passes,
            minimum: fills.fold(0.0, f64::max),
            entries: self.stats.entries - before.stats.entries,
            stores: self.stores - before.stores,
            vcpu_cpu: self.vcpu_cpu - before.vcpu_cpu,
            reaper_cpu: self.cpu - before.cpu,
            pass_time: Duration::from_nanos(self.reaper.pass_ns - before.reaper.pass_ns),
            wakeups: self.reaper.wakeups - before.reaper.wakeups,
            reaper_passes: self.reaper.passes - before.reaper.passes,
        }
    }
}
