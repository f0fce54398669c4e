// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The loop on machines that behave, and on machines that misbehave on purpose.

mod working_set;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_dirty_ring::error::SyncError;
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::sim::{ResetFault, SimVm};
use kvm_dirty_ring::{DirtyLog, Limiter, Reaper, RingEntries, SlotId};

use super::*;
use crate::cli::interrupt::Interrupted;
use crate::guest::memory::{GuestMemory, PAGE_SIZE};
use crate::guest::workload::{Region, Workload};
use crate::machine::{Machine, Setup, SimMachine};

const LIMITS: Limits = Limits {
    bandwidth_mib: 0,
    max_rounds: 5,
    downtime: Duration::from_millis(1),
    converge: false,
    places: Places::Auto,
    break_after: None,
};

/// A machine without vCPUs, whose memory is written while it "pauses".
struct Double {
    log: DirtyLog,
    slots: Vec<GuestSlot>,
    /// Pages written then.
    writes: Vec<(usize, u64)>,
    /// Pages written once, when somebody looks after it.
    early: Vec<(usize, u64)>,
    /// Whether the log learns of it.
    honest: bool,
}

impl Double {
    fn new(writes: &[(usize, u64)], honest: bool) -> Self {
        let vm = SimVm::new(Default::default());
        let log = vm.dirty_log();
        let slot = |(id, pages)| {
            let id = SlotId::new(0, id);
            log.add_slot(id, pages).unwrap();
            vm.create_slot(id, pages);
            let memory = Arc::new(GuestMemory::new(pages).unwrap());
            let region = Region { gpa: 0, pages };
            GuestSlot { id, region, memory }
        };
        Self {
            slots: [(4, 100), (7, 300)].map(slot).into(),
            writes: writes.into(),
            early: Vec::new(),
            log,
            honest,
        }
    }

    fn write(&self, slot: usize, page: u64) -> Result<()> {
        let slot = &self.slots[slot];
        slot.memory.write_u64(page * PAGE_SIZE + 4088, 1 << 63);
        if self.honest {
            self.log.mark_dirty(slot.id, page, 1)?;
        }
        Ok(())
    }
}

impl Machine for Double {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn kick(&self) -> crate::machine::Kick {
        Box::new(|_| ())
    }
}

impl Guest for Double {
    fn slots(&self) -> &[GuestSlot] {
        &self.slots
    }

    fn stores(&self) -> u64 {
        0
    }

    fn check(&mut self) -> Result<()> {
        let mut early = std::mem::take(&mut self.early).into_iter();
        early.try_for_each(|(slot, page)| self.write(slot, page))
    }

    fn pause(&mut self) -> Result<()> {
        let mut writes = self.writes.iter();
        writes.try_for_each(|&(slot, page)| self.write(slot, page))
    }

    fn resume(&mut self) {}

    fn protect(&mut self, _slot: SlotId) -> Result<()> {
        Ok(())
    }
}

fn run(machine: &mut dyn Machine, limits: &Limits) -> Outcome {
    try_run(machine, limits, &AtomicBool::new(false), &mut ()).unwrap()
}

fn try_run(
    machine: &mut dyn Machine,
    limits: &Limits,
    interrupted: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let mut rings = Rings::start(machine.log(), Fixed::default()).unwrap();
    let destination = Destination::new(machine.slots(), GuestMemory::new).unwrap();
    migrate(
        machine,
        &mut rings,
        &destination,
        limits,
        interrupted,
        observer,
    )
}

#[test]
fn a_page_that_the_log_missed_is_found() {
    let writes = [(1, 299), (0, 99), (1, 0)];
    let outcome = run(&mut Double::new(&writes, false), &LIMITS);
    assert_eq!(outcome.mismatched_pages, 3);
    assert_eq!(outcome.first_mismatch, Some((SlotId::new(0, 4), 99)));
    assert_eq!(outcome.pages_sent(), 400);

    let outcome = run(&mut Double::new(&writes, true), &LIMITS);
    assert_eq!(
        (outcome.mismatched_pages, outcome.first_mismatch),
        (0, None)
    );
    assert_eq!(outcome.pages_sent(), 403);
}

#[test]
fn a_quiet_guest_takes_two_rounds() {
    let outcome = run(&mut Double::new(&[], true), &LIMITS);
    let pages: Vec<u64> = outcome.rounds.iter().map(|round| round.pages).collect();
    assert_eq!(pages, [400, 0]);
    let running: Vec<bool> = outcome.rounds.iter().map(|round| round.running).collect();
    assert_eq!(running, [true, false]);
    assert!(outcome.converged);
    assert_eq!(outcome.rounds[0].dirty_rate(), None);
    assert_eq!(outcome.rounds[1].mib_per_second(), None);
}

/// What has not arrived is sent by the next round: what was cut off, and what was lost with the link.
#[test]
fn a_link_that_breaks_loses_nothing() {
    for (after, arrived) in [(1, 0), (64, 0), (65, 1), (100, 36), (149, 85)] {
        let limits = Limits {
            downtime: Duration::ZERO,
            break_after: Some(after),
            ..LIMITS
        };
        let mut machine = Double::new(&[], true);
        // One run of 50 pages, and a hundred runs of one.
        let single = (0..100).map(|page| (1, 1 + 2 * page));
        machine.early = (10..60).map(|page| (0, page)).chain(single).collect();
        let outcome = run(&mut machine, &limits);
        let rounds = outcome.rounds.iter();
        let rounds: Vec<_> = rounds.map(|round| (round.pages, round.cut_off)).collect();
        let again = 150 - arrived;
        assert_eq!(rounds[..3], [(400, 0), (after, 150 - after), (again, 0)]);
        assert_eq!(outcome.broken_round(), Some(1));
        assert_eq!(outcome.mismatched_pages, 0);
    }
}

