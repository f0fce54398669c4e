// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Slots that come and go while passes run.

use super::kernel::{ENTRIES, Machine, SLOT};
use super::model;
use crate::bitmap::shared::SharedBits;
use crate::sync::{Arc, thread};
use crate::{DirtyPages, SlotId};

/// A slot is removed and another gets its id while a reaper is under way: the page that the guest
/// writes in the new slot is reported, whichever layout the reaper works on.
#[test]
fn slot_id_reused_beside_a_reaper() {
    model(3, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(2);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let retired = log.retire_slot(SLOT).unwrap();
        // Here the VMM deletes the slot in KVM.
        log.finish_slot(&retired).unwrap();
        log.add_slot(SLOT, 1).unwrap();
        // Here it creates the new one, in which the guest writes.
        machine.write(0, 0, 1);
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        assert!(dirty.contains(SLOT, 0), "landed in the slot before");
        reaper.join().unwrap();
    });
}

/// What the guest wrote in the old slot is not reported of the new one.
#[test]
fn stale_entries_do_not_alias() {
    model(3, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(2);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        machine.write(0, 0, 1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let retired = log.retire_slot(SLOT).unwrap();
        machine.write(0, 0, 2);
        log.finish_slot(&retired).unwrap();
        log.add_slot(SLOT, 1).unwrap();
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        assert!(dirty.is_empty(), "an entry of the slot before");
        reaper.join().unwrap();
    });
}

/// Bits go from a finished slot to a new one, beside a sync that may know the old one: what a device
/// writes from then on is reported of the new slot.
#[test]
fn bits_pass_to_another_slot_beside_a_sync() {
    model(3, || {
        let log = Machine::new(0, 1).log(1);
        let (old, new) = (SlotId::new(0, 1), SlotId::new(0, 2));
        let bits = Arc::new(SharedBits::new(1).unwrap());
        log.add_slot_on(old, 1, &bits).unwrap();
        let sync = move |log: &crate::DirtyLog| {
            let mut dirty = DirtyPages::new();
            log.sync(&mut dirty).unwrap();
            dirty.contains(new, 0)
        };
        let beside = thread::spawn({
            let log = log.clone();
            move || sync(&log)
        });
        let retired = log.retire_slot(old).unwrap();
        log.finish_slot(&retired).unwrap();
        log.add_slot_on(new, 1, &bits).unwrap();
        bits.set(0, 1);
        let later = sync(&log);
        let beside = beside.join().unwrap();
        assert!(beside || later, "landed in the slot before");
    });
}

/// An entry that names a page past its slot's end is marked beside a rearming, and the guest writes on. As long
/// as it waits for its reset, which will forget what else is in its batch, the slot is suspect.
#[test]
fn rearmed_beside_an_entry_past_the_end() {
    model(3, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(2);
        let mut ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        // So that the guest fills the entry that is looked at first.
        for round in 1..u64::from(ENTRIES) {
            machine.write(0, 0, round);
            log.reap().unwrap();
        }
        machine.ring(0).push(SLOT.raw(), 1);
        let guest = thread::spawn(move || {
            ring.harvest_and_stop();
            machine.write(0, 0, 9)
        });
        log.rearmed(SLOT).unwrap();
        guest.join().unwrap();
        assert_eq!(log.stats().suspect_pages, 1, "it was forgiven");
    });
}
