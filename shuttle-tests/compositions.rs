// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests, devices, reapers, migrations and a VMM at once: nothing may be lost.

use core::ops::Range;

use super::machine::{GUEST_SLOT, Vm};
use super::{compose, pick};
use crate::SlotId;
use crate::loom_tests::kernel::{SLOT, State};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, AtomicBool, Ordering};

/// Waits for each.
fn join<T>(threads: impl IntoIterator<Item = JoinHandle<T>>) -> Vec<T> {
    let threads = threads.into_iter();
    threads.map(|thread| thread.join().unwrap()).collect()
}

/// Three vCPUs with rings that are full all the time, a device, a reaper and a migration. The last
/// sync may find the reaper and the migration anywhere.
#[test]
fn everybody_at_once() {
    compose(|| {
        const PAGES: &[usize] = &[0, 1, 2, 3, 4, 5];
        let vm = Vm::new(3, PAGES.len());
        let rings = [0, 1, 2].map(|vcpu| vm.attach(vcpu));
        let (reaper, migration) = (vm.reaper(3), vm.migration(3));
        let device = vm.device(0..PAGES.len(), 3);
        join(vm.run_all(rings, PAGES, 6));
        join([device]);
        vm.last_round(0..PAGES.len());
        join([migration]);
        vm.verify(0..PAGES.len());
        join([reaper]);
        assert_nothing_was_doubted(&vm);
    });
}

/// The same, while a slot is removed and another gets its id, in which the guest writes at once;
/// again and again.
#[test]
fn a_slot_id_is_reused() {
    const SLOTS: &[(SlotId, usize)] = &[
        (SLOT, 2),
        (GUEST_SLOT, 2),
        (GUEST_SLOT, 2),
        (GUEST_SLOT, 2),
        (GUEST_SLOT, 2),
    ];
    // The first page of the slot that comes and goes is written only before it went first.
    const PAGES: &[usize] = &[0, 1, 2, 3, 5, 7, 9];
    const LAST: Range<usize> = 8..10;
    compose(|| {
        let vm = Vm::with_slots(3, SLOTS);
        vm.log.add_slot(GUEST_SLOT, 2).unwrap();
        let rings = [0, 1, 2].map(|vcpu| vm.attach(vcpu));
        let is_new = Arc::new(AtomicBool::new(false));
        let vmm = thread::spawn({
            let (vm, is_new) = (vm.clone(), is_new.clone());
            move || {
                for old in [2, 4, 6] {
                    let retired = vm.log.retire_slot(GUEST_SLOT).unwrap();
                    vm.delete(old..old + 2);
                    vm.log.finish_slot(&retired).unwrap();
                    vm.log.add_slot(GUEST_SLOT, 2).unwrap();
                    // Release: pairs with the acquire load of the migration: what it syncs from
                    // then on is not of the first slot.
                    is_new.store(true, Ordering::Release);
                    vm.protect(old + 2..old + 4);
                    vm.device_write(old + 3);
                }
            }
        });
        let migration = thread::spawn({
            let (vm, is_new) = (vm.clone(), is_new.clone());
            move || {
                for _ in 0..4 {
                    // Acquire: pairs with the release store above.
                    let is_new = is_new.load(Ordering::Acquire);
                    let dirty = vm.round().unwrap();
                    let aliased = is_new && dirty.contains(GUEST_SLOT, 0);
                    assert!(!aliased, "a page of the slot before");
                }
            }
        });
        let reapers = [vm.reaper(4), vm.reaper(4)];
        let device = vm.device(0..2, 2);
        join(vm.run_all(rings, PAGES, 8));
        join([device, vmm]);
        vm.last_round(0..2);
        vm.last_round(LAST);
        join([migration]);
        vm.verify(0..2);
        vm.verify(LAST);
        join(reapers);
        assert_nothing_was_doubted(&vm);
    });
}

