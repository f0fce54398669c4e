// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Members of slots that go, and of slots whose tracking stops and starts.

use std::io;

use kvm_dirty_ring::error::SlotError;

use super::machine::{Machine, NONE, RAM, ROM, all_but};

/// Its last sync is the only chance to send them.
#[test]
fn members_of_a_slot_that_goes_are_others() {
    let mut machine = Machine::with_rings(10);
    machine.write([5, 6]);
    machine.vcpu.write(ROM, 7).unwrap();
    machine.sync();
    let retired = machine.log.retire_slot(RAM).unwrap();
    assert_eq!(machine.sync(), (vec![7], vec![5, 6]));
    assert_eq!(machine.set().members, 1, "it holds places");
    // It is kept after all, and they are open still.
    machine.log.keep_slot(&retired).unwrap();
    machine.write([5]);
    assert_eq!(machine.sync(), (vec![5, 6, 7], NONE));
    // Another slot with its id has none.
    machine.replace_ram(300);
    assert_eq!(machine.sync(), (vec![7], NONE));
}

/// The log may be on already, and then nothing is protected.
#[test]
fn a_start_of_what_is_tracked_keeps_members() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    machine.log.start_tracking(RAM, || Ok(())).unwrap();
    assert_eq!(machine.sync(), (vec![5], all_but(&[5])));
    machine.write([5]);
    assert_eq!(machine.sync(), (vec![5], NONE), "it was lost");
}

/// A stop ends membership, because the start that follows protects every page.
#[test]
fn a_stop_ends_membership() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    machine.track(false);
    assert_eq!(machine.set().members, 0);
    machine.track(true);
    assert_eq!(machine.sync(), (NONE, all_but(&[])));
    machine.log.set_working_set(None);
    machine.write([5]);
    assert_eq!(machine.sync(), (NONE, vec![5]));
    assert_eq!(machine.sync(), (NONE, NONE));
}

/// A stop that fails may have left the log on, so the start that follows may protect nothing.
#[test]
fn a_failed_stop_keeps_members() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    let fail = || Err(io::Error::from_raw_os_error(12));
    let failed = machine.log.stop_tracking(RAM, fail);
    assert!(matches!(failed, Err(SlotError::Switch { .. })));
    assert_eq!(machine.set().members, 1);
    assert_eq!(machine.sync(), (NONE, all_but(&[])), "not tracked");
    machine.log.start_tracking(RAM, || Ok(())).unwrap();
    machine.sync();
    machine.write([5]);
    assert_eq!(machine.sync(), (vec![5], NONE), "it was lost");
}

/// A start or stop of tracking forgets what the sync before has cleared.
#[test]
fn a_slot_whose_log_was_switched_starts_anew() {
    let mut machine = Machine::with_bitmap(true);
    machine.write([3]);
    machine.sync();
    machine.track(false);
    machine.track(true);
    machine.write([3]);
    assert_eq!(machine.sync(), (NONE, all_but(&[])));
}

/// Entries of a slot that is not tracked, or that goes, let no page join: a start of tracking closes nothing that it does not have to.
#[test]
fn no_page_joins_of_a_slot_that_is_not_tracked_or_that_goes() {
    let mut machine = Machine::with_rings(10);
    machine.write([5]);
    machine.track(false);
    machine.sync();
    assert_eq!(machine.set().members, 0, "it is not tracked");
    machine.track(true);
    machine.sync();
    let retired = machine.log.retire_slot(RAM).unwrap();
    machine.write([6]);
    machine.sync();
    machine.log.keep_slot(&retired).unwrap();
    assert_eq!(machine.set().members, 0, "it goes");
}
