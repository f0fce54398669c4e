// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is measured of migrations, and how several of one kind are summed up.
//!
//! A GB is 2³⁰ bytes, as it was to the guestperf of QEMU's.

use serde::Serialize;

use super::cell::Cell;

/// What came of one cell: a guest, and a ring size.
#[derive(Debug, Clone)]
pub struct CellResult {
    /// The guest.
    pub cell: Cell,
    /// The share of the machine's CPU time that other programs took meanwhile; `None` if the kernel
    /// does not say.
    pub others: Option<f64>,
    /// The arms, in the order in which they are shown.
    pub arms: Vec<ArmResult>,
}

/// What came of one arm in a cell.
#[derive(Debug, Clone)]
pub struct ArmResult {
    /// Which.
    pub arm: &'static str,
    /// Its migrations, in order.
    pub migrations: Vec<Migration>,
}

/// One migration with the quiet phases around it.
#[derive(Debug, Clone, Serialize)]
pub struct Migration {
    /// Its figures.
    pub figures: Figures,
    /// Its rounds, the last one with the guest stopped.
    pub rounds: Vec<Round>,
    /// When what happened.
    pub phases: Phases,
    /// What the guest did in between, in order of time.
    pub samples: Vec<Sample>,
}

/// The figures of a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Milliseconds a vCPU takes for a GB in the quiet phase before: the median of the samples.
    pub quiet_ms_per_gb: f64,
    /// The same during the migration.
    pub median_ms_per_gb: f64,
    /// The longest that a vCPU took for a GB during the migration, in milliseconds. Of a vCPU that
    /// did not get through one, what it would have taken at its pace.
    pub worst_ms_per_gb: f64,
    /// Seconds of the migration in which a vCPU took, on average, more than twice as long for a GB as
    /// in the quiet phase before; the guest's being stopped in the end is not among them.
    pub drop_seconds: f64,
    /// The longest time between two pages of one vCPU during the migration, in milliseconds.
    pub longest_stall_ms: f64,
    /// Exits for a full ring.
    pub full_exits: u64,
    /// Time that vCPUs spent on them, in milliseconds, all together.
    pub full_exit_ms: f64,
    /// Reset ioctls; in bitmap mode `KVM_GET_DIRTY_LOG` ioctls.
    pub resets: u64,
    /// Ring entries harvested; in bitmap mode pages found dirty.
    pub entries: u64,
    /// Page stores per second of the guest during the migration, all vCPUs together.
    pub guest_pages_per_second: f64,
    /// CPU time of the reaper, in milliseconds.
    pub reaper_cpu_ms: f64,
    /// Pages sent, each as often as it was.
    pub pages_sent: u64,
    /// From the wish to stop the vCPUs until the last page was sent, in milliseconds.
    pub downtime_ms: f64,
    /// From the start of dirty logging until the last page was sent, in seconds.
    pub total_seconds: f64,
    /// Whether what was left could be sent within the downtime limit, before the rounds ran out.
    pub converged: bool,
    /// Pages that differ in the end.
    pub missed_pages: u64,
}

/// One round of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Whether the guest was running.
    pub running: bool,
    /// When it began, in seconds on the clock of [`Phases`].
    pub begin: f64,
    /// How long it took, in seconds, sync and sending.
    pub seconds: f64,
}

/// When what happened, in seconds since the first quiet phase began.
///
/// After the last page was sent both sides are compared, with the guest still stopped. The clock
/// stands still for that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Phases {
    /// The first quiet phase ends, dirty logging begins.
    pub begin: f64,
    /// The vCPUs are to stop.
    pub stop: f64,
    /// The last page was sent: the vCPUs run on, without dirty logging, in the second quiet phase.
    pub resume: f64,
    /// The second quiet phase ends.
    pub end: f64,
}

/// The guest over the time since the sample before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds on the clock of [`Phases`].
    pub at: f64,
    /// Milliseconds a vCPU took for a GB, the mean of all vCPUs; `None` if none did anything.
    pub ms_per_gb: Option<f64>,
    /// Exits for a full ring since the migration began.
    pub full_exits: u64,
    /// How long the policy has the reaper sleep just now, in milliseconds; `None` without a reaper.
    pub delay_ms: Option<f64>,
}

/// What several migrations have in common: the one in the middle, and the extremes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Figures {
    /// How many entries a reset was for, on average.
    pub fn entries_per_reset(&self) -> f64 {
        self.entries as f64 / self.resets.max(1) as f64
    }
}

impl ArmResult {
    /// Whether every migration converged.
    pub fn always_converged(&self) -> bool {
        self.migrations.iter().all(|one| one.figures.converged)
    }

    /// One figure of all migrations; `None` if there is none.
    pub fn spread(&self, figure: impl Fn(&Figures) -> f64) -> Option<Spread> {
        let figures = self.migrations.iter().map(|one| figure(&one.figures));
        Spread::of(figures.collect())
    }

    /// The migration to show: the one whose drop is the median.
    pub fn typical(&self) -> Option<&Migration> {
        let mut sorted: Vec<&Migration> = self.migrations.iter().collect();
        sorted.sort_by(|a, b| a.figures.drop_seconds.total_cmp(&b.figures.drop_seconds));
        sorted.get(sorted.len().checked_sub(1)? / 2).copied()
    }

    /// Pages missed by any migration.
    pub fn missed_pages(&self) -> u64 {
        self.migrations
            .iter()
            .map(|one| one.figures.missed_pages)
            .sum()
    }
}

impl Spread {
    /// Of these numbers; `None` if there are none.
    pub fn of(mut numbers: Vec<f64>) -> Option<Self> {
        numbers.sort_by(f64::total_cmp);
        let (&least, &most) = (numbers.first()?, numbers.last()?);
        let (low, high) = (numbers[(numbers.len() - 1) / 2], numbers[numbers.len() / 2]);
        let median = (low + high) / 2.0;
        Some(Self {
            median,
            least,
            most,
        })
    }
}