/// Resets fail and fall short. Pages that nobody may have protected are reported by every sync,
/// until all are protected again while the vCPUs stand still: then they come once more.
#[test]
fn resets_go_wrong() {
    const PAGES: &[usize] = &[0, 1, 2, 3];
    compose(|| {
        let vm = Vm::with_faults(3, PAGES.len(), 8);
        let mut rings = vec![vm.attach(0), vm.attach(1), vm.attach(2)];
        let reaper = vm.reaper(4);
        for _ in 0..2 {
            let migration = vm.migration(2);
            let device = vm.device(0..PAGES.len(), 2);
            rings = join(vm.run_all(rings, PAGES, 4));
            join([device]);
            if pick(0..2) == 0 {
                vm.last_round(0..PAGES.len());
            }
            // The reaper and the migration go on all the while.
            vm.protect(0..PAGES.len());
            vm.log.rearmed(SLOT).unwrap();
            vm.last_round(0..PAGES.len());
            join([migration]);
            vm.verify(0..PAGES.len());
        }
        join([reaper]);
        // What the reaper doubted since; every page is protected.
        vm.last_round(0..PAGES.len());
        vm.log.rearmed(SLOT).unwrap();
        vm.last_round(0..PAGES.len());
        let dirty = vm.last_round(0..PAGES.len());
        assert!(dirty.is_empty(), "suspect although protected again");
    });
}

/// A slot's tracking stops and starts, while the guest writes there and elsewhere, and a migration syncs.
#[test]
fn tracking_stops_and_starts() {
    const PAGES: &[usize] = &[0, 1, 2, 3, 4, 5];
    compose(|| {
        let vm = Vm::with_slots(3, &[(SLOT, 3), (GUEST_SLOT, 3)]);
        vm.log.add_slot(GUEST_SLOT, 3).unwrap();
        let rings = [0, 1, 2].map(|vcpu| vm.attach(vcpu));
        let vmm = thread::spawn({
            let vm = vm.clone();
            move || {
                for _ in 0..pick(1..4) {
                    let switched = |state| {
                        vm.machine.switch(SLOT, state);
                        Ok(())
                    };
                    let stopped = vm.log.stop_tracking(SLOT, || switched(State::Unlogged));
                    stopped.unwrap();
                    let started = vm.log.start_tracking(SLOT, || switched(State::Armed));
                    started.unwrap();
                }
            }
        });
        let (reaper, migration) = (vm.reaper(3), vm.migration(3));
        let device = vm.device(0..PAGES.len(), 2);
        join(vm.run_all(rings, PAGES, 6));
        join([device]);
        // The slot may be switched still: what is unprotected now need not have been then.
        vm.round().unwrap();
        join([migration]);
        vm.verify(0..PAGES.len());
        join([reaper, vmm]);
        vm.last_round(0..PAGES.len());
        let dirty = vm.last_round(0..PAGES.len());
        assert!(dirty.is_empty(), "dirty although all is tracked");
        assert_nothing_was_doubted(&vm);
    });
}

/// Two migrations sync at once, and a third vCPU comes late.
#[test]
fn two_syncs_and_a_late_vcpu() {
    const PAGES: &[usize] = &[0, 1, 2, 3, 4, 5];
    compose(|| {
        let vm = Vm::new(3, PAGES.len());
        let migrations = [vm.migration(3), vm.migration(3)];
        let reaper = vm.reaper(1);
        let mut guests = Vec::new();
        for vcpu in 0..3 {
            for _ in 0..pick(0..20) {
                thread::yield_now();
            }
            guests.push(vm.run(vcpu, vm.attach(vcpu), PAGES, 6));
        }
        join(guests);
        vm.last_round(0..PAGES.len());
        join(migrations);
        vm.verify(0..PAGES.len());
        join([reaper]);
        assert_nothing_was_doubted(&vm);
    });
}

/// No page was suspected of anything, which would hide that one was lost.
fn assert_nothing_was_doubted(vm: &Vm) {
    let stats = vm.log.stats();
    let doubts = [
        stats.short_resets,
        stats.failed_resets,
        stats.unknown_slot_entries,
        stats.out_of_range_entries,
        stats.overruns,
    ];
    assert_eq!(doubts, [0; 5], "{stats:?}");
}
