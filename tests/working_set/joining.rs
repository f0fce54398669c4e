// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which pages stay open.

use std::num::NonZeroU64;

use kvm_dirty_ring::WorkingSet;

use super::machine::{Machine, NONE, RAM};

#[test]
fn the_first_pages_take_the_free_places() {
    let mut machine = Machine::with_rings(2);
    machine.write(0..5);
    assert_eq!(machine.sync(), (vec![0, 1], vec![2, 3, 4]));
    let entries = machine.stats().entries;
    machine.write(0..2);
    assert_eq!(machine.sync(), (vec![0, 1], NONE));
    assert_eq!(machine.stats().entries, entries, "members are not logged");
}

#[test]
fn what_comes_again_within_a_round_stays_open() {
    let mut machine = Machine::with_rings(0);
    machine.write(5..8);
    machine.log.reap().unwrap();
    machine.write(6..9);
    machine.log.reap().unwrap();
    machine.write(6..8);
    assert_eq!(machine.set().members, 2);
    assert_eq!(machine.sync(), (vec![6, 7], vec![5, 8]));
    // In the next round they would have to come twice again.
    machine.write(5..6);
    assert_eq!(machine.sync(), (vec![6, 7], vec![5]));
}

/// It has its bit in a shard, by a pass that had it protected, and is open by now.
#[test]
fn what_was_collected_before_it_joined_is_no_other() {
    let mut machine = Machine::with_rings(0);
    machine.write([5, 6]);
    machine.log.reap().unwrap();
    machine.write([5]);
    assert_eq!(machine.sync(), (vec![5], vec![6]));
    // It is not logged any more.
    machine.write([5, 6]);
    assert_eq!(machine.log.reap().unwrap(), 1);
    assert_eq!(machine.sync(), (vec![5], vec![6]));
}

#[test]
fn a_vmm_without_refreshes_bounds_all_members() {
    let mut machine = Machine::with_rings(0);
    let terms = WorkingSet::new(1).at_most(2);
    machine.log.set_working_set(Some(terms));
    for _ in 0..2 {
        machine.write(0..5);
        machine.log.reap().unwrap();
    }
    let (members, others) = machine.sync();
    assert_eq!((members, others.len()), (vec![0, 1], 3));
}

#[test]
fn nothing_joins_under_a_dirty_limit() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..2);
    machine.sync();
    let limit = NonZeroU64::new(1_000_000);
    machine.log.set_dirty_limits(limit).unwrap();
    assert!(machine.set().refresh_owed);
    machine.write(5..8);
    assert_eq!(machine.sync(), (vec![0, 1], vec![5, 6, 7]));
    machine.refresh();
    assert!(!machine.set().refresh_owed);
    machine.write(0..1);
    machine.sync();
    machine.log.set_dirty_limit(0, None).unwrap();
    machine.write(20..21);
    assert_eq!(machine.sync(), (vec![20], NONE));
}

#[test]
fn devices_and_vcpus_that_are_plugged_in_write_members_too() {
    let mut machine = Machine::with_rings(1);
    machine.write(0..1);
    machine.sync();
    assert!(machine.vm.device_write(RAM, 0) && machine.vm.device_write(RAM, 9));
    machine.log.mark_dirty(RAM, 0, 1).unwrap();
    machine.log.mark_dirty(RAM, 9, 1).unwrap();
    assert_eq!(machine.sync(), (vec![0], vec![9]));
    let vcpu = machine.vm.add_vcpu();
    let _ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
    vcpu.write(RAM, 0).unwrap();
    vcpu.write(RAM, 10).unwrap();
    assert_eq!(machine.sync(), (vec![0], vec![10]));
}

/// Two passes harvest one page, from two rings: one leaves it open, the other has it protected.
#[test]
fn a_page_in_two_rings_may_be_open_and_protected() {
    for order in [[0, 1], [1, 0]] {
        let mut machine = Machine::with_rings(0);
        let vcpu = machine.vm.add_vcpu();
        let _ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
        machine.write(5..6);
        machine.vm.protect(RAM, 5);
        vcpu.write(RAM, 5).unwrap();
        for ring in order {
            let rings = [ring == 0, ring == 1];
            machine.log.reap_rings(&rings).unwrap();
        }
        assert_eq!(machine.sync(), (vec![5], NONE));
        assert_eq!(machine.sync(), (vec![5], NONE));
    }
}
