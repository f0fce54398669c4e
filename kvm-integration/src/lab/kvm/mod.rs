//! The laboratory on real KVM.
//!
//! Each cell is one guest that runs all the time. The arms take turns: the rings are emptied, the
//! arm's reaper starts, has some time to settle, and is then watched.

mod error;
mod guest;
mod reaping;
mod sampler;
mod snapshot;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::DirtyPages;
use kvm_ioctls::Kvm;

pub use error::LabError;

use super::arm::Arm;
use super::cell::Cell;
use super::measure::{Measured, Sample};
use super::turn::Turn;
use crate::cores::Cores;
use crate::cpu_time::CpuTime;
use guest::Guest;
use reaping::Reaping;
use snapshot::Snapshot;

/// How often it is looked whether all is well.
const WATCH: Duration = Duration::from_millis(20);
/// How long a guest may take to touch all its pages; slower ones are measured as they are.
const LONGEST_TOUR: Duration = Duration::from_secs(20);

/// A cell whose guest runs.
#[derive(Debug)]
pub struct KvmCell<'a> {
    cell: Cell,
    guest: Guest,
    cores: Cores,
    tour: Duration,
    interrupted: &'a AtomicBool,
    dirty: DirtyPages,
}

/// What came of an arm's turn.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// From the end of the warm-up on.
    pub measured: Measured,
    /// From the arm's start on, if asked for.
    pub samples: Vec<Sample>,
    /// Times that a ring was found overrun, in all of the turn. With one, nothing measured counts.
    pub overruns: u64,
    /// Whether the reaper could not keep up in the end.
    pub saturated: bool,
}

impl<'a> KvmCell<'a> {
    /// Makes the guest, and lets it run until each vCPU has been to all its pages: the first store
    /// to a page costs more than the first one after a reset.
    ///
    /// # Errors
    /// KVM, the log or the kernel's memory management refused something, or `interrupted` was set.
    pub fn start(kvm: &Kvm, cell: Cell, interrupted: &'a AtomicBool) -> Result<Self, LabError> {
        let cores = Cores::detect().map_err(LabError::os("sched_getaffinity"))?;
        let guest = Guest::start(kvm, &cell, &cores)?;
        let mut this = Self {
            cell,
            guest,
            cores,
            tour: Duration::ZERO,
            interrupted,
            dirty: DirtyPages::new(),
        };
        let start = Instant::now();
        while !this.guest.has_been_everywhere() && start.elapsed() < LONGEST_TOUR {
            let watched = this.watch(WATCH);
            watched.map_err(|error| this.explained(error))?;
        }
        this.tour = start.elapsed();
        this.guest.calm();
        Ok(this)
    }

    /// The turn of `arm`, measured for `wanted` if that is enough under this load.
    pub fn turn(&self, arm: &Arm, wanted: Duration) -> Turn {
        Turn::new(&self.cell, arm, wanted, self.tour)
    }

    /// Gives `arm` its turn. `sampled` asks for samples, which cost the machine a little.
    ///
    /// # Errors
    /// A vCPU or the reaper failed, the reaper is refused, or `interrupted` was set.
    pub fn take_turn(&mut self, arm: &Arm, turn: Turn, sampled: bool) -> Result<Outcome, LabError> {
        self.guest.log.sync(&mut self.dirty)?;
        let overruns = self.guest.log.stats().overruns;
        let cpus = self.cores.of_reaper(self.cell.vcpus);
        let reaping = Reaping::start(arm, &self.guest.log, &self.guest.full_exits, cpus)?;
        let cpu = match reaping {
            Reaping::Nobody => None,
            _ => Some(CpuTime::named(reaping::NAME).ok_or(LabError::CpuTime)?),
        };
        let over = AtomicBool::new(false);
        let (watched, samples) = thread::scope(|scope| {
            let sampler =
                sampled.then(|| scope.spawn(|| sampler::sample(&self.guest, &reaping, &over)));
            let watched = self.watch_turn(turn, &reaping, cpu.as_ref());
            over.store(true, Ordering::Relaxed);
            let samples = sampler.map(|sampler| sampler.join().expect("a sampler does not panic"));
            (watched, samples)
        });
        let measured = watched.map_err(|error| self.explained(error))?;
        if let Some(source) = reaping.take_error() {
            let arm = arm.name;
            return Err(LabError::Reaper { arm, source });
        }
        if self.cell.pattern.running(self.cell.vcpus) > 0 && measured.stores == 0 {
            return Err(LabError::Stuck);
        }
        Ok(Outcome {
            measured,
            samples: samples.unwrap_or_default(),
            overruns: self.guest.log.stats().overruns - overruns,
            saturated: reaping.is_saturated(),
        })
    }

