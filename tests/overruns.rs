// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings that the kernel fills past their end: noticed, and broken for good. Nothing is lost, and every call ends.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use kvm_dirty_ring::error::{FullError, SlotError};
use kvm_dirty_ring::ring::RingView;
use kvm_dirty_ring::sim::{ResetFault, WriteError};
use kvm_dirty_ring::{DirtyPages, SlotId};
use scenario::{ALL_RAM, ALL_ROM, Machine, RAM, run};

/// A machine whose vCPU has written so many pages without looking at its soft limit.
fn overrun_by(pages: u64) -> Machine {
    let machine = Machine::new();
    machine.vcpu.ignore_soft_limit(true);
    machine.write(0..pages);
    machine.vcpu.ignore_soft_limit(false);
    machine
}

fn protect(machine: &Machine) -> Result<usize, SlotError> {
    machine.log.rearm(|slot| {
        machine.vm.rearm_slot(slot);
        Ok(())
    })
}

/// Every sync reports every page, whatever the VMM does about it.
fn assert_broken_for_good(machine: &mut Machine) {
    let all = [ALL_RAM, ALL_ROM];
    assert_eq!(machine.sync(), all);
    assert_eq!(machine.sync(), all);
    let refused = protect(machine).unwrap_err();
    assert!(
        matches!(refused, SlotError::BrokenRing { vcpu: 0 }),
        "{refused}"
    );
    let refused = machine.log.rearmed(RAM).unwrap_err();
    assert!(
        matches!(refused, SlotError::BrokenRing { vcpu: 0 }),
        "{refused}"
    );
    assert_eq!(machine.sync(), all);
    let stats = machine.log.stats();
    assert!(stats.vcpus[0].broken);
    assert_eq!(
        (stats.overruns, stats.suspect_pages),
        (1, ALL_RAM.pages + ALL_ROM.pages)
    );
}

#[test]
fn an_overrun_breaks_the_ring_for_good() {
    // A ring filled to the last entry may have been overrun; one entry less can't.
    for (pages, is_overrun) in [
        (63, false),
        (64, true),
        (65, true),
        (120, true),
        (124, true),
    ] {
        let mut machine = overrun_by(pages);
        let reported = machine.sync();
        if is_overrun {
            assert_broken_for_good(&mut machine);
        } else {
            assert_eq!(reported, [run(RAM, 0, pages)]);
            let stats = machine.log.stats();
            assert!(!stats.vcpus[0].broken);
            assert_eq!((stats.overruns, stats.suspect_pages), (0, 0));
        }
        assert_eq!(
            machine.log.stats().short_resets,
            0,
            "no count says anything"
        );
    }
}

#[test]
fn a_vcpu_whose_broken_ring_can_be_emptied_runs_on() {
    let mut machine = overrun_by(64);
    for _ in 0..10 {
        machine.ring.on_full().unwrap();
        assert_eq!(machine.vcpu.used(), 0);
        machine.write(100..160);
        assert_eq!(machine.vcpu.write(RAM, 160), Err(WriteError::RingFull));
    }
    assert_broken_for_good(&mut machine);
}

/// The kernel's index is where nobody expects it: the ring can't be emptied, which the vCPU's thread learns at
/// once, and everything else goes on.
#[test]
fn a_vcpu_whose_broken_ring_cannot_be_emptied_learns_it_at_once() {
    let mut machine = overrun_by(100);
    // 64 of the 100 entries are still there; 36 free ones are left between both sides' indices.
    machine.ring.on_full().unwrap();
    assert_eq!(machine.vcpu.used(), 36);
    machine.write(100..124);
    assert_eq!(machine.vcpu.write(RAM, 124), Err(WriteError::RingFull));
    for _ in 0..3 {
        let error = machine.ring.on_full().unwrap_err();
        assert!(matches!(error, FullError::Broken { vcpu: 0 }), "{error}");
    }
    assert_broken_for_good(&mut machine);
    machine.log.reap().unwrap();
    let spare = machine.vm.add_vcpu();
    let mut other = machine.log.attach_ring(spare.ring_memory()).unwrap();
    for _ in 0..3 {
        (0..60).for_each(|page| spare.write(RAM, 200 + page % 100).unwrap());
        other.on_full().unwrap();
        machine.vm.rearm_slot(RAM);
    }
    assert!(!machine.log.stats().vcpus[1].broken);
}

#[test]
fn a_reset_that_is_cut_short_beside_a_broken_ring_is_repeated() {
    let mut machine = overrun_by(64);
    machine.ring.on_full().unwrap();
    for _ in 0..3 {
        machine.vm.rearm_slot(RAM);
        machine.write(100..160);
        machine.vm.inject([ResetFault::Short { after: 0 }]);
        machine.ring.on_full().unwrap();
        assert_eq!(machine.vcpu.used(), 0);
    }
}

