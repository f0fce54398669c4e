// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Onlookers see how full a ring is, and nobody notices them.

use super::kernel::{Copy, Machine};
use super::model;
use crate::log::DirtyLog;
use crate::sync::thread;

/// What the vCPU has logged so far, as an onlooker sees it.
fn logged(log: &DirtyLog) -> u64 {
    let mut rings = Vec::new();
    log.observe(&mut rings);
    rings[0].taken + rings[0].waiting
}

/// A guest logs two pages, a reaper takes them, an onlooker looks twice: what it sees never shrinks
/// and never exceeds what was logged, wherever the others are, and no page is lost to it.
#[test]
fn an_onlooker_beside_a_guest_and_a_reaper() {
    model(3, || {
        let machine = Machine::new(1, 2);
        let log = machine.log(1);
        let _ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        let guest = thread::spawn({
            let machine = machine.clone();
            move || {
                assert!(machine.write(0, 0, 1));
                assert!(machine.write(0, 1, 1));
            }
        });
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let first = logged(&log);
        let second = logged(&log);
        assert!(
            first <= second,
            "entries were seen and then not: {first}, {second}"
        );
        assert!(
            second <= 2,
            "entries were seen that nobody logged: {second}"
        );
        guest.join().unwrap();
        reaper.join().unwrap();
        assert_eq!(logged(&log), 2);
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// One pass may recycle what another one has harvested: by then the other has to have published it.
#[test]
fn an_onlooker_beside_two_passes() {
    model(3, || {
        let machine = Machine::new(1, 1);
        let log = machine.log(2);
        let mut ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        assert!(machine.write(0, 0, 1));
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        // It has the entries reset, whichever thread harvested them. Other models check that it makes room.
        let full_exit = thread::spawn(move || drop(ring.on_full()));
        assert_eq!(logged(&log), 1, "entries were seen and then not");
        reaper.join().unwrap();
        full_exit.join().unwrap();
    });
}

/// `at_least` speaks of entries that were there when it looked: once true, it stays true for a ring
/// that only fills.
#[test]
fn at_least_beside_a_guest() {
    model(5, || {
        let machine = Machine::new(1, 2);
        let log = machine.log(1);
        let ring = log.attach_ring(machine.ring(0).memory()).unwrap();
        let guest = thread::spawn({
            let machine = machine.clone();
            move || {
                machine.write(0, 0, 1);
                machine.write(0, 1, 1);
            }
        });
        if ring.at_least(2) {
            assert!(ring.at_least(1) && ring.occupancy() == 2);
        }
        assert!(!ring.at_least(3));
        guest.join().unwrap();
        assert!(ring.at_least(2) && !ring.at_least(3));
        assert_eq!(ring.occupancy(), 2);
    });
}