fn busy_setup() -> Setup {
    Setup {
        vcpus: 2,
        ring_entries: RingEntries::new(256).unwrap(),
        pages: 2000,
        workload: Workload::HotAndCold,
        seed: 5,
        write_rate: 0,
    }
}

fn busy() -> SimMachine {
    SimMachine::start(&busy_setup()).unwrap()
}

#[test]
fn a_guest_that_outruns_the_link_ends_at_the_round_limit() {
    let limits = Limits {
        bandwidth_mib: 100,
        // It takes a third to see that there is no hope.
        max_rounds: 2,
        downtime: Duration::from_micros(10),
        places: Places::Off,
        ..LIMITS
    };
    let mut machine = busy();
    let outcome = run(&mut machine, &limits);
    assert!(!outcome.converged && outcome.hopeless.is_none());
    assert_eq!(outcome.rounds.len(), 3);
    assert_eq!(outcome.mismatched_pages, 0);
    assert!(machine.log().stats().full_exits() > 0);
    assert!(outcome.downtime < outcome.total);
    // 2,000 pages are 7.8 MiB, of which up to 2 are sent on credit.
    let rate = outcome.rounds[0].mib_per_second().unwrap();
    assert!(rate < 140.0, "{rate} MiB/s");
}

/// A guest that writes all its pages over and over converges by limits alone, down to nothing.
#[test]
fn a_guest_that_outruns_the_link_is_limited() {
    let limits = Limits {
        bandwidth_mib: 8,
        max_rounds: 100,
        downtime: Duration::from_millis(20),
        converge: true,
        ..LIMITS
    };
    let mut machine = busy();
    let limiter = Limiter::spawn(machine.log(), machine.kick()).unwrap();
    let outcome = run(&mut machine, &limits);
    limiter.stop().unwrap();
    assert!(outcome.converged, "{outcome:?}");
    assert_eq!(outcome.mismatched_pages, 0);
    assert_eq!(outcome.rounds[0].limit, None);
    let limited: Vec<_> = outcome
        .rounds
        .iter()
        .filter_map(|round| round.limit)
        .collect();
    assert!(limited.is_sorted_by(|before, after| before >= after));
    let stats = machine.log().stats();
    assert_eq!(stats.vcpus[1].dirty_limit, limited.last().copied());
    assert!(stats.vcpus.iter().any(|vcpu| vcpu.limited_ns > 0));
}

#[test]
fn pages_that_may_be_unprotected_are_protected_anew() {
    let limits = Limits {
        downtime: Duration::from_nanos(1),
        ..LIMITS
    };
    let mut machine = busy();
    machine.inject([ResetFault::Short { after: 1 }]);
    // A guest that has written nothing yet when the migration begins may be through before its first reset.
    let start = Instant::now();
    while machine.log().stats().short_resets == 0 {
        let patience = Duration::from_secs(60);
        assert!(start.elapsed() < patience, "no ring is ever full");
        std::thread::yield_now();
    }
    let outcome = run(&mut machine, &limits);
    let stats = machine.log().stats();
    assert_eq!((outcome.rearms, outcome.mismatched_pages), (1, 0));
    assert_eq!((stats.short_resets, stats.suspect_pages), (1, 0));
}

#[test]
fn one_round_is_enough_for_the_impatient() {
    for max_rounds in [0, 1] {
        let limits = Limits {
            max_rounds,
            ..LIMITS
        };
        let outcome = run(&mut busy(), &limits);
        assert_eq!(outcome.rounds.len(), 2);
        assert_eq!(outcome.mismatched_pages, 0);
    }
}

#[test]
fn an_interruption_ends_even_a_slow_link() {
    /// Interrupts when the first pages are on their way.
    struct Interrupter<'a> {
        interrupted: &'a AtomicBool,
        sent: u64,
    }
    impl Observer for Interrupter<'_> {
        fn sent(&mut self, pages: u64) {
            self.interrupted.store(true, Ordering::Relaxed);
            self.sent += pages;
        }
    }
    let interrupted = AtomicBool::new(false);
    let limits = Limits {
        bandwidth_mib: 1,
        ..LIMITS
    };
    let mut machine = busy();
    let mut observer = Interrupter {
        interrupted: &interrupted,
        sent: 0,
    };
    let result = try_run(&mut machine, &limits, &interrupted, &mut observer);
    assert!(result.unwrap_err().is::<Interrupted>());
    assert!(observer.sent < 2000, "it went on to the end");
    // The reaper is gone: another one may come.
    Reaper::spawn(machine.log(), Fixed::default()).unwrap();
}

#[test]
fn a_reset_that_fails_ends_the_migration() {
    let machine = Double::new(&[], true);
    let vm = SimVm::new(Default::default());
    let id = SlotId::new(0, 1);
    let log = vm.dirty_log();
    log.add_slot(id, 1).unwrap();
    vm.create_slot(id, 1);
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    vcpu.write(id, 0).unwrap();
    vm.inject([ResetFault::Error(libc::EIO)]);
    let mut machine = Double {
        log,
        slots: Vec::new(),
        ..machine
    };
    let result = try_run(&mut machine, &LIMITS, &AtomicBool::new(false), &mut ());
    assert!(result.unwrap_err().is::<SyncError>());
}
