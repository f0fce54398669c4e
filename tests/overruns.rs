//! Rings that the kernel fills past their end: noticed, everything suspect, and joined again.

#[path = "common/scenario.rs"]
mod scenario;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_dirty_ring::ring::RingView;
use kvm_dirty_ring::sim::{ResetFault, WriteError};
use scenario::{ALL_RAM, ALL_ROM, Machine, RAM, run};

#[test]
fn an_overrun_makes_all_suspect() {
    // A ring filled to the last entry may have been overrun; one entry less can't.
    for (pages, overruns) in [(63, 0), (64, 1), (65, 1), (120, 1)] {
        let mut machine = Machine::new();
        machine.vcpu.ignore_soft_limit(true);
        machine.write(0..pages);
        machine.vcpu.ignore_soft_limit(false);
        let reported = machine.sync();
        let stats = machine.log.stats();
        assert_eq!(stats.overruns, overruns, "{pages} pages");
        assert_eq!(stats.short_resets, 0);
        if overruns == 0 {
            assert_eq!(reported, [run(RAM, 0, pages)]);
        } else {
            machine.assert_all_suspect();
        }
    }
}

#[test]
fn a_vcpu_that_overran_its_ring_runs_again() {
    let mut machine = Machine::new();
    machine.vcpu.ignore_soft_limit(true);
    machine.write(0..100);
    machine.vcpu.ignore_soft_limit(false);
    // 64 of the 100 entries are still there; 36 free ones are left between both sides' indices.
    machine.ring.on_full().unwrap();
    assert_eq!(machine.vcpu.used(), 36);
    machine.write(100..124);
    assert_eq!(machine.vcpu.write(RAM, 124), Err(WriteError::RingFull));
    machine.ring.on_full().unwrap();
    assert_eq!(machine.vcpu.used(), 0);
    machine.write(124..184);
    assert_eq!(machine.log.stats().overruns, 1);
    machine.assert_all_suspect();
}

/// Whether the vCPU writes on for more than two rings, with a few full exits for each page.
fn runs_again(machine: &mut Machine) -> bool {
    (150..300).all(|page| {
        (0..10).any(|_| {
            let written = machine.vcpu.write(RAM, page).is_ok();
            machine.ring.on_full().unwrap();
            written
        })
    })
}

/// Each sync reports all of these pages, which may be written without being logged.
fn assert_stays_reported(machine: &mut Machine, pages: Range<u64>) {
    for _ in 0..3 {
        machine.sync();
        let lost = pages
            .clone()
            .find(|&page| !machine.dirty.contains(RAM, page));
        assert_eq!(lost, None);
    }
}

/// Known limit: with nothing dirty ahead of the head, nothing shows where the kernel is. The vCPU
/// stays out of the guest; nothing is lost, and everything is reported.
#[test]
fn a_vcpu_a_ring_and_a_soft_limit_ahead_stays_out() {
    let mut machine = Machine::new();
    machine.vcpu.ignore_soft_limit(true);
    machine.write(0..64 + 60);
    machine.vcpu.ignore_soft_limit(false);
    assert!(!runs_again(&mut machine));
    assert_stays_reported(&mut machine, 0..124);
}

/// A machine whose kernel overran entries that were harvested and not recycled: its reset index stays
/// behind, at an entry that is free, and everything from here on lies beyond.
fn with_a_reset_index_that_stays_behind() -> Machine {
    let machine = Machine::new();
    machine.write(0..10);
    machine.vm.inject([ResetFault::Error(libc::EINTR)]);
    machine.log.reap().unwrap_err();
    machine.vcpu.ignore_soft_limit(true);
    machine.write(10..70);
    machine.vcpu.ignore_soft_limit(false);
    machine
}

#[test]
fn a_vcpu_that_ran_over_harvested_entries_runs_again() {
    let mut machine = with_a_reset_index_that_stays_behind();
    assert_stays_reported(&mut machine, 0..70);
    assert!(runs_again(&mut machine));
    assert_stays_reported(&mut machine, 0..300);
    machine.assert_all_suspect();
    assert_eq!(machine.vcpu.used(), 0);
}

