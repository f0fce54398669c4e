// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Members that are suspect, and impossible entries.

use kvm_dirty_ring::sim::ResetFault;

use super::machine::{Machine, NONE, RAM, RAM_PAGES, ROM_PAGES};

/// Suspects have to be sent in each round: a member among them, too.
#[test]
fn a_member_under_suspicion_counts_as_another() {
    let mut machine = Machine::with_rings(1);
    machine.write(0..1);
    machine.sync();
    machine.write(1..3);
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.sync();
    machine.vm.protect(RAM, 0);
    assert_eq!(machine.sync(), (vec![0], vec![1, 2]));
    machine.vm.inject([ResetFault::AtEnd]);
    machine.write(40..41);
    let (members, others) = machine.sync();
    assert_eq!(
        members, NONE,
        "it is near the last page of a doubtful reset"
    );
    assert!(others.contains(&0) && others.contains(&40));
    // A rearming ends both.
    machine.log.rearm(|slot| machine.protect(slot)).unwrap();
    let (members, others) = machine.sync();
    assert!(members.is_empty() && others.contains(&0));
    assert_eq!(machine.sync(), (NONE, NONE));
}

#[test]
fn in_a_broken_machine_no_page_is_a_member() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..2);
    machine.sync();
    machine.vcpu.ignore_soft_limit(true);
    machine.write(20..84);
    let (members, others) = machine.sync();
    let all = (RAM_PAGES + ROM_PAGES) as usize;
    assert_eq!((members, others.len()), (NONE, all));
}

#[test]
fn ids_that_no_slot_has_are_no_members() {
    let machine = Machine::with_rings(10);
    machine.vcpu.garble_next(77, 0);
    machine.write(0..1);
    machine.log.reap().unwrap();
    let stats = machine.stats();
    assert_eq!(
        (stats.unknown_slot_entries, stats.working_set.members),
        (1, 0)
    );
    machine.vcpu.garble_next(RAM.raw(), 1 << 40);
    machine.write(1..2);
    machine.log.reap().unwrap();
    assert_eq!(machine.stats().out_of_range_entries, 1);
}
