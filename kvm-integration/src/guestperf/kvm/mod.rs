// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Migrations of a guest on real KVM.
//!
//! A cell has three guests that share their memory and run in turns: one with dirty rings, and two
//! without, for a KVM VM has either rings or bitmaps, and bitmaps that are cleared when they are read, or by
//! another call. They go on from migration to migration; only their logging starts and stops.

mod guest;
mod sampler;
mod tracking;

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

use super::analysis::{Reading, samples};
use super::arm::{Arm, Tracking};
use super::cell::Cell;
use super::result::{Figures, Migration, Phases, Round};
use crate::guest::memory::{GuestMemory, PAGE_SIZE};
use crate::guest::thread::VcpuThread;
use crate::host::check_available;
use crate::host::cores::{Cores, confine};
use crate::machine::Guest;
use crate::migration::{Destination, Limits, Outcome, migrate};
use guest::{Logging, StressedGuest};
use sampler::{Raw, Sampler};
use tracking::{ArmTracker, Delay};

/// How long a guest may take to be through all its pages; a slower one is measured as it is.
const LONGEST_TOUR: Duration = Duration::from_secs(20);

/// A cell whose guests are ready.
#[derive(Debug)]
pub struct KvmCell<'a> {
    ringed: StressedGuest,
    plain: StressedGuest,
    bitmapped: StressedGuest,
    destination: Destination,
    cores: Cores,
    interrupted: &'a AtomicBool,
}

impl<'a> KvmCell<'a> {
    /// Whether there is memory for such a guest and its copy.
    pub fn check_memory(cell: &Cell) -> Result<()> {
        check_available("the guest and its copy take", 2 * cell.memory_mib)
    }

    /// Makes the guests.
    pub fn new(kvm: &Kvm, cell: &Cell, interrupted: &'a AtomicBool) -> Result<Self> {
        Self::check_memory(cell)?;
        let cores = Cores::detect().context("sched_getaffinity failed")?;
        // A fault of the host's own would look like a slow guest.
        let memory = GuestMemory::prefaulted(cell.memory_mib << 20 >> PAGE_SIZE.ilog2());
        let no_memory = "no memory for the guest and its copy: make it smaller";
        let memory = Arc::new(memory.context(no_memory)?);
        // What is not stressed must be something, too, or nobody would see that it was not sent.
        for page in 0..memory.pages() {
            memory.write_u64(page * PAGE_SIZE, page + 1);
        }
        let guest = |logging| StressedGuest::new(kvm, cell, &memory, logging, &cores);
        let (ringed, plain) = (guest(Logging::Rings)?, guest(Logging::Plain)?);
        let bitmapped = guest(Logging::Bitmap)?;
        let destination =
            Destination::new(ringed.slots(), GuestMemory::prefaulted).context(no_memory)?;
        Ok(Self {
            ringed,
            plain,
            bitmapped,
            destination,
            cores,
            interrupted,
        })
    }

    /// A quiet phase, a migration as `arm` tracks it, and a quiet phase again.
    pub fn migrate(&mut self, arm: &Arm, quiet: Duration, limits: &Limits) -> Result<Migration> {
        let guest = match arm.tracking {
            Tracking::Bitmap if arm.leaves_open => &mut self.bitmapped,
            Tracking::Bitmap => &mut self.plain,
            Tracking::Rings(..) => &mut self.ringed,
        };
        let cpus = self.cores.of_reaper(guest.vcpus.0.len() as u32);
        let mut run = Run {
            guest,
            destination: &self.destination,
            cpus,
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
                    confine(cpus).context("sched_setaffinity failed")?;
                    run.phases(arm, quiet, limits, &sampler)
                });
                let done = phases.join();
                // Before a panic goes on: the scope waits for the sampler.
                over.store(true, Ordering::Relaxed);
                done.unwrap_or_else(|panic| resume_unwind(panic))
            })
            .map(|done| done.sum_up(zero, &sampler.into_readings()))
        });
        // Whatever happened: the other guests need the memory.
        let paused = run.guest.pause();
        let migration = result?;
        paused?;
        migration.context(
            "the guest was not looked at in all of its quiet phase: is the machine so busy?",
        )
    }
}

/// A migration and what is around it.
struct Run<'a> {
    guest: &'a mut StressedGuest,
    destination: &'a Destination,
    /// Where its reaper may run.
    cpus: &'a [usize],
    interrupted: &'a AtomicBool,
    delay: Delay,
}