/// The kernel is helped on at the next reset, and no later one falls short.
#[test]
fn resets_are_whole_after_an_overrun_of_harvested_entries() {
    let mut machine = with_a_reset_index_that_stays_behind();
    machine.sync();
    for round in 0..100 {
        machine.write(100..105);
        machine.sync();
        assert_eq!(machine.vcpu.used(), 0, "round {round}");
    }
    let stats = machine.log.stats();
    assert_eq!(stats.short_resets, 2, "at the overrun, and when it shows");
    assert_eq!(
        stats.overruns, 2,
        "what waits was overrun, and shows where the kernel is"
    );
}

/// As far ahead as it can be: its reset index is where the next entry will be.
fn a_whole_ring_ahead(harvested: u64) -> Machine {
    let mut machine = Machine::new();
    machine.write(0..harvested);
    machine.vm.inject([ResetFault::Error(libc::EINTR)]);
    machine.log.reap().unwrap_err();
    machine.vcpu.ignore_soft_limit(true);
    // Recycled are as many as there are; left are as many as were harvested before.
    machine.write(harvested..harvested + 64);
    machine.sync();
    assert_eq!(u64::from(machine.vcpu.used()), harvested);
    machine.write(100..164 - harvested);
    machine.vcpu.ignore_soft_limit(false);
    machine.sync();
    machine
}

/// That this is so, and not that resets fall short, is taken for certain only where many find nothing.
#[test]
fn a_vcpu_that_is_a_whole_ring_ahead_runs_again() {
    for harvested in 1..60 {
        let mut machine = a_whole_ring_ahead(harvested);
        assert!(runs_again(&mut machine), "{harvested} harvested before");
    }
}

/// The marks that help it on are no pages that it has logged: a dirty limit would charge for them.
#[test]
fn onlookers_do_not_count_what_is_marked_to_help() {
    for harvested in 1..60 {
        let mut machine = a_whole_ring_ahead(harvested);
        let log = machine.log.clone();
        let logged = move || {
            let mut seen = Vec::new();
            log.observe(&mut seen);
            seen[0].taken + seen[0].waiting
        };
        let before = logged();
        let most = Arc::new(AtomicU64::new(0));
        let noted = Arc::clone(&most);
        machine.vm.on_reset(move |_| {
            noted.fetch_max(logged(), Ordering::Relaxed);
        });
        for _ in 0..4 {
            machine.ring.on_full().unwrap();
        }
        assert_eq!(machine.vcpu.used(), 0, "it was helped on");
        assert_eq!(most.load(Ordering::Relaxed), before);
        // The hook keeps the log alive.
        machine.vm.on_reset(|_| ());
    }
}

/// Nor what was harvested across an overrun and is recycled in part.
#[test]
fn onlookers_do_not_count_what_an_overrun_leaves_recycled_in_part() {
    for pushed in [70, 84, 110, 128, 150] {
        for recycled in [0, 1, 5, 30, 63] {
            let machine = Machine::new();
            machine.write(0..10);
            machine.vm.inject([ResetFault::Error(libc::EINTR)]);
            machine.log.reap().unwrap_err();
            machine.vcpu.ignore_soft_limit(true);
            machine.write(10..pushed);
            machine.vcpu.ignore_soft_limit(false);
            let short = ResetFault::Short { after: recycled };
            machine.vm.inject([short, ResetFault::Error(libc::EINTR)]);
            machine.log.reap().unwrap();
            let mut seen = Vec::new();
            machine.log.observe(&mut seen);
            let logged = seen[0].taken + seen[0].waiting;
            assert!(
                logged <= pushed,
                "{logged} of {pushed}, {recycled} recycled"
            );
        }
    }
}

/// Until its vCPU is full again, help that was in vain is not given at every reset of the VM.
#[test]
fn help_in_vain_is_not_given_twice() {
    let mut machine = a_whole_ring_ahead(20);
    let spare = machine.vm.add_vcpu();
    let mut other = machine.log.attach_ring(spare.ring_memory()).unwrap();
    let mut resets = || {
        let before = machine.log.stats().resets;
        spare.write(RAM, 7).unwrap();
        other.on_full().unwrap();
        machine.rearm();
        machine.log.stats().resets - before
    };
    resets();
    for _ in 0..10 {
        let resets = resets();
        assert!(resets < 5, "{resets} resets");
    }
    assert!(runs_again(&mut machine));
}

