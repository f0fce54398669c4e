// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Resets that go wrong, with others under way.

use super::kernel::{Copy, Fault, Machine};
use super::model;
use crate::DirtyPages;
use crate::error::FullError;
use crate::sync::thread;

/// A reset stops half-way while a guest writes and a reaper works: the pages it left unprotected
/// are reported by every sync.
#[test]
fn short_reset_beside_a_guest() {
    model(3, || {
        let machine = Machine::with_faults(1, 2, vec![Some(Fault::Short)]);
        let log = machine.log(2);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        machine.write(0, 0, 1);
        machine.write(0, 1, 1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        let guest = thread::spawn({
            let machine = machine.clone();
            move || machine.write(0, 0, 2)
        });
        reaper.join().unwrap();
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
        assert_eq!(log.stats().short_resets, 1);
    });
}

/// A reset stops after the last entry and before it has protected the pages of that entry's batch, while a guest
/// writes and a reaper works. The count is whole. Only the stop of the thread shows it.
#[test]
fn reset_cut_short_at_its_end_beside_a_guest() {
    model(3, || {
        let machine = Machine::with_faults(2, 2, vec![Some(Fault::AtEnd)]);
        let log = machine.log(2);
        let _rings = [0, 1].map(|vcpu| log.attach_ring(machine.ring(vcpu).memory()).unwrap());
        machine.write(0, 0, 1);
        machine.write(1, 1, 1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        let guest = thread::spawn({
            let machine = machine.clone();
            move || machine.write(1, 1, 2)
        });
        reaper.join().unwrap();
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
        let stats = log.stats();
        assert_eq!((stats.short_resets, stats.doubtful_resets), (0, 1));
    });
}

/// A full vCPU's reset stops half-way while a reaper harvests: what it recycled and left
/// unprotected are the reaper's entries, which the count must not take for the vCPU's own.
#[test]
fn short_reset_beside_a_harvest() {
    model(2, || {
        let machine = Machine::with_faults(2, 2, vec![Some(Fault::Short)]);
        let log = machine.log(2);
        let [_ring, mut ring] =
            [0, 1].map(|vcpu| log.attach_ring(machine.ring(vcpu).memory()).unwrap());
        machine.write(0, 0, 1);
        machine.write(1, 1, 1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        match ring.on_full() {
            // Were a reset to recycle the reaper's entries alone, that would be no room for a vCPU without
            // patience. What this is about is what happens to pages.
            Ok(()) | Err(FullError::NoRoom { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        reaper.join().unwrap();
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        machine.write(0, 0, 2);
        machine.write(1, 1, 2);
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// A reaper's reset fails: its pages come with the sync whose reset succeeds.
#[test]
fn failed_reset_keeps_its_pages() {
    model(4, || {
        let machine = Machine::with_faults(1, 1, vec![Some(Fault::Error)]);
        let log = machine.log(2);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        machine.write(0, 0, 1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().is_err()
        });
        let mut dirty = DirtyPages::new();
        let mut copy = Copy::new(&machine);
        // The failure may hit either, or both.
        if log.sync(&mut dirty).is_ok() {
            copy.take(&machine, &dirty);
        }
        reaper.join().unwrap();
        machine.write(0, 0, 2);
        copy.round(&machine, &log);
        copy.verify(&machine);
        assert_eq!(log.stats().failed_resets, 1);
    });
}
