//! The laboratory on real KVM.
//!
//! Each cell is one guest that runs all the time. The arms take turns: the rings are emptied, the
//! arm's reaper starts, has some time to settle, and is then watched.

mod cores;
mod cpu_time;
mod error;
mod full;
mod guest;
mod qemu;
mod reaping;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::{DirtyPages, Stats};
use kvm_ioctls::Kvm;

pub use error::LabError;

use super::arm::Arm;
use super::cell::Cell;
use super::measure::{Measured, Sample};
use cores::Cores;
use cpu_time::CpuTime;
use guest::Guest;
use reaping::{Counts, Reaping};

/// How often the watcher looks whether all is well.
const WATCH: Duration = Duration::from_millis(20);
/// How often a sampler looks at the rings.
const SAMPLE: Duration = Duration::from_millis(2);
/// How long a guest may take to touch all its pages; some workloads never would.
const LONGEST_TOUR: Duration = Duration::from_secs(10);

/// A cell whose guest runs.
#[derive(Debug)]
pub struct KvmCell<'a> {
    cell: Cell,
    guest: Guest,
    cores: Cores,
    interrupted: &'a AtomicBool,
    dirty: DirtyPages,
}

/// How long an arm's turn takes.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// To settle.
    pub warm_up: Duration,
    /// To be watched.
    pub measure: Duration,
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
}

/// All counters at one moment.
struct Snapshot {
    at: Instant,
    stats: Stats,
    full_exits: u64,
    stall: Duration,
    stores: u64,
    reaper: Counts,
    cpu: Duration,
}

impl<'a> KvmCell<'a> {
    /// Makes the guest, and lets it run until each vCPU has been to all its pages: the first store
    /// to a page costs more than the first after a reset.
    ///
    /// # Errors
    /// KVM, the log or the kernel's memory management refused something, or `interrupted` was set.
    pub fn start(kvm: &Kvm, cell: Cell, interrupted: &'a AtomicBool) -> Result<Self, LabError> {
        let cores = Cores::detect().map_err(|source| LabError::Os {
            call: "sched_getaffinity",
            source,
        })?;
        let guest = Guest::start(kvm, &cell, &cores)?;
        let mut this = Self {
            cell,
            guest,
            cores,
            interrupted,
            dirty: DirtyPages::new(),
        };
        let start = Instant::now();
        while !this.guest.has_been_everywhere() && start.elapsed() < LONGEST_TOUR {
            this.watch(WATCH)?;
        }
        this.guest.calm();
        Ok(this)
    }

    /// How long an arm's turn is to take, if `measure` will do.
    pub fn turn(&self, measure: Duration) -> Turn {
        let Cell {
            pattern,
            vcpus,
            ring_entries,
        } = self.cell;
        Turn {
            warm_up: pattern.warm_up(vcpus, ring_entries, self.cores.count()),
            measure: measure.max(pattern.shortest(ring_entries)),
        }
    }

    /// Gives `arm` its turn. `sampled` asks for samples, which cost the machine a little.
    ///
    /// # Errors
    /// A vCPU or the reaper failed, the reaper is refused, or `interrupted` was set.
    pub fn take_turn(&mut self, arm: &Arm, turn: Turn, sampled: bool) -> Result<Outcome, LabError> {
        self.guest.log.sync(&mut self.dirty)?;
        let overruns = self.guest.log.stats().overruns;
        let cpus = self.cores.of_reaper(self.cell.vcpus).to_vec();
        let full_exits = Arc::clone(&self.guest.full_exits);
        let reaping = Reaping::start(arm, &self.guest.log, &full_exits, &cpus)?;
        let cpu = match reaping {
            Reaping::Nobody => None,
            _ => Some(CpuTime::named(reaping::NAME).ok_or(LabError::CpuTime)?),
        };
        let mut samples = Vec::new();
        let over = AtomicBool::new(false);
        let (before, after) = thread::scope(|scope| {
            let log = self.guest.log.clone();
            if sampled {
                let (samples, reaping, over) = (&mut samples, &reaping, &over);
                let full_exits = &full_exits;
                scope.spawn(move || sample(samples, &log, full_exits, reaping, over));
            }
            let watched: Result<_, LabError> = (|| {
                self.watch(turn.warm_up)?;
                let before = self.snapshot(&reaping, cpu.as_ref())?;
                self.watch(turn.measure)?;
                let after = self.snapshot(&reaping, cpu.as_ref())?;
                Ok((before, after))
            })();
            over.store(true, Ordering::Relaxed);
            watched
        })?;
        if let Some(source) = reaping.take_error() {
            let arm = arm.name;
            return Err(LabError::Reaper { arm, source });
        }
        Ok(Outcome {
            measured: measured(&before, &after),
            samples,
            overruns: after.stats.overruns - overruns,
        })
    }

    /// Waits, unless a vCPU ends or the caller wants no more.
    fn watch(&mut self, time: Duration) -> Result<(), LabError> {
        let end = Instant::now() + time;
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(LabError::Interrupted);
            }
            self.guest.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(WATCH));
        }
    }

    fn snapshot(&self, reaping: &Reaping, cpu: Option<&CpuTime>) -> Result<Snapshot, LabError> {
        let cpu = match cpu {
            Some(cpu) => cpu.read().ok_or(LabError::CpuTime)?,
            None => Duration::ZERO,
        };
        let (full_exits, stall) = self.guest.full_exits.counts();
        Ok(Snapshot {
            at: Instant::now(),
            stats: self.guest.log.stats(),
            full_exits,
            stall,
            stores: self.guest.stores(),
            reaper: reaping.counts(),
            cpu,
        })
    }
}

fn measured(before: &Snapshot, after: &Snapshot) -> Measured {
    let rings = after.stats.vcpus.iter().zip(&before.stats.vcpus);
    let fills = rings.map(|(after, before)| {
        (after.entries - before.entries) as f64 / (after.soft_limit.max(1)) as f64
    });
    Measured {
        time: after.at - before.at,
        full_exits: after.full_exits - before.full_exits,
        stall: after.stall - before.stall,
        passes: after.stats.passes - before.stats.passes,
        minimum: fills.fold(0.0, f64::max),
        entries: after.stats.entries - before.stats.entries,
        stores: after.stores - before.stores,
        reaper_cpu: after.cpu - before.cpu,
        pass_time: Duration::from_nanos(after.reaper.pass_ns - before.reaper.pass_ns),
        wakeups: after.reaper.wakeups - before.reaper.wakeups,
        reaper_passes: after.reaper.passes - before.reaper.passes,
    }
}

fn sample(
    samples: &mut Vec<Sample>,
    log: &kvm_dirty_ring::DirtyLog,
    full_exits: &full::FullExits,
    reaping: &Reaping,
    over: &AtomicBool,
) {
    let start = Instant::now();
    let (before, _) = full_exits.counts();
    let mut rings = Vec::new();
    while !over.load(Ordering::Relaxed) {
        log.observe(&mut rings);
        let fill = |ring: &kvm_dirty_ring::pacing::RingObservation| {
            ring.waiting as f64 / ring.soft_limit.max(1) as f64
        };
        samples.push(Sample {
            at: start.elapsed().as_secs_f64(),
            fullest: rings.iter().map(fill).fold(0.0, f64::max),
            delay: Duration::from_nanos(reaping.counts().delay_ns).as_secs_f64(),
            full_exits: full_exits.counts().0 - before,
        });
        thread::sleep(SAMPLE);
    }
}