/// Resets that find nothing without saying why make help vain. A removal has it tried once more.
#[test]
fn a_removal_ends_after_help_in_vain() {
    for lies in 1..100 {
        let mut machine = with_a_reset_index_that_stays_behind();
        machine.sync();
        machine.write(100..105);
        let lie = ResetFault::Short { after: 0 };
        machine.vm.inject(vec![lie; lies]);
        machine.sync();
        let retired = machine.log.retire_slot(RAM).unwrap();
        machine.vm.delete_slot(RAM);
        // Each try makes a reset, and so is the end of one lie at least.
        let ends = (0..=lies).any(|_| machine.log.finish_slot(&retired).is_ok());
        assert!(ends, "the removal does not end after {lies} lies");
    }
}

#[test]
fn a_slot_can_be_removed_after_an_overrun_of_harvested_entries() {
    let mut machine = with_a_reset_index_that_stays_behind();
    machine.sync();
    machine.write(100..105);
    let retired = machine.log.retire_slot(RAM).unwrap();
    machine.vm.delete_slot(RAM);
    machine.log.finish_slot(&retired).unwrap();
    machine.log.add_slot(RAM, 64).unwrap();
}

/// A reset that finds nothing for another reason is no sign of it: the ring is left as it was, and not a word
/// said of an overrun.
#[test]
fn nobody_is_helped_on_who_does_not_stay_behind() {
    for waiting in 1..60 {
        for times in 1..=17 {
            let mut machine = Machine::new();
            machine.write(0..30);
            machine.sync();
            machine.write(100..100 + waiting);
            machine
                .vm
                .inject(vec![ResetFault::Short { after: 0 }; times]);
            let exits = (0..times).take_while(|_| {
                machine.ring.on_full().unwrap();
                machine.vcpu.used() > 0
            });
            assert!(exits.count() < times);
            machine.rearm();
            machine.sync();
            // As many as stop it: the soft limit is where it was.
            for _ in 0..3 {
                machine.write(0..60);
                assert_eq!(machine.vcpu.write(RAM, 60), Err(WriteError::RingFull));
                machine.ring.on_full().unwrap();
                assert_eq!(machine.vcpu.used(), 0);
                assert_eq!(machine.sync(), [run(RAM, 0, 60)]);
            }
            assert_eq!(machine.log.stats().overruns, 0);
        }
    }
}

/// A machine whose ring was overrun, which nobody suspects any more; the next entry leaves a gap before it.
fn with_a_gap() -> Machine {
    let mut machine = Machine::new();
    machine.vcpu.ignore_soft_limit(true);
    machine.write(0..100);
    machine.vcpu.ignore_soft_limit(false);
    machine.sync();
    machine.rearm();
    machine.sync();
    machine
}

#[test]
fn what_lies_beyond_an_overruns_gap_comes_with_the_next_sync() {
    let mut machine = with_a_gap();
    machine.write([150]);
    assert_eq!(machine.sync(), [run(RAM, 150, 1)]);
    assert_eq!(machine.vcpu.used(), 0);
}

fn with_a_gap_and_a_smaller_slot() -> Machine {
    let machine = with_a_gap();
    let retired = machine.log.retire_slot(RAM).unwrap();
    machine.vm.delete_slot(RAM);
    machine.log.finish_slot(&retired).unwrap();
    machine.log.add_slot(RAM, 64).unwrap();
    machine.vm.create_slot(RAM, 64);
    machine
}

/// Protects RAM anew in whatever way.
type Protect = fn(&Machine);

const PROTECTIONS: [Protect; 3] = [
    |machine| {
        let protect = |slot| {
            machine.vm.rearm_slot(slot);
            Ok(())
        };
        assert!(machine.log.rearm(protect).unwrap() > 0);
    },
    |machine| {
        machine.vm.rearm_slot(RAM);
        machine.log.rearmed(RAM).unwrap();
    },
    |machine| {
        let switch = |on| {
            machine.vm.set_logged(RAM, on);
            Ok(())
        };
        let log = &machine.log;
        log.stop_tracking(RAM, || switch(false)).unwrap();
        log.start_tracking(RAM, || switch(true)).unwrap();
    },
];

