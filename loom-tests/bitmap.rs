// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bitmap mode: the kernel's bits are taken by several at once.

use super::kernel::{Copy, Machine, SLOT};
use super::model;
use crate::sync::{Arc, Mutex, lock, thread};
use crate::{DirtyLog, DirtyPages};

/// A guest writes a page again and again while a migration syncs and copies.
#[test]
fn sync_beside_a_guest() {
    model(4, || {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        let guest = thread::spawn({
            let machine = machine.clone();
            move || {
                machine.write_page(0, 1);
                machine.write_page(0, 2);
            }
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// The guest has stopped. A removal has taken its page from the kernel when the last sync asks for it.
#[test]
fn last_sync_beside_a_removal() {
    model(4, || {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        machine.write_page(0, 1);
        let removal = thread::spawn({
            let log = log.clone();
            move || log.retire_slot(SLOT).unwrap()
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        copy.verify(&machine);
        drop(removal.join().unwrap());
    });
}

/// The VMM deletes the slot in KVM as soon as its removal has begun: a sync does not take its bits for
/// missing, and all of its pages for dirty.
#[test]
fn sync_beside_a_deletion() {
    model(4, || {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        let removal = thread::spawn({
            let (log, machine) = (log.clone(), machine.clone());
            move || {
                let retired = log.retire_slot(SLOT).unwrap();
                machine.delete_slot(SLOT);
                retired
            }
        });
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        drop(removal.join().unwrap());
        assert_eq!(log.stats().missing_bitmaps, 0, "a bitmap was missed");
        assert!(dirty.is_empty(), "clean pages are dirty");
    });
}

/// The guest goes on, beside a sync and a removal: what the removal has taken, and the sync before it
/// is protected again must not be reported, is in the copy when all is over.
#[test]
fn sync_beside_a_guest_and_a_removal() {
    model(3, || {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        machine.write_page(0, 1);
        let removal = thread::spawn({
            let log = log.clone();
            move || log.retire_slot(SLOT).unwrap()
        });
        let guest = thread::spawn({
            let machine = machine.clone();
            move || machine.write_page(0, 2)
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
        drop(removal.join().unwrap());
    });
}

/// Two syncs beside each other: what the one is given the other is not, and together they get all.
#[test]
fn two_syncs() {
    model(3, || {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        machine.write_page(0, 1);
        let found = Arc::new(Mutex::new(0));
        let sync = |log: &DirtyLog, found: &Mutex<u64>| {
            let mut dirty = DirtyPages::new();
            log.sync(&mut dirty).unwrap();
            *lock(found) += dirty.page_count();
        };
        let other = thread::spawn({
            let (log, found) = (log.clone(), Arc::clone(&found));
            move || sync(&log, &found)
        });
        sync(&log, &found);
        other.join().unwrap();
        assert_eq!(*lock(&found), 1, "a page was lost, or came twice");
    });
}

/// A slot is removed and another gets its id beside a sync that knows the old one: what the guest
/// writes in the new one is not given to the old one.
#[test]
fn slot_id_reused_beside_a_sync() {
    model(3, || {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        let found = |log: &DirtyLog| {
            let mut dirty = DirtyPages::new();
            log.sync(&mut dirty).unwrap();
            dirty.page_count()
        };
        let beside = thread::spawn({
            let log = log.clone();
            move || found(&log)
        });
        let retired = log.retire_slot(SLOT).unwrap();
        // Here the VMM deletes the slot in KVM.
        log.finish_slot(&retired).unwrap();
        log.add_slot(SLOT, 1).unwrap();
        // Here it creates the new one, in which the guest writes.
        machine.write_page(0, 1);
        let later = found(&log);
        assert_eq!(
            beside.join().unwrap() + later,
            1,
            "landed in the slot before"
        );
    });
}