impl Run<'_> {
    /// Waits until each vCPU has been everywhere: what the last migration has protected is then
    /// writable again.
    fn settle(&mut self) -> Result<()> {
        let fewest = |vcpus: &[VcpuThread]| vcpus.iter().map(VcpuThread::passes).min();
        // The pass under way may have begun long ago.
        let enough = fewest(&self.guest.vcpus.0).map(|passes| passes + 2);
        let end = Instant::now() + LONGEST_TOUR;
        let settled = |vcpus: &[VcpuThread]| fewest(vcpus) >= enough;
        self.guest.vcpus.watch_until(end, self.interrupted, settled)
    }

    fn phases(
        &mut self,
        arm: &Arm,
        quiet: Duration,
        limits: &Limits,
        mut sampler: &Sampler,
    ) -> Result<Done> {
        self.guest.vcpus.watch(quiet, self.interrupted)?;
        let mut tracker = ArmTracker::start(arm, self.guest, self.cpus, &self.delay)?;
        let before = counts(self.guest);
        let begun = sampler.read();
        self.guest.set_logged(true)?;
        let outcome = migrate(
            self.guest,
            &mut tracker,
            self.destination,
            limits,
            self.interrupted,
            &mut sampler,
        );
        let outcome = outcome.context("the migration failed")?;
        let after = counts(self.guest);
        let mut counts: [u64; 4] = std::array::from_fn(|at| after[at] - before[at]);
        counts[2] += tracker.ioctls;
        counts[3] += tracker.pages;
        self.guest.set_logged(false)?;
        if arm.leaves_open {
            self.guest.forget_what_is_open()?;
        }
        self.delay.store(0, Ordering::Relaxed);
        let resumed = Instant::now();
        self.guest.resume();
        self.guest.vcpus.watch(quiet, self.interrupted)?;
        Ok(Done {
            begun,
            resumed,
            ended: Instant::now(),
            outcome,
            counts,
            reaper_cpu: tracker.reaper_cpu,
        })
    }
}

/// Full exits, nanoseconds spent on them, resets and entries since the guest was made.
fn counts(guest: &StressedGuest) -> [u64; 4] {
    let Some(full_exits) = &guest.full_exits else {
        return [0; 4];
    };
    let stats = full_exits.log().stats();
    let (full_exits, time) = full_exits.counts();
    let time = time.as_nanos() as u64;
    [full_exits, time, stats.resets, stats.entries]
}

