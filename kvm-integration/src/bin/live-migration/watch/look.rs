// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One look at the log and the migration.

use std::time::{Duration, Instant};

use kvm_dirty_ring::pacing::RingObservation;
use kvm_dirty_ring::{DirtyLog, Mode, Stats};

/// How far the migration is.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub round: usize,
    /// Pages of the round.
    pub pages: u64,
    /// Those of them that were sent.
    pub sent: u64,
    pub phase: Phase,
}

/// What the guest does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Phase {
    /// It runs.
    #[default]
    Running,
    /// Its vCPUs are being stopped.
    Stopping,
    /// It stands still.
    Stopped,
}

impl Phase {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "guest running",
            Self::Stopping => "stopping the guest",
            Self::Stopped => "guest stopped",
        }
    }
}

/// How things stood at one moment.
#[derive(Debug, Clone)]
pub struct Look {
    /// Since the beginning.
    pub elapsed: Duration,
    pub progress: Progress,
    pub mode: Mode,
    pub stats: Stats,
    /// As many as `stats.vcpus`.
    pub rings: Vec<Ring>,
}

/// What a look shows of one ring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ring {
    /// Entries a second that the vCPU has logged since the look before.
    pub rate: f64,
    /// Entries that wait, as a part of those at which the vCPU stops.
    pub fill: f64,
}

impl Look {
    /// Entries a second, of all vCPUs.
    pub fn rate(&self) -> f64 {
        self.rings.iter().map(|ring| ring.rate).sum()
    }

    /// How full the fullest ring is.
    pub fn fullest(&self) -> f64 {
        self.rings.iter().map(|ring| ring.fill).fold(0.0, f64::max)
    }

    /// Pages of the round that are yet to be sent.
    pub fn left(&self) -> u64 {
        self.progress.pages.saturating_sub(self.progress.sent)
    }
}

/// Looks, and remembers the look before.
pub struct Sampler {
    log: DirtyLog,
    start: Instant,
    before: Instant,
    /// Entries logged by then, ring by ring.
    logged: Vec<u64>,
    rings: Vec<RingObservation>,
}

impl Sampler {
    pub fn new(log: DirtyLog) -> Self {
        let now = Instant::now();
        let mut rings = Vec::new();
        log.observe(&mut rings);
        Self {
            log,
            start: now,
            before: now,
            logged: rings.iter().map(logged).collect(),
            rings,
        }
    }

    pub fn look(&mut self, progress: Progress) -> Look {
        let now = Instant::now();
        self.log.observe(&mut self.rings);
        let past = (now - self.before).as_secs_f64();
        // A vCPU that is new has logged nothing before.
        self.logged.resize(self.rings.len(), 0);
        let rings = self.rings.iter().zip(&mut self.logged);
        let rings = rings.map(|(ring, before)| Ring::new(ring, before, past));
        let rings = rings.collect();
        self.before = now;
        Look {
            elapsed: now - self.start,
            progress,
            mode: self.log.mode(),
            stats: self.log.stats(),
            rings,
        }
    }
}

impl Ring {
    /// `before` is what the look `past` seconds before has seen logged.
    fn new(ring: &RingObservation, before: &mut u64, past: f64) -> Self {
        let now = logged(ring);
        let more = now.saturating_sub(core::mem::replace(before, now)) as f64;
        Self {
            rate: if past > 0.0 { more / past } else { 0.0 },
            fill: ring.waiting as f64 / ring.soft_limit.max(1) as f64,
        }
    }
}

fn logged(ring: &RingObservation) -> u64 {
    ring.taken + ring.waiting
}

#[cfg(test)]
mod tests {
    use kvm_dirty_ring::SlotId;
    use kvm_dirty_ring::sim::{SimConfig, SimVm};

    use super::*;

    #[test]
    fn rates_and_fill_are_of_what_the_vcpu_logged_harvested_or_not() {
        let vm = SimVm::new(SimConfig::default());
        let (log, slot) = (vm.dirty_log(), SlotId::new(0, 0));
        log.add_slot(slot, 1000).unwrap();
        vm.create_slot(slot, 1000);
        let vcpu = vm.add_vcpu();
        let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        let mut sampler = Sampler::new(log.clone());
        let write = |pages: std::ops::Range<u64>| {
            pages.for_each(|page| vcpu.write(slot, page).unwrap());
        };
        write(0..100);
        log.reap().unwrap();
        write(100..150);
        let look = sampler.look(Progress::default());
        let limit = look.stats.vcpus[0].soft_limit as f64;
        assert_eq!(look.fullest(), 50.0 / limit);
        let entries = look.rate() * look.elapsed.as_secs_f64();
        assert!((entries - 150.0).abs() < 1e-6, "{entries} for 150 entries");
        let later = sampler.look(Progress::default());
        assert_eq!((later.rate(), later.fullest()), (0.0, look.fullest()));

        let mut seen = 5;
        let quick = Ring::new(&sampler.rings[0], &mut seen, 0.0);
        assert_eq!((quick.rate, seen), (0.0, 150));
    }

    #[test]
    fn what_is_left_is_never_less_than_nothing() {
        let vm = SimVm::new(SimConfig::default());
        let mut look = Sampler::new(vm.dirty_log()).look(Progress::default());
        assert_eq!((look.left(), look.fullest(), look.rate()), (0, 0.0, 0.0));
        (look.progress.pages, look.progress.sent) = (5, 7);
        assert_eq!(look.left(), 0);
    }
}
