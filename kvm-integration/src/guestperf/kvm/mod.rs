//! Migrations of a guest on real KVM.
//!
//! A cell has two guests that share their memory and run in turns: one with dirty rings, and one
//! without, for KVM knows either rings or bitmaps. They go on from migration to migration; only
//! their logging starts and stops.

mod error;
mod guest;
mod sampler;
mod tracking;

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

pub use error::GuestperfError;

use super::analysis::{Felt, Reading, samples};
use super::arm::{Arm, Tracking};
use super::cell::Cell;
use super::result::{Figures, Migration, Phases, Round};
use crate::cores::{Cores, confine};
use crate::host::available_mib;
use crate::machine::Guest;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::migration::{Destination, Limits, Outcome, migrate};
use guest::StressedGuest;
use sampler::{Raw, Sampler};
use tracking::{ArmTracker, Delay};

/// How often it is looked whether all is well.
const WATCH: Duration = Duration::from_millis(20);
/// How long a guest may take to be through all its pages; a slower one is measured as it is.
const LONGEST_TOUR: Duration = Duration::from_secs(20);

/// A cell whose guests are ready.
#[derive(Debug)]
pub struct KvmCell<'a> {
    ringed: StressedGuest,
    plain: StressedGuest,
    destination: Destination,
    cores: Cores,
    interrupted: &'a AtomicBool,
}

impl<'a> KvmCell<'a> {
    /// Whether there is memory for such a guest and its copy.
    ///
    /// # Errors
    /// There is not.
    pub fn check_memory(cell: &Cell) -> Result<(), GuestperfError> {
        let wanted = 2 * cell.memory_mib;
        match available_mib().filter(|&available| available < wanted) {
            Some(available) => Err(GuestperfError::TooLarge { wanted, available }),
            None => Ok(()),
        }
    }

    /// Makes the guests.
    ///
    /// # Errors
    /// KVM, the log or the kernel's memory management refused something.
    pub fn new(
        kvm: &Kvm,
        cell: &Cell,
        interrupted: &'a AtomicBool,
    ) -> Result<Self, GuestperfError> {
        Self::check_memory(cell)?;
        let cores = Cores::detect().map_err(GuestperfError::os("sched_getaffinity"))?;
        // A fault of the host's own would look like a slow guest.
        let memory = Arc::new(GuestMemory::prefaulted(
            cell.memory_mib << 20 >> PAGE_SIZE.ilog2(),
        )?);
        // What is not stressed must be something, too, or nobody would see that it was not sent.
        for page in 0..memory.pages() {
            memory.write_u64(page * PAGE_SIZE, page + 1);
        }
        let guest = |with_rings| StressedGuest::new(kvm, cell, &memory, with_rings, &cores);
        let (ringed, plain) = (guest(true)?, guest(false)?);
        let destination = Destination::prefaulted(ringed.slots())?;
        Ok(Self {
            ringed,
            plain,
            destination,
            cores,
            interrupted,
        })
    }

    /// A quiet phase, a migration as `arm` tracks it, and a quiet phase again.
    ///
    /// # Errors
    /// A vCPU, the reaper or the migration failed, or `interrupted` was set.
    pub fn migrate(
        &mut self,
        arm: &Arm,
        quiet: Duration,
        limits: &Limits,
    ) -> Result<Migration, GuestperfError> {
        let guest = match arm.tracking {
            Tracking::Bitmap => &mut self.plain,
            Tracking::Rings(..) => &mut self.ringed,
        };
        let cpus = self.cores.of_reaper(guest.progress().len() as u32);
        let mut run = Run {
            guest,
            destination: &self.destination,
            cores: &self.cores,
            interrupted: self.interrupted,
            delay: Delay::default(),
        };
        let over = AtomicBool::new(false);
        run.guest.resume();
        let result = run.settle().and_then(|()| {
            run.destination.poison();
            let zero = Instant::now();
            let sampler = Sampler::new(run.guest, &run.delay);
            thread::scope(|scope| {
                scope.spawn(|| {
                    // Where it may not be, it is late, and knows by its clock.
                    let _ = confine(cpus);
                    sampler.run(&over)
                });
                let phases = scope.spawn(|| {
                    confine(cpus).map_err(GuestperfError::os("sched_setaffinity"))?;
                    run.phases(arm, quiet, limits, &sampler)
                });
                let done = phases.join();
                // Before a panic goes on: the scope waits for the sampler.
                over.store(true, Ordering::Relaxed);
                done.unwrap_or_else(|panic| resume_unwind(panic))
            })
            .map(|done| done.sum_up(zero, &sampler.into_readings()))
        });
        // Whatever happened: the other guest needs the memory.
        let paused = run.guest.pause();
        let migration = result?;
        paused?;
        migration.ok_or(GuestperfError::Unseen)
    }
}

/// A migration and what is around it.
struct Run<'a> {
    guest: &'a mut StressedGuest,
    destination: &'a Destination,
    cores: &'a Cores,
    interrupted: &'a AtomicBool,
    delay: Delay,
}

