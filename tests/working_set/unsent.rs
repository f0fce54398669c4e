// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that a sync has returned and that could not be sent.

use kvm_dirty_ring::{DirtyPages, SlotId};

use super::machine::{Machine, NONE, RAM, ROM, pages};

#[test]
fn what_was_not_sent_is_merged_or_given_back() {
    let mut machine = Machine::with_rings(2);
    machine.write(0..5);
    machine.sync();
    let unsent = std::mem::take(&mut machine.dirty);
    machine.refresh();
    machine.set_places(1);
    machine.write(4..5);
    machine.vcpu.write(ROM, 9).unwrap();
    machine.sync();
    assert!(machine.dirty.merge(&unsent));
    assert_eq!(machine.found(), (vec![], vec![0, 1, 2, 3, 4, 9]));
    assert_eq!(pages(machine.dirty.part()), [0, 1, 2, 3, 4, 9]);

    // Some of it is sent, the rest given back.
    machine.dirty.remove(RAM, 1, 2);
    machine.dirty.remove(RAM, 4, u64::MAX);
    machine.dirty.remove(SlotId::new(7, 7), 0, 1);
    machine.log.put_back(&machine.dirty).unwrap();
    let all = (vec![4], vec![0, 3, 9]);
    assert_eq!(machine.sync(), all, "a member comes in any case");
    assert_eq!(machine.sync(), (vec![4], NONE));
    // Into one that has no slots yet.
    let mut empty = DirtyPages::new();
    assert!(empty.merge(&unsent));
    assert_eq!(pages(empty.others()), [0, 1, 2, 3, 4]);
}
