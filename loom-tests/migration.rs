// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that writes, others that harvest, a migration that copies: nothing may be lost.

use super::kernel::{Copy, Machine};
use super::model;
use crate::sync::thread;

/// The heart of it: the guest writes a page again and again while a migration syncs and copies.
#[test]
fn sync_beside_a_guest() {
    model(5, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(1);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        let guest = thread::spawn({
            let machine = machine.clone();
            move || {
                machine.write(0, 0, 1);
                machine.write(0, 0, 2);
            }
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// A reaper has harvested and not reset yet when the last sync is called: the sync waits for it.
#[test]
fn sync_beside_a_reaper() {
    model(5, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(2);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        machine.write(0, 0, 1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        copy.verify(&machine);
        reaper.join().unwrap();
        drop(log);
    });
}

/// Guest, reaper and migration at once.
#[test]
fn sync_beside_a_guest_and_a_reaper() {
    model(3, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(2);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        let guest = thread::spawn({
            let machine = machine.clone();
            move || {
                machine.write(0, 0, 1);
                machine.write(0, 0, 2);
            }
        });
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        // With the vCPUs stopped, one sync is enough, whatever the reaper is at.
        copy.round(&machine, &log);
        copy.verify(&machine);
        reaper.join().unwrap();
    });
}

/// Two vCPUs write the same page, each into its own ring.
#[test]
fn sync_beside_two_guests() {
    model(3, || {
        let machine = Machine::new(2, 1);
        let log = machine.log(1);
        let _rings = [0, 1].map(|vcpu| log.attach_ring(machine.ring(vcpu).memory()).unwrap());
        let guests = [0, 1].map(|vcpu| {
            let machine = machine.clone();
            thread::spawn(move || machine.write(vcpu, 0, 1 + vcpu as u64))
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        for guest in guests {
            guest.join().unwrap();
        }
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// A vCPU stops on its full ring, makes room itself and goes on, beside a sync.
#[test]
fn full_exit_beside_a_sync() {
    model(3, || {
        let machine = Machine::new(1, 3);
        let log = machine.log(2);
        let mut ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        let guest = thread::spawn({
            let machine = machine.clone();
            move || {
                for page in 0..3 {
                    if !machine.write(0, page, 1) {
                        ring.on_full().unwrap();
                        assert!(machine.write(0, page, 1), "still full after making room");
                    }
                }
            }
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// Two vCPUs with full rings and a migration: both make room, sharing a reset where they can.
#[test]
fn two_full_exits_beside_a_sync() {
    model(2, || {
        let machine = Machine::new(2, 6);
        let log = machine.log(2);
        let rings = [0, 1].map(|vcpu| log.attach_ring(machine.ring(vcpu).memory()).unwrap());
        for (vcpu, page) in [(0, 0), (0, 1), (1, 3), (1, 4)] {
            assert!(machine.write(vcpu, page, 1));
        }
        let mut vcpu = 0;
        let guests = rings.map(|mut ring| {
            let (machine, me) = (machine.clone(), vcpu);
            vcpu += 1;
            thread::spawn(move || {
                if !machine.write(me, 3 * me + 2, 1) {
                    ring.on_full().unwrap();
                    assert!(machine.write(me, 3 * me + 2, 1));
                }
            })
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        for guest in guests {
            guest.join().unwrap();
        }
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}
