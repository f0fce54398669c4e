// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is measured of an arm under a load.

use std::iter::{Sum, repeat};
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Serialize, Serializer};

/// What one arm did under one load, from the end of the warm-up on; with the names of `--json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Measured {
    /// How long it was watched.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub time: Duration,
    /// Exits for a full ring, of all vCPUs.
    pub full_exits: u64,
    /// Time that vCPUs spent on them, summed up.
    #[serde(rename = "stall_ms", serialize_with = "ms")]
    pub stall: Duration,
    /// Passes: the reaper's and those of full exits.
    pub passes: u64,
    /// The fewest passes that could have done: entries ÷ soft limit of the ring for which that is
    /// most.
    #[serde(rename = "minimum_passes")]
    pub minimum: f64,
    /// Entries harvested, of all rings.
    pub entries: u64,
    /// Page stores of the guest, logged or not.
    pub stores: u64,
    /// CPU time of the vCPUs' threads, in the guest or not; zero if unknown.
    #[serde(rename = "vcpu_cpu_ms", serialize_with = "ms")]
    pub vcpu_cpu: Duration,
    /// CPU time of the reaper's thread.
    #[serde(rename = "reaper_cpu_ms", serialize_with = "ms")]
    pub reaper_cpu: Duration,
    /// How much of it went into passes.
    #[serde(rename = "pass_ms", serialize_with = "ms")]
    pub pass_time: Duration,
    /// The reaper's wake-ups.
    pub wakeups: u64,
    /// Its passes.
    pub reaper_passes: u64,
}

fn seconds<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64())
}

fn ms<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64() * 1e3)
}

/// The rings at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// Seconds since the arm's start.
    pub at: f64,
    /// Entries in the fullest ring, as a share of its soft limit.
    pub fullest: f64,
    /// Seconds for which the policy sleeps.
    pub delay: f64,
    /// Exits for a full ring since the arm's start.
    pub full_exits: u64,
}

/// All that was counted up to one moment.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// Without `minimum` and `stores`.
    pub(super) sums: Measured,
    pub(super) stores: f64,
    /// Entries of each ring, and its soft limit.
    pub(super) rings: Vec<(u64, u64)>,
}

impl Totals {
    /// What has come since `first`.
    pub(super) fn since(&self, first: &Self) -> Measured {
        let before = first.rings.iter().copied().chain(repeat((0, 0)));
        let fills = self.rings.iter().zip(before);
        let fills = fills.map(|(now, before)| (now.0 - before.0) as f64 / now.1.max(1) as f64);
        Measured {
            minimum: fills.fold(0.0, f64::max),
            stores: (self.stores - first.stores) as u64,
            ..self.sums.with(&first.sums, u64::sub, Duration::sub)
        }
    }
}

impl<'a> Sum<&'a Measured> for Measured {
    /// As if all of them were one watch.
    fn sum<I: Iterator<Item = &'a Measured>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            minimum: sum.minimum + one.minimum,
            ..sum.with(one, u64::add, Duration::add)
        })
    }
}

impl Measured {
    /// Each count and time together with the other's.
    fn with(
        &self,
        other: &Self,
        count: fn(u64, u64) -> u64,
        time: fn(Duration, Duration) -> Duration,
    ) -> Self {
        Self {
            time: time(self.time, other.time),
            full_exits: count(self.full_exits, other.full_exits),
            stall: time(self.stall, other.stall),
            passes: count(self.passes, other.passes),
            minimum: 0.0,
            entries: count(self.entries, other.entries),
            stores: count(self.stores, other.stores),
            vcpu_cpu: time(self.vcpu_cpu, other.vcpu_cpu),
            reaper_cpu: time(self.reaper_cpu, other.reaper_cpu),
            pass_time: time(self.pass_time, other.pass_time),
            wakeups: count(self.wakeups, other.wakeups),
            reaper_passes: count(self.reaper_passes, other.reaper_passes),
        }
    }

    fn per_second(&self, count: f64) -> f64 {
        count / self.time.as_secs_f64().max(1e-9)
    }

    /// Exits for a full ring a second.
    pub fn full_exits_per_second(&self) -> f64 {
        self.per_second(self.full_exits as f64)
    }

    /// Milliseconds of stall a second, of all vCPUs together.
    pub fn stall_ms_per_second(&self) -> f64 {
        self.per_second(self.stall.as_secs_f64() * 1e3)
    }

    /// Passes ÷ the fewest that could have done; `None` where next to nothing was logged.
    pub fn passes_by_minimum(&self) -> Option<f64> {
        (self.minimum >= 1.0).then(|| self.passes as f64 / self.minimum)
    }

    /// Entries per pass.
    pub fn entries_per_pass(&self) -> f64 {
        self.entries as f64 / (self.passes as f64).max(1.0)
    }

    /// Page stores of the guest a second.
    pub fn stores_per_second(&self) -> f64 {
        self.per_second(self.stores as f64)
    }

    /// Page stores of the guest a second of its vCPUs' CPU time, which others on the machine don't
    /// take from it; `None` if that is unknown, or no vCPU ran.
    pub fn stores_per_cpu_second(&self) -> Option<f64> {
        let seconds = self.vcpu_cpu.as_secs_f64();
        (seconds > 1e-3).then(|| self.stores as f64 / seconds)
    }

    /// The reaper's CPU time, in percent of a core.
    pub fn reaper_percent(&self) -> f64 {
        self.per_second(self.reaper_cpu.as_secs_f64() * 100.0)
    }

    /// The part of it that is no harvesting or resetting: waking, looking, deciding.
    pub fn overhead_percent(&self) -> f64 {
        let overhead = self.reaper_cpu.saturating_sub(self.pass_time);
        self.per_second(overhead.as_secs_f64() * 100.0)
    }

    /// The reaper's wake-ups a second.
    pub fn wakeups_per_second(&self) -> f64 {
        self.per_second(self.wakeups as f64)
    }

    /// The reaper's wake-ups per pass of its own; `None` where it made none.
    pub fn wakeups_per_pass(&self) -> Option<f64> {
        (self.reaper_passes > 0).then(|| self.wakeups as f64 / self.reaper_passes as f64)
    }
}
