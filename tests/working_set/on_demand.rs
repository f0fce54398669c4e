// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Syncs whose pages are protected when they are read.

use kvm_dirty_ring::OnDemand;

use super::machine::{Machine, NONE, RAM, all_but, pages};

/// The pages of the next chunk, of at most so many; `None` at the end.
fn chunk(found: &mut OnDemand, pages_at_most: u64) -> Option<Vec<u64>> {
    found.next_chunk(pages_at_most).unwrap().map(pages)
}

/// A machine with a bitmap, which leaves no page open.
fn machine() -> Machine {
    let machine = Machine::with_bitmap(true);
    machine.log.set_working_set(None);
    machine
}

/// Each chunk is protected when its turn comes: what is written before that is in it, and costs nothing.
#[test]
fn a_chunk_is_protected_at_a_time() {
    let mut machine = machine();
    machine.write([3, 70, 200]);
    machine.log.mark_dirty(RAM, 71, 1).unwrap();
    let mut found = machine.log.sync_on_demand().unwrap();
    assert_eq!(found.page_count(), 4);
    assert_eq!(chunk(&mut found, 64), Some(vec![3]));
    // One is protected by now, the other not yet.
    machine.write([3, 70]);
    assert_eq!(chunk(&mut found, 1), Some(vec![70, 71]));
    // Called off: the rest comes with the next sync.
    drop(found);
    assert_eq!(machine.sync(), (NONE, vec![3, 200]));
}

/// It has no bits to be cleared.
#[test]
fn a_slot_whose_log_is_stopped_meanwhile_is_read_all_the_same() {
    let mut machine = machine();
    machine.write([6]);
    let mut found = machine.log.sync_on_demand().unwrap();
    machine.track(false);
    assert_eq!(chunk(&mut found, 64), Some(vec![6]));
    drop(found);
    machine.track(true);
    assert_eq!(machine.sync(), (NONE, all_but(&[])));
}

/// Another slot has its id by then.
#[test]
fn a_slot_that_is_gone_is_left_out() {
    let mut machine = machine();
    machine.write([5]);
    let mut found = machine.log.sync_on_demand().unwrap();
    machine.replace_ram(300);
    machine.write([5]);
    assert_eq!(chunk(&mut found, 64), None);
    drop(found);
    assert_eq!(machine.sync(), (NONE, vec![5]));
}

#[test]
fn rings_and_bitmaps_without_manual_protection_have_protected_all() {
    let machine = Machine::with_bitmap(false);
    machine.write([9]);
    let mut found = machine.log.sync_on_demand().unwrap();
    assert_eq!(chunk(&mut found, 64), Some(vec![9]));
    assert_eq!(chunk(&mut found, 64), None);

    let machine = Machine::with_rings(1);
    machine.write([4, 5, 299]);
    let mut found = machine.log.sync_on_demand().unwrap();
    assert_eq!(pages(found.members()), [4]);
    assert_eq!(chunk(&mut found, u64::MAX), Some(vec![5, 299]));
    assert_eq!(chunk(&mut found, 64), None);
}

/// A chunk has no members, so it must not clear their bits either: by then a refresh may have closed them, and a sync reported them.
#[test]
fn a_chunk_clears_no_bit_of_a_page_that_it_lacks() {
    for tracking_is_switched in [false, true] {
        let mut machine = Machine::with_members([5]);
        machine.log.set_working_set(None);
        machine.write([5, 6]);
        let mut found = machine.log.sync_on_demand().unwrap();
        if tracking_is_switched {
            machine.track(false);
            machine.track(true);
        } else {
            machine.refresh();
        }
        machine.sync();
        machine.write([5]);
        let mut chunks = Vec::new();
        while let Some(chunk) = found.next_chunk(64).unwrap() {
            chunks.extend(pages(chunk));
        }
        assert!(!chunks.contains(&5), "the test's premise");
        assert!(machine.last_sync().contains(&5), "it was lost");
        assert_eq!(machine.sync(), (NONE, vec![5]));
    }
}

/// What was found, and not read, was not cleared: it is no page that comes again.
#[test]
fn what_no_chunk_had_does_not_join() {
    let mut machine = Machine::with_bitmap(true);
    machine.write(0..300);
    let mut found = machine.log.sync_on_demand().unwrap();
    assert_eq!(chunk(&mut found, 64), Some((0..64).collect()));
    drop(found);
    machine.write([3]);
    let found = machine.log.sync_on_demand().unwrap();
    assert_eq!(pages(found.members()), [3], "read, and written again");
    drop(found);
    assert_eq!(machine.sync().0, [3]);
    machine.write([100]);
    assert_eq!(machine.sync(), (vec![3, 100], NONE), "cleared by the sync");
}
