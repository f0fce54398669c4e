// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes that no vCPU logs.

use super::kernel::{Copy, Machine, SLOT};
use super::model;
use crate::sync::thread;

/// `devices` write a page each and mark it, while a migration syncs and copies.
fn devices_beside_a_sync(devices: usize, preemptions: usize) {
    model(preemptions, move || {
        let machine = Machine::new(0, devices);
        let log = machine.log(1);
        let writers: Vec<_> = (0..devices)
            .map(|page| {
                let (machine, log) = (machine.clone(), log.clone());
                thread::spawn(move || {
                    machine.device_write(page, 7);
                    log.mark_dirty(SLOT, page as u64, 1).unwrap();
                })
            })
            .collect();
        let mut copy = Copy::new(&machine);
        copy.round(&machine, &log);
        for writer in writers {
            writer.join().unwrap();
        }
        copy.round(&machine, &log);
        copy.verify(&machine);
    });
}

#[test]
fn device_write_beside_a_sync() {
    devices_beside_a_sync(1, 4);
}

/// Both pages' bits are in one word, under one touched-flag.
#[test]
fn two_device_writes_beside_a_sync() {
    devices_beside_a_sync(2, 3);
}
