// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Members are closed, and what becomes of them if that fails.

use std::io;
use std::num::NonZeroU64;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::BitmapFault;

use super::machine::{Machine, NONE, RAM, ROM, all_but};

#[test]
fn a_refresh_reports_members_once_more_and_protects_them() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..3);
    machine.sync();
    machine.write(1..2);
    assert_eq!(machine.refresh(), 1, "the other slot has none");
    let set = machine.set();
    assert_eq!((set.members, set.closed, set.refreshes), (0, 3, 1));
    assert_eq!(machine.sync(), (NONE, vec![0, 1, 2]));
    assert_eq!(machine.sync(), (NONE, NONE));
    machine.set_places(0);
    machine.write(2..3);
    assert_eq!(machine.sync(), (NONE, vec![2]));
    assert_eq!(machine.sync(), (NONE, NONE));
}

/// There is no free place, and one write is enough: as a member the page was written before.
#[test]
fn what_a_refresh_has_closed_joins_when_it_is_written_again() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..4);
    machine.sync();
    machine.set_places(0);
    machine.refresh();
    machine.write([0, 10]);
    assert_eq!(machine.sync(), (vec![0], vec![1, 2, 3, 10]));
    machine.write([1, 11]);
    assert_eq!(machine.sync(), (vec![0, 1], vec![11]));
    // Like any other page from now on.
    machine.write([2]);
    assert_eq!(machine.sync(), (vec![0, 1], vec![2]));
    machine.write([3]);
    machine.log.reap().unwrap();
    machine.write([3]);
    assert_eq!(machine.sync(), (vec![0, 1, 3], NONE));
}

#[test]
fn how_many_of_the_closed_are_back_is_counted() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..4);
    machine.sync();
    machine.refresh();
    machine.sync();
    machine.write(2..6);
    machine.sync();
    let set = machine.set();
    assert_eq!((set.members, set.last_closed, set.back), (4, 4, 2));
}

/// A pass that is in flight when a refresh begins lets pages join in the middle of it.
#[test]
fn what_joins_while_members_are_closed_stays_one() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..1);
    machine.sync();
    let refreshed = machine.log.refresh(|slot| {
        machine.protect(slot)?;
        // A VMM that closes them by other means need not stop its vCPUs.
        machine.write([0]);
        machine.log.reap().unwrap();
        Ok(())
    });
    assert_eq!(refreshed.unwrap(), 1);
    assert_eq!(machine.sync(), (vec![0], NONE), "it is open again");
    assert_eq!(machine.sync(), (vec![0], NONE));
}

#[test]
fn switched_off_members_stay_and_a_refresh_is_owed() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..2);
    machine.sync();
    machine.log.set_working_set(None);
    assert!(machine.set().refresh_owed);
    machine.write(3..4);
    assert_eq!(machine.sync(), (vec![0, 1], vec![3]));
    machine.refresh();
    assert!(!machine.set().refresh_owed);
    assert_eq!(machine.sync(), (NONE, vec![0, 1]));
    assert_eq!(machine.sync(), (NONE, NONE));
}

/// The pages of a slot that could not be protected are suspect, and its members stay members.
#[test]
fn a_failed_refresh_keeps_members() {
    let mut machine = Machine::with_rings(2);
    machine.write([5, 6]);
    machine.sync();
    let fail = |_| Err(io::Error::from_raw_os_error(12));
    let error = machine.log.refresh(fail).unwrap_err();
    assert!(
        matches!(error, SlotError::Protect { slot: RAM, .. }),
        "{error}"
    );
    let set = machine.set();
    assert_eq!((set.members, set.closed, set.refreshes), (2, 0, 0));
    for _ in 0..2 {
        assert_eq!(machine.sync(), (NONE, all_but(&[])));
    }
    assert_eq!(machine.refresh(), 1);
    let set = machine.set();
    assert_eq!((set.members, set.closed, set.refreshes), (0, 2, 1));
    assert_eq!(machine.sync(), (NONE, all_but(&[])));
    assert_eq!(machine.sync(), (NONE, NONE));
}

/// A refresh of bits that fails half-way has cleared the first and not the second: both stay members.
#[test]
fn a_failed_clearing_keeps_members() {
    let mut machine = Machine::with_members([5, 6]);
    machine.vm.inject_bitmap([BitmapFault {
        after: 1,
        error: 12,
    }]);
    machine
        .log
        .refresh(|_| panic!("no slot needs it"))
        .unwrap_err();
    assert_eq!(machine.kernel_bits(), [6]);
    assert_eq!(machine.set().members, 2);
    for _ in 0..2 {
        assert_eq!(machine.sync(), (vec![5, 6], NONE), "they were lost");
    }
    assert_eq!(machine.refresh(), 1);
    assert_eq!(machine.kernel_bits(), NONE);
    assert_eq!(machine.sync(), (NONE, vec![5, 6]));
    assert_eq!(machine.sync(), (NONE, NONE));
}

/// A refresh is owed while there are members that no rule lets go, and not longer.
#[test]
fn a_refresh_is_owed_only_while_there_are_members_and_none_may_join() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..5);
    machine.sync();
    machine.log.set_working_set(None);
    assert!(machine.set().refresh_owed);
    machine.set_places(10);
    assert!(!machine.set().refresh_owed, "they may join again");
    machine.log.set_dirty_limits(NonZeroU64::new(1000)).unwrap();
    assert!(machine.set().refresh_owed);
    machine.log.set_dirty_limits(None).unwrap();
    assert!(!machine.set().refresh_owed, "the limit was lifted");
    machine.log.set_working_set(None);
    machine.track(false);
    machine.track(true);
    assert!(!machine.set().refresh_owed, "their membership has ended");
}

/// The VMM has protected the slot itself, and calls `rearmed`.
#[test]
fn rearmed_ends_membership() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..3);
    machine.sync();
    machine.vm.rearm_slot(RAM);
    machine.log.rearmed(RAM).unwrap();
    assert_eq!(machine.set().members, 0);
    assert_eq!(machine.sync(), (NONE, vec![0, 1, 2]));
    assert_eq!(machine.sync(), (NONE, NONE));
}

/// So that `Convergence` can still judge by it.
#[test]
fn a_failed_refresh_keeps_what_the_last_one_has_closed() {
    let mut machine = Machine::with_rings(10);
    machine.write(0..4);
    machine.vcpu.write(ROM, 0).unwrap();
    machine.sync();
    machine.refresh();
    machine.sync();
    machine.write(0..4);
    machine.sync();
    let set = machine.set();
    assert_eq!((set.last_closed, set.back), (5, 4));
    let fail = |_| Err(io::Error::from_raw_os_error(12));
    machine.log.refresh(fail).unwrap_err();
    let set = machine.set();
    assert_eq!((set.last_closed, set.back), (5, 4));
    // One that succeeds counts alone, in slots without members, too.
    machine.refresh();
    let set = machine.set();
    assert_eq!((set.last_closed, set.back), (4, 0));
}
