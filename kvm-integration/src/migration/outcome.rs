// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of a migration, and what became of it.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use kvm_dirty_ring::SlotId;

use super::places::Places;
use crate::guest::memory::PAGE_SIZE;

/// How far to go, and how fast.
#[derive(Debug, Clone)]
pub struct Limits {
    /// MiB a second that the link takes; 0: as many as there are.
    pub bandwidth_mib: u64,
    /// Rounds while the guest runs, round 0 among them, at the most. At least one is made.
    pub max_rounds: u32,
    /// The guest stops as soon as what is to be sent then takes the link no longer than this. What
    /// is written between that sync and the stop comes on top.
    pub downtime: Duration,
    /// Where the guest would not get there, its vCPUs are limited, until it does; else the rounds
    /// end then.
    pub converge: bool,
    /// Pages that stay open until the last round, whatever they are.
    pub places: Places,
    /// The link breaks once, after so many pages of the first round after round 0 that has more, while the
    /// guest runs. The last 64 of them do not arrive.
    pub break_after: Option<u64>,
}

/// Watches a migration.
pub trait Observer {
    /// A round begins: `pages` are to be sent, with the guest running or stopped.
    fn begin(&mut self, round: usize, pages: u64, running: bool) {
        let _ = (round, pages, running);
    }

    /// Pages were sent.
    fn sent(&mut self, pages: u64) {
        let _ = pages;
    }

    /// The vCPUs will now be stopped.
    fn stop(&mut self) {}
}

/// Watches nothing.
impl Observer for () {}

/// One round, after it.
#[derive(Debug, Clone)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Pages that were to be sent, too, when the link broke.
    pub cut_off: u64,
    /// Pages that stayed open, and were not sent.
    pub members: u64,
    /// Whether the guest was running.
    pub running: bool,
    /// When its sync began, after the migration's start.
    pub begin: Duration,
    /// From the sync before to this round's: when these pages were written. `None` for round 0,
    /// which sends pages written or not.
    pub written_in: Option<Duration>,
    /// How long this round's sync took.
    pub sync: Duration,
    /// How long sending took.
    pub send: Duration,
    /// Pages per second that each vCPU was allowed to dirty when these pages were sent.
    pub limit: Option<NonZeroU64>,
}

impl Round {
    /// Pages per second that the guest has dirtied, as far as that was logged: what stayed open shows in
    /// the last round alone.
    pub fn dirty_rate(&self) -> Option<f64> {
        let dirty = self.pages + self.cut_off;
        Some(dirty as f64 / self.written_in?.as_secs_f64())
    }

    /// MiB sent.
    pub fn mib(&self) -> f64 {
        mib(self.pages)
    }

    /// MiB sent per second; `None` where there was nothing to measure.
    pub fn mib_per_second(&self) -> Option<f64> {
        (self.pages > 0).then(|| self.mib() / self.send.as_secs_f64())
    }
}

/// What `pages` pages are in MiB.
pub fn mib(pages: u64) -> f64 {
    (pages * PAGE_SIZE) as f64 / f64::from(1 << 20)
}

/// What became of a migration.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// All rounds; the last one with the guest stopped.
    pub rounds: Vec<Round>,
    /// When the first sync began.
    pub start: Instant,
    /// How often the guest was stopped to protect pages anew that might not have been protected.
    pub rearms: u32,
    /// How often all that had stayed open was closed.
    pub refreshes: u32,
    /// For how long the guest was stopped for that.
    pub refreshing: Duration,
    /// Whether what was left fitted into the downtime allowed, before the rounds ran out.
    pub converged: bool,
    /// If the guest would not have got there as it wrote: pages a second of all of it that would
    /// have done, when that was seen for the first time.
    pub hopeless: Option<NonZeroU64>,
    /// From the wish to stop the vCPUs until all of them were out of the guest.
    pub stopping: Duration,
    /// From the wish to stop the vCPUs until the last page was sent.
    pub downtime: Duration,
    /// From the first sync until the last page was sent.
    pub total: Duration,
    /// Pages of the guest.
    pub pages_total: u64,
    /// Page stores of the guest meanwhile.
    pub stores: u64,
    /// Pages that differ in at least one byte, in the end.
    pub mismatched_pages: u64,
    /// The first of them.
    pub first_mismatch: Option<(SlotId, u64)>,
}

impl Outcome {
    /// Pages sent, each as often as it was.
    pub fn pages_sent(&self) -> u64 {
        self.rounds.iter().map(|round| round.pages).sum()
    }

    /// The round in which the link broke, if it did.
    pub fn broken_round(&self) -> Option<usize> {
        self.rounds.iter().position(|round| round.cut_off > 0)
    }

    /// How long the guest was running during the migration.
    pub fn running(&self) -> Duration {
        self.total.saturating_sub(self.downtime)
    }
}
