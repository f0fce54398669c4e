// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tracking that stops and starts, on the simulated kernel: what is reported when.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

#[path = "common/over.rs"]
mod over;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVm};
use kvm_dirty_ring::{DirtyPages, Mode, Run, SlotId};
use over::Over;
use scenario::{ALL_RAM, ALL_ROM, Machine, RAM, ROM, run};

impl Machine {
    fn switch(&self, on: bool) {
        let set = || {
            self.vm.set_logged(RAM, on);
            Ok(())
        };
        let switched = match on {
            true => self.log.start_tracking(RAM, set),
            false => self.log.stop_tracking(RAM, set),
        };
        switched.unwrap();
    }

    /// What a sync of its own reports.
    fn reported(&self) -> Vec<Run> {
        let mut dirty = DirtyPages::new();
        self.log.sync(&mut dirty).unwrap();
        dirty.runs().collect()
    }
}

#[test]
fn all_is_dirty_until_the_first_sync_after_a_start() {
    let mut machine = Machine::new();
    machine.switch(false);
    for _ in 0..3 {
        assert_eq!(machine.sync(), [ALL_RAM]);
    }
    machine.write([7]);
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), []);
    machine.write([7, 8]);
    assert_eq!(machine.sync(), [run(RAM, 7, 2)]);
    // The other slot is nobody's business.
    machine.vcpu.write(ROM, 3).unwrap();
    machine.switch(false);
    assert_eq!(machine.sync(), [ALL_RAM, run(ROM, 3, 1)]);
}

#[test]
fn a_stop_without_a_sync_is_not_forgotten() {
    let mut machine = Machine::new();
    machine.switch(false);
    machine.write(0..50);
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    // Nor is a start that follows a start.
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), []);
}

#[test]
fn entries_left_in_the_ring_are_harvested_without_harm() {
    let mut machine = Machine::new();
    machine.write(0..20);
    machine.switch(false);
    machine.write(30..300);
    assert_eq!(machine.ring.occupancy(), 20);
    assert_eq!(machine.log.reap().unwrap(), 20);
    assert_eq!(machine.ring.occupancy(), 0);
    // Of a page that the reset has protected: nobody logs it.
    machine.write([3]);
    assert_eq!(machine.ring.occupancy(), 0);
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), []);
    assert_eq!(machine.log.stats().unknown_slot_entries, 0);
}

#[test]
fn device_writes_are_kept() {
    let mut machine = Machine::new();
    machine.switch(false);
    machine.vm.device_write(RAM, 5);
    machine.log.mark_dirty(RAM, 5, 1).unwrap();
    assert_eq!(machine.sync(), [ALL_RAM]);
    machine.switch(true);
    machine.log.mark_dirty(RAM, 6, 1).unwrap();
    assert_eq!(machine.sync(), [ALL_RAM]);
    machine.log.mark_dirty(RAM, 6, 1).unwrap();
    assert_eq!(machine.sync(), [run(RAM, 6, 1)]);
}

/// A start protects all pages, so a stop ends what is suspected; what comes later is kept.
#[test]
fn a_stop_ends_suspicion() {
    let mut machine = Machine::new();
    let make_suspect = |machine: &mut Machine| {
        machine.vm.inject([ResetFault::Short { after: 3 }]);
        machine.write(10..20);
        machine.reported();
    };
    make_suspect(&mut machine);
    assert_eq!(machine.log.stats().suspect_pages, 10);
    machine.switch(false);
    assert_eq!(machine.log.stats().suspect_pages, 0);
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), []);
    machine.write([12]);
    assert_eq!(machine.sync(), [run(RAM, 12, 1)]);

    machine.write(10..20);
    machine.switch(false);
    machine.vm.inject([ResetFault::Short { after: 3 }]);
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.log.stats().suspect_pages, 10);
    // Which would switch its log on.
    let rearmed = machine.log.rearm(|slot| panic!("{slot} is not tracked"));
    assert_eq!(rearmed.unwrap(), 0);
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), [run(RAM, 10, 10)]);
}

/// What a sync reports that comes right before the flag is set, or right after it is cleared.
#[test]
fn no_sync_during_a_switch_misses_a_write() {
    let mut machine = Machine::new();
    let stopped = machine.log.stop_tracking(RAM, || {
        machine.vm.set_logged(RAM, false);
        machine.write([1]);
        assert_eq!(machine.reported(), [ALL_RAM]);
        Ok(())
    });
    stopped.unwrap();
    let started = machine.log.start_tracking(RAM, || {
        assert_eq!(machine.reported(), [ALL_RAM]);
        machine.write([2]);
        machine.vm.set_logged(RAM, true);
        Ok(())
    });
    started.unwrap();
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), []);
}

