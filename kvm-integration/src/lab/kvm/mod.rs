// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The laboratory on real KVM.
//!
//! Each cell is one guest that runs all the time. The arms take turns: the rings are emptied, the
//! arm's reaper starts, has some time to settle, and is then watched.

mod guest;
mod sampler;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_dirty_ring::{DirtyPages, Priority};
use kvm_ioctls::Kvm;

use super::arm::Arm;
use super::cell::Cell;
use super::measure::{Measured, Sample, Totals};
use super::turn::Turn;
use crate::host::cores::Cores;
use crate::reaping::reaper::Reaping;
use guest::Guest;

/// Low among the real-time priorities, and before every thread that is none.
const FIFO: Priority = Priority::Fifo(10);

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
    pub fn start(kvm: &Kvm, cell: Cell, interrupted: &'a AtomicBool) -> Result<Self> {
        let cores = Cores::detect().context("sched_getaffinity failed")?;
        let mut guest = Guest::start(kvm, &cell, &cores)?;
        Ok(Self {
            tour: guest.tour(&cell, interrupted)?,
            cell,
            guest,
            cores,
            interrupted,
            dirty: DirtyPages::new(),
        })
    }

    /// The turn of `arm`, measured for `wanted` if that is enough under this load.
    pub fn turn(&self, arm: &Arm, wanted: Duration) -> Turn {
        Turn::new(&self.cell, arm, wanted, self.tour)
    }

    /// Gives `arm` its turn. `sampled` asks for samples, which cost the machine a little.
    ///
    /// # Errors
    /// A vCPU or the reaper failed, the reaper is refused (as the log's own `ReaperError` says), or
    /// `interrupted` was set.
    pub fn take_turn(&mut self, arm: &Arm, turn: Turn, sampled: bool) -> Result<Outcome> {
        let full_exits = Arc::clone(&self.guest.full_exits);
        let log = full_exits.log();
        let synced = log.sync(&mut self.dirty);
        synced.context("the rings could not be emptied")?;
        let overruns = log.stats().overruns;
        let cpus = self.cores.of_reaper(self.cell.vcpus);
        let priority = match arm.fifo {
            true => FIFO,
            false => Priority::Inherited,
        };
        let start =
            |policy: fn() -> _| Reaping::start(&full_exits, arm.shape, policy(), priority, cpus);
        let reaping = arm.policy.map(start).transpose()?;
        let over = AtomicBool::new(false);
        let sample = || sampler::sample(&full_exits, reaping.as_ref(), &over);
        let (measured, samples) = thread::scope(|scope| {
            let sampler = sampled.then(|| scope.spawn(sample));
            let measured = self.watch(turn, reaping.as_ref());
            over.store(true, Ordering::Relaxed);
            let samples = sampler.map(|sampler| sampler.join().expect("a sampler does not panic"));
            (measured, samples)
        });
        let measured = measured?;
        if let Some(error) = reaping.as_ref().and_then(Reaping::take_error) {
            bail!(
                anyhow::Error::new(error).context(format!("the reaper of arm {} failed", arm.name))
            );
        }
        let runs = self.cell.pattern.running(self.cell.vcpus) > 0;
        ensure!(
            !runs || measured.stores > 0,
            "the guest has stored nothing for all of an arm's turn"
        );
        Ok(Outcome {
            measured,
            samples: samples.unwrap_or_default(),
            overruns: log.stats().overruns - overruns,
            saturated: reaping.is_some_and(|reaping| reaping.is_saturated()),
        })
    }

    fn watch(&mut self, turn: Turn, reaping: Option<&Reaping>) -> Result<Measured> {
        let start = Instant::now();
        let mut totals_after = |time| {
            self.guest.vcpus.watch(time, self.interrupted)?;
            totals(&self.guest, reaping, start)
        };
        let before = totals_after(turn.warm_up)?;
        Ok(totals_after(turn.measure)?.since(&before))
    }
}

/// All counters now.
fn totals(guest: &Guest, reaping: Option<&Reaping>, start: Instant) -> Result<Totals> {
    let reaper_cpu = reaping.map_or(Ok(Duration::ZERO), Reaping::cpu)?;
    let reaper = reaping.map(Reaping::counts).unwrap_or_default();
    let (full_exits, stall) = guest.full_exits.counts();
    let stats = guest.full_exits.log().stats();
    let rings = stats.vcpus.iter();
    Ok(Totals {
        stores: guest.vcpus.stores() as f64,
        rings: rings.map(|ring| (ring.entries, ring.soft_limit)).collect(),
        sums: Measured {
            time: start.elapsed(),
            full_exits,
            stall,
            passes: stats.passes,
            entries: stats.entries,
            vcpu_cpu: guest.cpu()?,
            reaper_cpu,
            pass_time: Duration::from_nanos(reaper.pass_ns),
            wakeups: reaper.wakeups,
            reaper_passes: reaper.passes,
            ..Measured::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::MutexGuard;

    use super::*;
    use crate::cli::interrupt::Interrupted;
    use crate::guest::error::VcpuError;
    use crate::lab::pattern::Pattern;

    /// A small guest, and what keeps others away; `None`, and a line about it, where there is no KVM.
    fn start(interrupted: &AtomicBool) -> Option<(KvmCell<'_>, MutexGuard<'_, ()>)> {
        let (kvm, alone) = crate::host::kvm_for_test("laboratory")?;
        let cell = Cell {
            pattern: Pattern::Constant,
            vcpus: 2,
            ring_entries: 512,
        };
        Some((
            KvmCell::start(&kvm, cell, interrupted).expect("a guest"),
            alone,
        ))
    }

    fn take_turn(cell: &mut KvmCell<'_>, arm: &str) -> Result<Outcome> {
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
        let Some((mut cell, _alone)) = start(&interrupted) else {
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
        let Some((mut cell, _alone)) = start(&interrupted) else {
            return;
        };
        // Under its feet.
        cell.guest.vm.remove_slot(1).expect("the slot goes");
        let error = take_turn(&mut cell, "fixed").expect_err("a guest without memory");
        assert!(error.is::<VcpuError>(), "{error:?}");
    }

    #[test]
    fn an_interruption_ends_the_turn() {
        let interrupted = AtomicBool::new(false);
        let Some((mut cell, _alone)) = start(&interrupted) else {
            return;
        };
        interrupted.store(true, Ordering::Relaxed);
        let error = take_turn(&mut cell, "fixed").expect_err("nobody wants more");
        assert!(error.is::<Interrupted>(), "{error:?}");
    }
}