/// All that is known of a migration when it is over.
struct Done {
    begun: Instant,
    resumed: Instant,
    ended: Instant,
    outcome: Outcome,
    counts: [u64; 4],
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
        let [full_exits, full_exit_ns, resets, entries] = self.counts;
        let felt = Figures::felt(&readings, &phases)?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let rounds = outcome.rounds.iter().map(|round| Round {
            pages: round.pages,
            running: round.running,
            begin: clock(outcome.start + round.begin),
            seconds: (round.sync + round.send).as_secs_f64(),
        });
        Some(Migration {
            figures: Figures {
                full_exits,
                full_exit_ms: ms(Duration::from_nanos(full_exit_ns)),
                resets,
                entries,
                reaper_cpu_ms: ms(self.reaper_cpu),
                pages_sent: outcome.pages_sent(),
                downtime_ms: ms(outcome.downtime),
                total_seconds: (arrived - self.begun).as_secs_f64(),
                converged: outcome.converged,
                missed_pages: outcome.mismatched_pages,
                ..felt
            },
            rounds: rounds.collect(),
            phases,
            samples: samples(&readings, &phases),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::MutexGuard;

    use super::*;
    use crate::cli::interrupt::Interrupted;
    use crate::guestperf::arm::OURS;
    use crate::migration::{Places, Tracker};
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
        // One page is too much.
        downtime: Duration::ZERO,
        converge: false,
        places: Places::Auto,
        break_after: None,
    };
    const QUIET: Duration = Duration::from_millis(100);

    /// A small guest, and what keeps others away; `None`, and a line about it, where there is no KVM.
    fn cell(interrupted: &AtomicBool) -> Option<(KvmCell<'_>, MutexGuard<'_, ()>)> {
        let (kvm, alone) = crate::host::kvm_for_test("guestperf")?;
        Some((KvmCell::new(&kvm, &CELL, interrupted).unwrap(), alone))
    }

    #[test]
    fn every_arm_brings_all_pages_and_tells_what_it_cost() {
        let interrupted = AtomicBool::new(false);
        let Some((mut cell, _alone)) = cell(&interrupted) else {
            return;
        };
        for arm in Arm::ALL {
            let name = arm.name;
            let missed_none = |migration: &Migration| {
                let missed = migration.figures.missed_pages;
                assert_eq!(missed, 0, "{name}: pages were missed");
            };
            // On a machine with much else to do a guest may write nothing for all of a round.
            let migrations = (0..20).map(|_| cell.migrate(&arm, QUIET, &LIMITS).unwrap());
            let mut migrations = migrations.inspect(missed_none);
            let migration = migrations.find(|migration| !migration.figures.converged);
            let Migration {
                figures,
                rounds,
                phases,
                samples,
            } = &migration.expect("a guest that writes all the time");
            let check =
                |holds: bool, what: &str| assert!(holds, "{name}: {what}: {figures:?}, {phases:?}");

            let sent: Vec<u64> = rounds.iter().map(|round| round.pages).collect();
            let running: Vec<bool> = rounds.iter().map(|round| round.running).collect();
            assert_eq!(running, [true, true, true, false], "{name}");
            assert_eq!(sent[0], 2048, "{name}");
            check(sent[1..].iter().all(|&pages| pages <= 1024), "pages");
            check(figures.pages_sent == sent.iter().sum::<u64>(), "pages sent");
            check(figures.entries >= sent[1..].iter().sum::<u64>(), "entries");
            let rings = matches!(arm.tracking, Tracking::Rings(..));
            let bitmap = (figures.resets, figures.full_exits) == (5, 0);
            check(rings || bitmap, "an ioctl for each sync");
            check(!rings || figures.resets > 0, "resets");
            check(!name.ends_with("fixed") || figures.full_exits > 0, "stops");
            let stalls = (figures.full_exits > 0) == (figures.full_exit_ms > 0.0);
            check(stalls, "stalls are those of full exits");
            let slept = samples.iter().any(|sample| sample.delay_ms.is_some());
            check(slept == rings, "a reaper sleeps");

            let &Phases {
                begin,
                stop,
                resume,
                end,
            } = phases;
            check(begin >= 0.1 && begin < stop && stop < resume, "order");
            check(end >= resume + 0.1, "a quiet phase in the end");
            check(samples.is_sorted_by(|a, b| a.at <= b.at), "samples");
            let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
            check(near(figures.total_seconds, resume - begin), "total");
            check(near(figures.downtime_ms / 1e3, resume - stop), "downtime");
            check(figures.drop_seconds <= stop - begin + 1e-6, "drop");
            check(figures.worst_ms_per_gb > 0.0, "worst");
            let counted = samples.last().map(|last| last.full_exits);
            check(counted == Some(figures.full_exits), "full exits");
        }
    }

    /// What it leaves open in one migration is logged in the next.
    #[test]
    fn what_stays_open_arrives_each_time() {
        let interrupted = AtomicBool::new(false);
        let Some((mut cell, _alone)) = cell(&interrupted) else {
            return;
        };
        let arms = Arm::ALL.into_iter().filter(|arm| arm.leaves_open);
        for arm in arms {
            for places in [300, 2048, 0] {
                let limits = Limits {
                    downtime: Duration::from_millis(50),
                    places: Places::Pages(places),
                    ..LIMITS
                };
                let migration = cell.migrate(&arm, QUIET, &limits).unwrap();
                let missed = migration.figures.missed_pages;
                assert_eq!(missed, 0, "{}, {places}: pages were missed", arm.name);
            }
        }
        for guest in [&cell.ringed, &cell.bitmapped] {
            let stats = guest.full_exits.as_ref().unwrap().log().stats();
            assert!(stats.working_set.joined > 0, "nothing stayed open");
            assert_eq!(stats.working_set.members, 0);
        }
    }

    #[test]
    fn a_page_that_nobody_told_of_is_missed() {
        /// Says that nothing was written.
        struct Silent;
        impl Tracker for Silent {
            fn sync(&mut self, _dirty: &mut PageSet) -> Result<()> {
                Ok(())
            }

            fn quiesce(&mut self) -> Result<()> {
                Ok(())
            }
        }
        let interrupted = AtomicBool::new(false);
        let Some((mut cell, _alone)) = cell(&interrupted) else {
            return;
        };
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
        let interrupted = AtomicBool::new(true);
        let Some((mut cell, _alone)) = cell(&interrupted) else {
            return;
        };
        let arm = Arm::named(OURS).unwrap();
        let error = cell.migrate(&arm, QUIET, &LIMITS).unwrap_err();
        assert!(error.is::<Interrupted>(), "{error}");
        let stores = cell.ringed.stores();
        thread::sleep(Duration::from_millis(10));
        assert_eq!(cell.ringed.stores(), stores);
    }
}