/// Written again and again, though the kernel may have forgotten to protect it, the page is reported each
/// time; until the slot is protected once more, and all is exact again.
fn assert_nothing_was_forgiven(machine: &mut Machine, page: u64, protect: Protect) {
    for _ in 0..4 {
        machine.write([page]);
        machine.sync();
        assert!(machine.dirty.contains(RAM, page), "page {page} was lost");
    }
    protect(machine);
    machine.sync();
    machine.rearm();
    machine.sync();
    assert_eq!(machine.sync(), []);
    machine.write([page]);
    assert_eq!(machine.sync(), [run(RAM, page, 1)]);
}

/// A gap's entries are marked and not reset, and the slot is protected anew: what is written then is recycled
/// beside them, and forgotten.
#[test]
fn protecting_anew_forgives_nothing_beside_a_gaps_old_entries() {
    for protect in PROTECTIONS {
        let mut machine = with_a_gap_and_a_smaller_slot();
        machine.write([60]);
        machine.ring.harvest_and_stop();
        protect(&machine);
        assert_nothing_was_forgiven(&mut machine, 60, protect);
    }
}

/// The same with an entry that the kernel has made so.
#[test]
fn protecting_anew_forgives_nothing_beside_an_entry_past_the_end() {
    for protect in PROTECTIONS {
        let mut machine = Machine::new();
        machine.vcpu.garble_next(RAM.raw(), ALL_RAM.pages);
        machine.write([10]);
        machine.ring.harvest_and_stop();
        protect(&machine);
        assert_nothing_was_forgiven(&mut machine, ALL_RAM.pages - 1, protect);
    }
}

/// The gap's old entries are recycled with what lies beyond. If they name pages that the id's next slot
/// does not have, the kernel forgets the batch, and the new entry's page stays unprotected.
#[test]
fn a_gaps_old_entries_make_a_smaller_slot_suspect() {
    let mut machine = with_a_gap_and_a_smaller_slot();
    for _ in 0..3 {
        machine.write([60]);
        let reported = machine.sync();
        assert_eq!(reported, [run(RAM, 0, 64)], "page 60 was lost");
    }
}

/// Nothing to harvest, yet the ring is full: an overrun that no pass has seen. Here the log came
/// late to a ring that another has emptied before.
#[test]
fn a_full_exit_crosses_a_gap_that_no_pass_has_seen() {
    let mut machine = Machine::new();
    machine.write(0..3);
    machine.sync();
    let late = machine.vm.dirty_log();
    late.add_slot(RAM, ALL_RAM.pages).unwrap();
    let mut ring = late.attach_ring(machine.vcpu.ring_memory()).unwrap();
    machine.write(100..160);
    assert_eq!(machine.vcpu.write(RAM, 160), Err(WriteError::RingFull));
    ring.on_full().unwrap();
    assert_eq!(machine.vcpu.used(), 0);
    machine.write([160]);
    late.sync(&mut machine.dirty).unwrap();
    assert!(machine.dirty.runs().eq([ALL_RAM]));
    assert_eq!(late.stats().overruns, 1);
}

/// Somebody else has marked four entries: what the vCPU logs from then on lies beyond a gap. No sync sees
/// it; the next full exit does.
#[test]
fn a_full_exit_crosses_a_gap_that_somebody_else_has_made() {
    let mut machine = Machine::new();
    machine.write(100..104);
    RingView::new(machine.vcpu.ring_memory()).harvest(|_, _| ());
    machine.write(0..10);
    assert_eq!(machine.sync(), [], "known limit");
    machine.write(10..56);
    assert_eq!(machine.vcpu.write(RAM, 60), Err(WriteError::RingFull));
    machine.ring.on_full().unwrap();
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
    machine.write([60]);
    assert_eq!(machine.vcpu.used(), 1);
}
