// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Slots whose tracking starts and stops while the guest runs.

use super::kernel::{Copy, Machine, SLOT, State};
use super::model;
use crate::sync::{Arc, thread};
use crate::{DirtyLog, VcpuRing};

/// A machine with one vCPU, and its log.
fn machine() -> (Arc<Machine>, DirtyLog, VcpuRing) {
    let machine = Machine::new(1, 1);
    let log = machine.log(1);
    let ring = log.attach_ring(machine.ring(0).memory()).unwrap();
    (machine, log, ring)
}

fn write(machine: &Arc<Machine>, value: u64) -> thread::JoinHandle<()> {
    let machine = Arc::clone(machine);
    thread::spawn(move || assert!(machine.write(0, 0, value)))
}

/// The VMM switches logging off.
fn stop(machine: &Machine, log: &DirtyLog) {
    let off = || {
        machine.switch(SLOT, State::Unlogged);
        Ok(())
    };
    log.stop_tracking(SLOT, off).unwrap();
}

/// A start beside a guest and a migration, which may sync at any time: what was written when nothing was
/// logged yet is copied after it.
#[test]
fn start_beside_a_guest_and_a_sync() {
    model(2, || {
        let (machine, log, _ring) = machine();
        stop(&machine, &log);
        let guest = write(&machine, 1);
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || {
                let on = || {
                    machine.switch(SLOT, State::Armed);
                    Ok(())
                };
                log.start_tracking(SLOT, on).unwrap();
            }
        });
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        vmm.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

/// A stop beside a guest and a migration: every sync that begins when writes are no longer logged
/// reports the page.
#[test]
fn stop_beside_a_guest_and_a_sync() {
    model(2, || {
        let (machine, log, _ring) = machine();
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || stop(&machine, &log)
        });
        let guest = write(&machine, 1);
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
        vmm.join().unwrap();
    });
}