    fn watch_turn(
        &self,
        turn: Turn,
        reaping: &Reaping,
        cpu: Option<&CpuTime>,
    ) -> Result<Measured, LabError> {
        self.watch(turn.warm_up)?;
        let before = Snapshot::take(&self.guest, reaping, cpu)?;
        self.watch(turn.measure)?;
        let after = Snapshot::take(&self.guest, reaping, cpu)?;
        Ok(after.since(&before))
    }

    /// Waits, unless a vCPU ends or the caller wants no more.
    fn watch(&self, time: Duration) -> Result<(), LabError> {
        let end = Instant::now() + time;
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(LabError::Interrupted);
            }
            if self.guest.has_ended() {
                return Err(LabError::Ended);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(WATCH));
        }
    }

    fn explained(&mut self, error: LabError) -> LabError {
        match error {
            LabError::Ended => self.guest.why_ended(),
            error => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::pattern::Pattern;

    /// A small guest; `None`, and a line about it, where there is no KVM.
    fn start(interrupted: &AtomicBool) -> Option<KvmCell<'_>> {
        let kvm = crate::host::kvm_for_test("laboratory")?;
        let cell = Cell {
            pattern: Pattern::Constant,
            vcpus: 2,
            ring_entries: 512,
        };
        Some(KvmCell::start(&kvm, cell, interrupted).expect("a guest"))
    }

    fn take_turn(cell: &mut KvmCell<'_>, arm: &str) -> Result<Outcome, LabError> {
        let arm = Arm::named(arm).expect("an arm");
        let turn = Turn {
            warm_up: Duration::from_millis(100),
            measure: Duration::from_millis(500),
        };
        cell.take_turn(&arm, turn, true)
    }

    #[test]
    fn turns_follow_one_another() {
        let interrupted = AtomicBool::new(false);
        let Some(mut cell) = start(&interrupted) else {
            return;
        };
        for arm in ["poll", "qemu", "no-reaper", "poll"] {
            let outcome = take_turn(&mut cell, arm).expect("a turn");
            assert!(outcome.measured.entries > 0, "{arm}");
            assert_eq!(outcome.overruns, 0, "{arm}");
            let samples = &outcome.samples;
            assert!(samples.len() > 2, "{arm}");
            assert!(samples.iter().any(|sample| sample.fullest > 0.0), "{arm}");
            assert!(samples.iter().all(|sample| sample.fullest < 1.2), "{arm}");
        }
    }

    #[test]
    fn a_vcpu_that_fails_ends_the_turn() {
        let interrupted = AtomicBool::new(false);
        let Some(mut cell) = start(&interrupted) else {
            return;
        };
        cell.guest.sabotage().expect("the slot goes");
        let error = take_turn(&mut cell, "fixed").expect_err("a guest without memory");
        assert!(matches!(error, LabError::Vcpu(_)), "{error:?}");
    }

    #[test]
    fn an_interruption_ends_the_turn() {
        let interrupted = AtomicBool::new(false);
        let Some(mut cell) = start(&interrupted) else {
            return;
        };
        interrupted.store(true, Ordering::Relaxed);
        let error = take_turn(&mut cell, "fixed").expect_err("nobody wants more");
        assert!(matches!(error, LabError::Interrupted), "{error:?}");
    }
}
