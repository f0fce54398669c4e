// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sleeps for a dirty limit. No time goes by here: a thread that is not woken sleeps for ever, which loom
//! reports.

use core::mem::ManuallyDrop;
use core::num::NonZeroU64;

use super::kernel::Machine;
use super::model;
use crate::log::DirtyLog;
use crate::log::vcpu_ring::VcpuRing;
use crate::sync::{Arc, thread};

/// A vCPU that is some seconds ahead of its limit of a page a second.
fn debtor(entries: usize) -> (Arc<Machine>, DirtyLog, VcpuRing) {
    let machine = Machine::new(1, 3);
    let log = machine.log(1);
    let ring = log.attach_ring(machine.ring(0).memory()).unwrap();
    log.set_dirty_limits(NonZeroU64::new(1)).unwrap();
    (0..entries).for_each(|page| assert!(machine.write(0, page, 1)));
    (machine, log, ring)
}

/// The vCPU sleeps off what it owes, on its thread.
fn throttle(ring: VcpuRing) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        // Should it sleep for ever, dropping the ring would be a second panic, which hides that.
        let mut ring = ManuallyDrop::new(ring);
        ring.throttle();
        drop(ManuallyDrop::into_inner(ring));
    })
}

/// Whenever the limit is lifted, the vCPU goes on.
#[test]
fn a_limit_lifted_beside_a_sleeper() {
    model(3, || {
        let (_machine, log, ring) = debtor(2);
        let vcpu = throttle(ring);
        log.set_dirty_limits(None).unwrap();
        vcpu.join().unwrap();
    });
}

/// A stop that begins before, while or after the vCPU falls asleep, ends its sleep or keeps it from
/// it; one stop that ends does not put a vCPU to sleep that another one keeps awake.
#[test]
fn a_stop_beside_a_sleeper() {
    model(3, || {
        let (_machine, log, ring) = debtor(2);
        let vcpu = throttle(ring);
        let other = thread::spawn({
            let log = log.clone();
            move || drop(log.keep_awake())
        });
        let awake = log.keep_awake();
        vcpu.join().unwrap();
        other.join().unwrap();
        drop(awake);
    });
}

/// What a reaper takes is owed as what waits is: the vCPU sleeps until it is woken, whatever the
/// reaper has done by then.
#[test]
fn a_reaper_beside_a_debtor() {
    model(3, || {
        let (_machine, log, _ring) = debtor(1);
        let reaper = thread::spawn({
            let log = log.clone();
            move || log.reap().unwrap()
        });
        let mut kicks = 0;
        log.enforce_dirty_limits(|vcpu| {
            assert_eq!(vcpu, 0);
            kicks += 1;
        });
        assert_eq!(kicks, 1, "a debt was paid by a reaper");
        reaper.join().unwrap();
        log.enforce_dirty_limits(|_| kicks += 1);
        assert_eq!(kicks, 2, "a debt was paid by a reaper");
    });
}

/// A vCPU that is attached while all are kept awake, or limited, is one of them.
#[test]
fn a_vcpu_attached_beside_a_stop() {
    model(3, || {
        let machine = Machine::new(1, 3);
        let log = machine.log(1);
        assert!(machine.write(0, 0, 1));
        let attaching = thread::spawn({
            let (machine, log) = (machine.clone(), log.clone());
            move || log.attach_ring(machine.ring(0).memory()).unwrap()
        });
        log.set_dirty_limits(NonZeroU64::new(1)).unwrap();
        // Should the vCPU sleep, dropping these would be a second panic, which hides that.
        let awake = ManuallyDrop::new(log.keep_awake());
        let mut ring = ManuallyDrop::new(attaching.join().unwrap());
        let limit = log.stats().vcpus[0].dirty_limit;
        assert_eq!(limit, NonZeroU64::new(1), "a vCPU has missed its limit");
        assert!(machine.write(0, 1, 1));
        ring.throttle();
        drop(ManuallyDrop::into_inner(ring));
        drop(ManuallyDrop::into_inner(awake));
    });
}
