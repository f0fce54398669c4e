// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A last sync takes nothing: it can be called off.

use kvm_dirty_ring::LastPages;
use kvm_dirty_ring::sim::ResetFault;

use super::machine::{Machine, NONE, RAM, ROM};

/// Pages in a shard, in the ring, of members, marked by devices, and those of a sync that failed: a last sync has all of
/// them, again and again, and so has the sync that follows, which protects them.
#[test]
fn it_takes_nothing() {
    let mut machine = Machine::with_rings(1);
    machine.write([1, 2]);
    machine.log.reap().unwrap();
    machine.vm.inject([ResetFault::Error(12)]);
    machine.write([3]);
    machine.log.reap().unwrap_err();
    machine.write([1, 4]);
    machine.log.mark_dirty(RAM, 5, 1).unwrap();
    machine.log.mark_dirty(ROM, 7, 1).unwrap();
    let resets = machine.stats().resets;
    // There would be places.
    machine.set_places(10);
    let mut last = LastPages::new();
    for _ in 0..2 {
        assert_eq!(machine.last_sync(), [1, 2, 3, 4, 5, 7], "some were taken");
        machine.log.last_sync(&mut last).unwrap();
        let has_all = last.contains(ROM, 7) && last.contains(RAM, 1);
        assert!(has_all, "some were taken");
    }
    assert_eq!(machine.stats().resets, resets, "pages were protected");
    assert_eq!(machine.set().joined, 1, "pages were left open");
    machine.set_places(1);
    assert_eq!(machine.sync(), (vec![1], vec![2, 3, 4, 5, 7]));
    machine.write([2, 3, 4]);
    assert_eq!(machine.sync(), (vec![1], vec![2, 3, 4]));
    assert_eq!(machine.sync(), (vec![1], NONE));
}

/// Nor what a refresh has closed, and no sync has reported yet.
#[test]
fn it_takes_nothing_that_waits() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    machine.refresh();
    for _ in 0..2 {
        assert_eq!(machine.last_sync(), [5], "it was taken");
    }
    assert_eq!(machine.sync(), (NONE, vec![5]));
    assert_eq!(machine.sync(), (NONE, NONE));
}

#[test]
fn it_takes_no_bits() {
    let mut machine = Machine::with_members([5]);
    machine.write([6]);
    for _ in 0..2 {
        assert_eq!(machine.last_sync(), [5, 6], "some were taken");
    }
    assert_eq!(machine.kernel_bits(), [5, 6], "they were cleared");
    assert_eq!(machine.sync(), (vec![5], vec![6]));
    assert_eq!(machine.sync(), (vec![5], NONE));
}

/// Without manual protection a reading clears the bits, so the log keeps them for the next sync. What a last sync found
/// does not count as one of the two syncs that make a member.
#[test]
fn bits_come_again_with_the_next_sync() {
    for manual_protect in [true, false] {
        let mut machine = Machine::with_bitmap(manual_protect);
        machine.write(3..6);
        for _ in 0..2 {
            assert_eq!(machine.last_sync(), [3, 4, 5]);
        }
        machine.write([4]);
        assert_eq!(machine.sync(), (NONE, vec![3, 4, 5]));
        assert_eq!(machine.sync(), (NONE, NONE));
    }
}