impl Run<'_> {
    /// Waits until each vCPU has been everywhere: what the last migration has protected is then
    /// writable again.
    fn settle(&mut self) -> Result<(), GuestperfError> {
        // The pass under way may have begun long ago.
        let enough = self.guest.passes() + 2;
        let start = Instant::now();
        while self.guest.passes() < enough && start.elapsed() < LONGEST_TOUR {
            self.watch(WATCH)?;
        }
        Ok(())
    }

    fn phases(
        &mut self,
        arm: &Arm,
        quiet: Duration,
        limits: &Limits,
        mut sampler: &Sampler,
    ) -> Result<Done, GuestperfError> {
        self.watch(quiet)?;
        let mut tracker = ArmTracker::start(arm, self.guest, self.cores, &self.delay)?;
        let before = Counts::read(self.guest);
        let begun = sampler.read();
        self.guest.set_logged(true)?;
        let outcome = migrate(
            self.guest,
            &mut tracker,
            self.destination,
            limits,
            self.interrupted,
            &mut sampler,
        )?;
        let mut counts = Counts::read(self.guest).since(before);
        counts.resets += tracker.bitmap.ioctls.load(Ordering::Relaxed);
        counts.entries += tracker.bitmap.pages.load(Ordering::Relaxed);
        self.guest.set_logged(false)?;
        self.delay.store(0, Ordering::Relaxed);
        let resumed = Instant::now();
        self.guest.resume();
        self.watch(quiet)?;
        Ok(Done {
            begun,
            resumed,
            ended: Instant::now(),
            outcome,
            counts,
            reaper_cpu: tracker.reaper_cpu()?,
        })
    }

    /// Waits, unless a vCPU ends or the caller wants no more.
    fn watch(&mut self, time: Duration) -> Result<(), GuestperfError> {
        let end = Instant::now() + time;
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(GuestperfError::Interrupted);
            }
            self.guest.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(WATCH));
        }
    }
}

/// What is counted since the guest was made.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    full_exits: u64,
    full_exit_time: Duration,
    resets: u64,
    entries: u64,
}

impl Counts {
    fn read(guest: &StressedGuest) -> Self {
        let Some(rings) = &guest.rings else {
            return Self::default();
        };
        let (full_exits, full_exit_time) = rings.full_exits.counts();
        let stats = rings.log.stats();
        Self {
            full_exits,
            full_exit_time,
            resets: stats.resets,
            entries: stats.entries,
        }
    }

    fn since(&self, before: Self) -> Self {
        Self {
            full_exits: self.full_exits - before.full_exits,
            full_exit_time: self.full_exit_time - before.full_exit_time,
            resets: self.resets - before.resets,
            entries: self.entries - before.entries,
        }
    }
}

/// All that is known of a migration when it is over.
struct Done {
    begun: Instant,
    resumed: Instant,
    ended: Instant,
    outcome: Outcome,
    counts: Counts,
    reaper_cpu: Duration,
}

