// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Members of a log that reads bitmaps: their bits are left.

use std::cell::Cell;

use kvm_dirty_ring::WorkingSet;
use kvm_dirty_ring::sim::BitmapFault;

use super::machine::{Machine, NONE};

#[test]
fn what_two_syncs_find_stays_open() {
    let mut machine = Machine::with_bitmap(true);
    let mut round = |written: &[u64], members: &[u64], others: &[u64]| {
        machine.write(written.iter().copied());
        assert_eq!(machine.sync(), (members.to_vec(), others.to_vec()));
    };
    round(&[0, 1, 2], &[], &[0, 1, 2]);
    round(&[1, 2, 3], &[1, 2], &[3]);
    round(&[3, 9], &[1, 2, 3], &[9]);
    round(&[0], &[1, 2, 3], &[0]);
    round(&[9], &[1, 2, 3], &[9]);
    let called = Cell::new(false);
    let refreshed = machine.log.refresh(|_| {
        called.set(true);
        Ok(())
    });
    assert_eq!((refreshed.unwrap(), called.get()), (1, false));
    assert_eq!(machine.sync(), (NONE, vec![1, 2, 3]));
}

/// The refresh has cleared their bits, and the sync after it has reported them: that is one of the two times.
#[test]
fn what_a_refresh_has_closed_joins_when_it_is_written_again() {
    let mut machine = Machine::with_members([1, 2, 3, 4]);
    machine.log.refresh(|_| Ok(())).unwrap();
    machine.write([1]);
    assert_eq!(machine.sync(), (vec![1], vec![2, 3, 4]));
    machine.write([2]);
    assert_eq!(machine.sync(), (vec![1, 2], NONE));
    // Like any other page from now on.
    machine.write([3]);
    assert_eq!(machine.sync(), (vec![1, 2], vec![3]));
    machine.write([4]);
    assert_eq!(machine.sync(), (vec![1, 2], vec![4]));
    machine.write([4]);
    assert_eq!(machine.sync(), (vec![1, 2, 4], NONE));
}

/// That is what members are for: their pages stay writable.
#[test]
fn bits_of_members_are_left() {
    let mut machine = Machine::with_members([5]);
    machine.write([6]);
    for _ in 0..2 {
        assert_eq!(machine.sync().0, [5]);
        assert_eq!(machine.kernel_bits(), [5], "they were cleared");
    }
}

#[test]
fn without_manual_protection_there_are_none() {
    let mut machine = Machine::with_bitmap(false);
    for _ in 0..4 {
        machine.write([3]);
        assert_eq!(machine.sync(), (NONE, vec![3]));
    }
}

#[test]
fn what_could_not_be_cleared_does_not_join() {
    let mut machine = Machine::with_bitmap(true);
    machine.write(0..100);
    let fault = BitmapFault {
        after: 0,
        error: libc::ENOMEM,
    };
    machine.vm.inject_bitmap([fault]);
    machine.log.sync(&mut machine.dirty).unwrap_err();
    assert_eq!(machine.sync(), (NONE, (0..100).collect()));
    machine.write([7]);
    assert_eq!(machine.sync(), (vec![7], NONE));
}

/// An earlier migration has found them. Since then every sync has taken all bits.
#[test]
fn what_was_cleared_long_ago_does_not_join() {
    let mut machine = Machine::with_bitmap(true);
    machine.write(0..50);
    machine.sync();
    machine.log.set_working_set(None);
    machine.sync();
    machine.set_places(0);
    machine.write(0..50);
    assert_eq!(machine.sync(), (NONE, (0..50).collect()));
}

#[test]
fn no_more_join_than_the_vmm_allows() {
    let mut machine = Machine::with_bitmap(true);
    machine
        .log
        .set_working_set(Some(WorkingSet::new(0).at_most(3)));
    for _ in 0..3 {
        machine.write([0, 64, 128, 192, 256]);
        machine.sync();
    }
    assert_eq!(machine.set().members, 3);
}
