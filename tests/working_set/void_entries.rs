// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries that name no page, as their pages stay open: in resets that fall short, and in kernels that ignore them.

use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu};

use super::machine::{Machine, RAM};

/// A machine of one slot whose kernel protects the pages that it has logged, whatever their entries say by now.
fn ignoring(pages: u64, places: u64) -> Machine {
    let machine = Machine::with_slots(|config| config.ignores_voids = true, [(RAM, pages)]);
    machine.set_places(places);
    machine
}

/// The batch before a void entry is protected when that is read: no page is lost by what is cut short there.
#[test]
fn a_reset_that_stops_at_a_void_entry_loses_nothing() {
    for after in 0..8 {
        let mut machine = Machine::with_rings(0);
        machine.log.set_working_set(None);
        machine.write([0, 100, 1, 101, 2, 102]);
        machine.set_places(0);
        machine.log.reap().unwrap();
        machine.vm.inject([ResetFault::Short { after }]);
        machine.write([0, 200, 1, 201, 2, 202]);
        machine.log.reap().unwrap();
        machine.write([0, 1, 2, 200, 201, 202]);
        let (members, others) = machine.sync();
        let all = [members, others].concat();
        for page in [0, 1, 2, 100, 101, 102, 200, 201, 202] {
            assert!(all.contains(&page), "page {page}, cut short after {after}");
        }
    }
}

#[test]
fn a_kernel_that_ignores_them_switches_it_off() {
    let mut machine = ignoring(1000, 500);
    for round in 0..20 {
        machine.write(0..400);
        machine.sync();
        assert_eq!(machine.dirty.page_count(), 400, "in round {round}");
    }
    let set = machine.set();
    assert!(set.useless && set.refresh_owed, "{set:?}");
    machine.refresh();
    machine.sync();
    machine.write(0..400);
    let (members, others) = machine.sync();
    assert_eq!((members.len(), others.len()), (0, 400));
}

/// KVM drops its mappings of all pages when a slot goes, and logs each member once more.
#[test]
fn members_that_are_all_logged_once_more_keep_it_on() {
    let machine = Machine::with_slots(|_: &mut SimConfig| (), [(RAM, 2000)]);
    machine.set_places(2000);
    for _ in 0..2 {
        for page in 0..2000 {
            machine.write([page]);
            if page % 100 == 99 {
                machine.log.reap().unwrap();
            }
        }
        (0..2000).for_each(|page| machine.vm.protect(RAM, page));
    }
    let set = machine.set();
    assert_eq!((set.members, set.useless), (2000, false));
}

/// The same happens again and again, while the guest writes few other pages.
#[test]
fn members_that_are_logged_once_more_now_and_then_keep_it_on() {
    let machine = Machine::with_slots(|_: &mut SimConfig| (), [(RAM, 20_000)]);
    machine.set_places(1000);
    let sweep = || {
        for page in 0..1000 {
            machine.write([page]);
            if page % 100 == 99 {
                machine.log.reap().unwrap();
            }
        }
    };
    sweep();
    for round in 1..10 {
        for cold in 0..40 {
            let first = round * 1600 + cold * 40;
            machine.write(first..first + 40);
            machine.log.reap().unwrap();
        }
        (0..1000).for_each(|page| machine.vm.protect(RAM, page));
        sweep();
        assert!(!machine.set().useless, "in round {round}");
    }
}

/// A pass over eight rings is one pass.
#[test]
fn rings_are_not_counted_as_passes() {
    let machine = Machine::with_slots(|_: &mut SimConfig| (), [(RAM, 2000)]);
    machine.set_places(100);
    let more: Vec<_> = (0..7)
        .map(|_| {
            let vcpu = machine.vm.add_vcpu();
            let ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
            (vcpu, ring)
        })
        .collect();
    machine.write(0..100);
    machine.log.reap().unwrap();
    let log_members = |vcpu: &SimVcpu| {
        for page in 0..100 {
            machine.vm.protect(RAM, page);
            vcpu.write(RAM, page).unwrap();
        }
    };
    for _ in 0..7 {
        log_members(&machine.vcpu);
        more.iter().for_each(|(vcpu, _)| log_members(vcpu));
        machine.log.reap().unwrap();
        assert!(!machine.set().useless);
    }
    log_members(&machine.vcpu);
    machine.log.reap().unwrap();
    assert!(machine.set().useless, "the eighth pass");
}

/// A kernel that ignores void entries puts such a page into one batch with the one before, and is stopped before it has
/// protected the two.
#[test]
fn a_batch_that_ends_with_one_is_suspect_where_the_kernel_ignores_it() {
    let mut machine = ignoring(300, 1);
    machine.write([6]);
    machine.sync();
    machine.write([5, 6]);
    machine.vm.inject([ResetFault::AtEnd]);
    machine.sync();
    assert_eq!(machine.stats().doubtful_resets, 1);
    machine.write([5]);
    machine.sync();
    assert!(machine.dirty.contains(RAM, 5), "it was lost");
}

/// A void entry of a slot that goes is left in the ring by a reset that falls short. A kernel that ignores void entries
/// would recycle it in one batch with entries of a new and smaller slot of that id, and then forget that batch.
#[test]
fn none_outlives_its_slot() {
    let mut machine = ignoring(300, 1);
    machine.write([120]);
    // Neither the reset of each nor its repetition recycles anything.
    machine.vm.inject([ResetFault::Short { after: 0 }; 4]);
    machine.replace_ram(100);
    for _ in 0..2 {
        machine.write([99]);
        machine.sync();
        assert!(machine.dirty.contains(RAM, 99), "it was lost");
    }
}