/// Attached again after another pass has emptied it, a broken ring is not taken for one that can't be emptied.
#[test]
fn a_broken_ring_that_another_pass_has_emptied_can_be_attached_again() {
    let mut machine = overrun_by(64);
    machine.ring.on_full().unwrap();
    machine.write(100..160);
    machine.log.reap().unwrap();
    drop(machine.ring);
    let mut ring = machine.log.attach_ring(machine.vcpu.ring_memory()).unwrap();
    ring.on_full().unwrap();
}

/// The kernel writes over entries that are harvested and wait for their reset: it will mark nothing of them as
/// recycled.
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
fn syncs_and_resets_go_on_beside_a_broken_ring() {
    let mut machine = with_a_reset_index_that_stays_behind();
    assert_broken_for_good(&mut machine);
    for round in 0..100 {
        machine.vm.rearm_slot(RAM);
        let before = machine.log.stats().resets;
        let _ = machine.vcpu.write(RAM, round);
        assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
        assert!(
            machine.log.stats().resets <= before + 2,
            "it is reset again and again"
        );
    }
    assert_eq!(machine.log.stats().short_resets, 0);
}

#[test]
fn slots_come_and_go_beside_a_broken_ring() {
    let mut machine = with_a_reset_index_that_stays_behind();
    machine.sync();
    let retired = machine.log.retire_slot(RAM).unwrap();
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM], "until it is finished");
    machine.vm.delete_slot(RAM);
    machine.log.finish_slot(&retired).unwrap();
    assert_eq!(machine.sync(), [ALL_ROM]);
    let later = SlotId::new(0, 5);
    for (slot, pages) in [(RAM, 64), (later, 10)] {
        machine.log.add_slot(slot, pages).unwrap();
        machine.vm.create_slot(slot, pages);
    }
    let all = [run(RAM, 0, 64), run(later, 0, 10), ALL_ROM];
    assert_eq!(machine.sync(), all, "those that are added later, too");
    let set = |on| {
        machine.vm.set_logged(later, on);
        Ok(())
    };
    machine.log.stop_tracking(later, || set(false)).unwrap();
    machine.log.start_tracking(later, || set(true)).unwrap();
    for _ in 0..3 {
        assert_eq!(machine.sync(), all);
    }
}

/// What was harvested across an overrun and is recycled in part is no page that the vCPU has logged: a dirty limit
/// would charge for it.
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
            machine.vm.inject([ResetFault::Short { after: recycled }]);
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

/// Protects RAM anew in whatever way.
type Protect = fn(&Machine);

const PROTECTIONS: [Protect; 3] = [
    |machine| assert!(protect(machine).unwrap() > 0),
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

/// An entry past the slot's end is marked and not reset, and the slot is protected anew: what is written then is
/// recycled beside it, and forgotten. Written again and again, it is reported each time; until the slot is protected
/// once more, and all is exact again.
#[test]
fn protecting_anew_forgives_nothing_beside_an_entry_past_the_end() {
    let page = ALL_RAM.pages - 1;
    for protect in PROTECTIONS {
        let mut machine = Machine::new();
        machine.vcpu.garble_next(RAM.raw(), ALL_RAM.pages);
        machine.write([10]);
        machine.ring.harvest_and_stop();
        protect(&machine);
        for _ in 0..4 {
            machine.write([page]);
            machine.sync();
            assert!(machine.dirty.contains(RAM, page), "page {page} was lost");
        }
        protect(&machine);
        machine.sync();
        machine.rearm();
        machine.sync();
        assert_eq!(machine.sync(), []);
        machine.write([page]);
        assert_eq!(machine.sync(), [run(RAM, page, 1)]);
    }
}

/// The log comes late to a ring that another has emptied before. A gap of up to three is seen at a harvest.
#[test]
fn a_gap_at_the_head_breaks_the_ring() {
    let mut machine = Machine::new();
    machine.write(0..3);
    machine.sync();
    let late = machine.vm.dirty_log();
    late.add_slot(RAM, ALL_RAM.pages).unwrap();
    let _ring = late.attach_ring(machine.vcpu.ring_memory()).unwrap();
    machine.write(100..103);
    let mut dirty = DirtyPages::new();
    late.sync(&mut dirty).unwrap();
    assert!(dirty.runs().eq([ALL_RAM]));
    assert_eq!(late.stats().overruns, 1);
}

/// Somebody else has marked four entries: what the vCPU logs from then on lies beyond a gap. No sync sees
/// it; the next full exit does.
#[test]
fn a_full_exit_finds_a_gap_that_no_sync_has_seen() {
    let mut machine = Machine::new();
    machine.write(100..104);
    RingView::new(machine.vcpu.ring_memory()).harvest(|_, _| ());
    machine.write(0..10);
    assert_eq!(machine.sync(), [], "known limit");
    machine.write(10..56);
    assert_eq!(machine.vcpu.write(RAM, 60), Err(WriteError::RingFull));
    let error = machine.ring.on_full().unwrap_err();
    // The four are recycled by the first; what lies beyond stays.
    assert!(matches!(error, FullError::Broken { vcpu: 0 }), "{error}");
    assert_broken_for_good(&mut machine);
}
