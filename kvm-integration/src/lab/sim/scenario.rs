// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is simulated.

use std::time::Duration;

use kvm_dirty_ring::pacing::SHORTEST_LOOK;

use super::clock::seconds;
use super::costs::{Costs, Guest};
use super::lateness::Lateness;
use super::load::Load;

/// Entries that a kernel keeps in reserve.
const RESERVED: u64 = 64;

/// A VM, what its guest does, and what the host is like.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// vCPUs, 1 to [`MOST_VCPUS`](super::MOST_VCPUS).
    pub vcpus: usize,
    /// Size of each ring, in entries.
    pub ring_entries: u64,
    /// Entries at which a vCPU stops.
    pub soft_limit: u64,
    /// Entries at which it is supposed to, until a full exit shows it.
    pub known_soft_limit: u64,
    /// What the vCPUs do.
    pub load: Load,
    /// How fast they can.
    pub guest: Guest,
    /// How much the vCPUs' speeds and rates differ from the average, at most: a share of it, less
    /// than 1. Without any, all vCPUs also begin at the same moment.
    pub jitter: f64,
    /// Where the random numbers begin.
    pub seed: u64,
    /// How long nothing is measured at first.
    pub warm_up: Duration,
    /// How long it is measured then.
    pub time: Duration,
    /// What things take.
    pub costs: Costs,
    /// How late the reaper wakes up, if it isn't a `SCHED_FIFO` thread.
    pub lateness: Lateness,
    /// Time between two samples of the rings, if there are to be any.
    pub sample_every: Option<Duration>,
}

impl Scenario {
    /// So many vCPUs with rings of 4,096 entries, which do that natively, watched for 10 s after 2.
    pub fn new(vcpus: usize, load: Load) -> Self {
        Self {
            vcpus,
            load,
            ring_entries: 0,
            soft_limit: 0,
            known_soft_limit: 0,
            guest: Guest::NATIVE,
            jitter: 0.05,
            seed: 1,
            warm_up: Duration::from_secs(2),
            time: Duration::from_secs(10),
            costs: Costs::MEASURED,
            lateness: Lateness::IDLE_CORE,
            sample_every: None,
        }
        .with_rings(4096)
    }

    /// The same with rings of that size, which stop their vCPU 64 entries before they are full, and
    /// are known to.
    pub fn with_rings(self, entries: u64) -> Self {
        let soft_limit = entries.saturating_sub(RESERVED).max(1);
        Self {
            ring_entries: entries,
            soft_limit,
            known_soft_limit: soft_limit,
            ..self
        }
    }

    /// [`jitter`](Self::jitter) as it can be.
    pub(super) fn spread(&self) -> f64 {
        self.jitter.clamp(0.0, 0.99)
    }

    /// The highest rate at which any vCPU logs, in entries per second.
    pub fn peak(&self) -> f64 {
        let most = 1.0 + self.spread();
        let fastest = self.guest.fastest() / (1.0 - self.spread());
        (self.load.peak() * most).min(fastest)
    }

    /// Time in which a ring fills at that rate, in seconds; endless if nothing is logged.
    pub fn shortest_fill(&self) -> f64 {
        self.soft_limit as f64 / self.peak()
    }

    /// How well the rings can hold the load at all, whatever the policy: the time in which a ring
    /// fills at the highest rate there is, divided by what a policy has to reckon with in that time:
    /// the latest wake-up, a look, a pass that finds full every ring that is written to, and the
    /// shortest sleep.
    ///
    /// Below 1 full exits are no policy's fault.
    pub fn hold(&self) -> f64 {
        let rings = self.vcpus as u64;
        let busy = self.load.busy(self.vcpus) as u64;
        let costs = &self.costs;
        let look = costs.wake + costs.look * rings;
        let pass = costs.pass(rings, busy, self.soft_limit * busy);
        let host = seconds(look + pass) + (self.lateness.most + SHORTEST_LOOK).as_secs_f64();
        self.shortest_fill() / host
    }
}