impl Done {
    /// On a clock that begins at `zero`. `None` if nobody read anything in the quiet phase.
    fn sum_up(&self, zero: Instant, raw: &[Raw]) -> Option<Migration> {
        let outcome = &self.outcome;
        let arrived = outcome.start + outcome.total;
        // It stands still while both sides are compared.
        let clock = |at: Instant| {
            let still = at.clamp(arrived, self.resumed) - arrived;
            (at.saturating_duration_since(zero) - still).as_secs_f64()
        };
        let phases = Phases {
            begin: clock(self.begun),
            stop: clock(arrived - outcome.downtime),
            resume: clock(arrived),
            end: clock(self.ended),
        };
        let read = |(at, reading): &Raw| {
            let seen = *at <= arrived || *at >= self.resumed;
            seen.then(|| Reading {
                at: clock(*at),
                ..reading.clone()
            })
        };
        let readings: Vec<Reading> = raw.iter().filter_map(read).collect();
        let felt = Felt::new(&readings, &phases)?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let rounds = outcome.rounds.iter().map(|round| Round {
            pages: round.pages,
            running: round.running,
            begin: clock(outcome.start + round.begin),
            seconds: (round.sync + round.send).as_secs_f64(),
        });
        Some(Migration {
            figures: Figures {
                quiet_ms_per_gb: felt.quiet_ms_per_gb,
                median_ms_per_gb: felt.median_ms_per_gb,
                worst_ms_per_gb: felt.worst_ms_per_gb,
                drop_seconds: felt.drop_seconds,
                longest_stall_ms: felt.longest_stall_ms,
                full_exits: self.counts.full_exits,
                full_exit_ms: ms(self.counts.full_exit_time),
                resets: self.counts.resets,
                entries: self.counts.entries,
                guest_pages_per_second: felt.pages_per_second,
                reaper_cpu_ms: ms(self.reaper_cpu),
                pages_sent: outcome.pages_sent(),
                downtime_ms: ms(outcome.downtime),
                total_seconds: (arrived - self.begun).as_secs_f64(),
                converged: outcome.converged,
                missed_pages: outcome.mismatched_pages,
            },
            rounds: rounds.collect(),
            phases,
            samples: samples(&readings, &phases),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guestperf::arm::OURS;
    use crate::migration::{Tracker, TrackerError};
    use crate::page_set::PageSet;

    const CELL: Cell = Cell {
        vcpus: 2,
        memory_mib: 8,
        stress_mib: 4,
        ring_entries: 256,
    };
    const LIMITS: Limits = Limits {
        bandwidth_mib: 25,
        max_rounds: 3,
        downtime: Duration::ZERO,
        converge: false,
    };
    const QUIET: Duration = Duration::from_millis(100);

    #[test]
    fn every_arm_brings_all_pages_and_tells_what_it_cost() {
        let Some(kvm) = crate::host::kvm_for_test("guestperf") else {
            return;
        };
        let interrupted = AtomicBool::new(false);
        let mut cell = KvmCell::new(&kvm, &CELL, &interrupted).unwrap();
        for arm in Arm::ALL {
            let migration = cell.migrate(&arm, QUIET, &LIMITS).unwrap();
            let Migration {
                figures,
                rounds,
                phases,
                samples,
            } = &migration;
            let name = arm.name;
            assert_eq!(figures.missed_pages, 0, "{name}: pages were missed");
            // While the link is at any round, some page is written.
            assert!(!figures.converged, "{name}");
            let (sent, running): (Vec<_>, Vec<_>) = rounds
                .iter()
                .map(|round| (round.pages, round.running))
                .unzip();
            assert_eq!(running, [true, true, true, false], "{name}");
            assert_eq!(sent[0], 2048, "{name}");
            assert!(
                sent[1..].iter().all(|&pages| (1..=1024).contains(&pages)),
                "{name}"
            );
            assert_eq!(figures.pages_sent, sent.iter().sum::<u64>(), "{name}");
            assert!(
                figures.entries >= sent[1..].iter().sum(),
                "{name}: {figures:?}"
            );
            let rings = matches!(arm.tracking, Tracking::Rings(..));
            // Rings of 256 hold no 1,024 pages.
            assert!(!rings || figures.resets > 4, "{name}: {figures:?}");
            assert!(
                rings || (figures.resets, figures.full_exits) == (5, 0),
                "{name}"
            );
            let fixed = name.ends_with("fixed");
            assert!(!fixed || figures.full_exits > 0, "{name}");
            assert!(!fixed || figures.full_exit_ms > 0.0, "{name}");
            assert_eq!(
                samples.iter().any(|sample| sample.delay_ms.is_some()),
                rings,
                "{name}"
            );

            let Phases {
                begin,
                stop,
                resume,
                end,
            } = *phases;
            assert!(
                begin >= 0.1 && begin < stop && stop < resume,
                "{name}: {phases:?}"
            );
            assert!(end >= resume + 0.1, "{name}: {phases:?}");
            assert!(samples.is_sorted_by(|a, b| a.at <= b.at), "{name}");
            assert!(
                (figures.total_seconds - (resume - begin)).abs() < 1e-6,
                "{name}"
            );
            assert!(
                (figures.downtime_ms / 1e3 - (resume - stop)).abs() < 1e-6,
                "{name}"
            );
            assert!(
                figures.drop_seconds <= stop - begin + 1e-6,
                "{name}: {figures:?}"
            );
            assert!(figures.worst_ms_per_gb > 0.0, "{name}");
            let last = samples.last().unwrap();
            assert_eq!(last.full_exits, figures.full_exits, "{name}");
            assert!(last.ms_per_gb.is_some(), "{name}: it goes on afterwards");
        }
    }

    #[test]
    fn a_page_that_nobody_told_of_is_missed() {
        /// Says that nothing was written.
        struct Silent;
        impl Tracker for Silent {
            fn sync(&mut self, _dirty: &mut PageSet) -> Result<(), TrackerError> {
                Ok(())
            }

            fn quiesce(&mut self) -> Result<(), TrackerError> {
                Ok(())
            }
        }
        let Some(kvm) = crate::host::kvm_for_test("guestperf") else {
            return;
        };
        let interrupted = AtomicBool::new(false);
        let mut cell = KvmCell::new(&kvm, &CELL, &interrupted).unwrap();
        cell.plain.resume();
        let guest = &mut cell.plain;
        let outcome = migrate(
            guest,
            &mut Silent,
            &cell.destination,
            &LIMITS,
            &interrupted,
            &mut (),
        );
        // What was stressed since it was sent.
        let missed = outcome.unwrap().mismatched_pages;
        assert!(missed > 0);
    }

    #[test]
    fn an_interruption_ends_it_and_the_guest_stands_still() {
        let Some(kvm) = crate::host::kvm_for_test("guestperf") else {
            return;
        };
        let interrupted = AtomicBool::new(true);
        let mut cell = KvmCell::new(&kvm, &CELL, &interrupted).unwrap();
        let arm = Arm::named(OURS).unwrap();
        let error = cell.migrate(&arm, QUIET, &LIMITS).unwrap_err();
        assert!(matches!(error, GuestperfError::Interrupted), "{error}");
        let stores = cell.ringed.stores();
        thread::sleep(Duration::from_millis(10));
        assert_eq!(cell.ringed.stores(), stores);
    }
}