#[test]
fn a_switch_that_fails_leaves_pages_dirty() {
    let mut machine = Machine::new();
    let refuse = || Err(io::Error::from_raw_os_error(libc::ENOMEM));
    let refused = |result: Result<(), SlotError>| match result {
        Err(SlotError::Switch { slot: RAM, source }) => {
            assert_eq!(source.raw_os_error(), Some(libc::ENOMEM));
        }
        other => panic!("{other:?}"),
    };
    refused(machine.log.stop_tracking(RAM, refuse));
    assert_eq!(machine.sync(), [ALL_RAM]);
    refused(machine.log.start_tracking(RAM, refuse));
    assert_eq!(machine.sync(), [ALL_RAM]);
    machine.switch(true);
    assert_eq!(machine.sync(), [ALL_RAM]);
    // Begun anew, it need not be logged any more.
    refused(machine.log.start_tracking(RAM, refuse));
    assert_eq!(machine.sync(), [ALL_RAM]);
    assert_eq!(machine.sync(), [ALL_RAM]);
}

#[test]
fn slots_that_are_not_there_or_go_are_refused() {
    let mut machine = Machine::new();
    let never = || panic!("it is not to be switched");
    let other = SlotId::new(0, 9);
    let unknown = machine.log.start_tracking(other, never);
    assert!(matches!(unknown, Err(SlotError::Unknown { slot }) if slot == other));
    let unknown = machine.log.stop_tracking(other, never);
    assert!(matches!(unknown, Err(SlotError::Unknown { slot }) if slot == other));
    machine.switch(false);
    let retired = machine.log.retire_slot(RAM).unwrap();
    let goes = machine.log.start_tracking(RAM, never);
    assert!(matches!(goes, Err(SlotError::Retired { slot: RAM })));
    let goes = machine.log.stop_tracking(RAM, never);
    assert!(matches!(goes, Err(SlotError::Retired { slot: RAM })));
    assert_eq!(machine.sync(), [ALL_RAM]);
    machine.vm.delete_slot(RAM);
    machine.log.finish_slot(&retired).unwrap();
    // The next one of that id is tracked.
    machine.log.add_slot(RAM, 20).unwrap();
    assert_eq!(machine.sync(), []);
    assert_eq!(machine.log.mark_dirty(ROM, 0, ALL_ROM.pages).ok(), Some(()));
    assert_eq!(machine.sync(), [ALL_ROM]);
}

/// KVM throws its bitmap away with the flag: that is no bitmap that is missing.
#[test]
fn bitmaps_come_and_go_with_the_flag() {
    let mut config = SimConfig::default();
    config.mode = Mode::Bitmap;
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, 130).unwrap();
    vm.create_slot(RAM, 130);
    let vcpu = vm.add_vcpu();
    let set = |on| {
        vm.set_logged(RAM, on);
        Ok(())
    };
    let mut dirty = DirtyPages::new();
    let mut pages = || {
        log.sync(&mut dirty).unwrap();
        dirty.page_count()
    };
    for _ in 0..3 {
        vcpu.write(RAM, 7).unwrap();
        log.stop_tracking(RAM, || set(false)).unwrap();
        assert_eq!((pages(), pages()), (130, 130));
        vcpu.write(RAM, 8).unwrap();
        log.start_tracking(RAM, || set(true)).unwrap();
        assert_eq!((pages(), pages()), (130, 0));
        vcpu.write(RAM, 9).unwrap();
        assert_eq!(pages(), 1);
    }
    log.stop_tracking(RAM, || set(false)).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    assert_eq!(pages(), 130);
    vm.delete_slot(RAM);
    log.finish_slot(&retired).unwrap();
    assert_eq!(log.stats().missing_bitmaps, 0);
}

/// A guest writes, somebody syncs and copies, somebody else switches, in rings and in bitmaps.
#[test]
fn switches_beside_a_guest_and_syncs() {
    for mode in [Mode::Rings, Mode::Bitmap] {
        const PAGES: u64 = 200;
        let mut config = SimConfig::default();
        (config.ring_entries, config.mode) = (64, mode);
        config.reserved = 8;
        config.pml = 4;
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        log.add_slot(RAM, PAGES).unwrap();
        vm.create_slot(RAM, PAGES);
        let vcpu = vm.add_vcpu();
        let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        let mut copy = vec![0; PAGES as usize];
        let mut dirty = DirtyPages::new();
        let mut round = || {
            log.sync(&mut dirty).unwrap();
            for (slot, page) in dirty.pages() {
                copy[page as usize] = vm.version(slot, page).unwrap();
            }
        };
        let set = |on| {
            vm.set_logged(RAM, on);
            Ok(())
        };
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let switcher = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    log.stop_tracking(RAM, || set(false)).unwrap();
                    thread::yield_now();
                    log.start_tracking(RAM, || set(true)).unwrap();
                    thread::yield_now();
                }
            });
            let guest = scope.spawn(|| {
                let mut page = 0;
                while !over.load(Ordering::Relaxed) {
                    match vcpu.write(RAM, page % PAGES) {
                        Ok(()) => page += 7,
                        Err(_) => ring.on_full().unwrap(),
                    }
                }
                vcpu.exit();
            });
            let guard = Over(&over);
            for _ in 0..2000 {
                round();
            }
            drop(guard);
            switcher.join().unwrap();
            guest.join().unwrap();
            round();
        });
        for page in 0..PAGES {
            let version = vm.version(RAM, page).unwrap();
            assert_eq!(copy[page as usize], version, "page {page}, {mode}");
        }
        let stats = log.stats();
        assert_eq!((stats.missing_bitmaps, stats.suspect_pages), (0, 0));
    }
}
