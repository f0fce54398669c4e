// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's own bits, without rings and beside them, on the simulated kernel.

#[path = "common/over.rs"]
mod over;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvm_dirty_ring::error::{SlotError, SyncError};
use kvm_dirty_ring::sim::{BitmapFault, ResetFault, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Mode, SlotId};
use over::Over;

const RAM: SlotId = SlotId::new(0, 1);
const PAGES: u64 = 130;

/// A machine in bitmap mode with one slot and one vCPU.
fn machine() -> (SimVm, DirtyLog, SimVcpu) {
    let mut config = SimConfig::default();
    config.mode = Mode::Bitmap;
    machine_of(config)
}

/// The same with rings, and bitmaps beside them or none.
fn with_rings(with_bitmap: bool) -> (SimVm, DirtyLog, SimVcpu) {
    let mut config = SimConfig::default();
    config.with_bitmap = with_bitmap;
    machine_of(config)
}

fn machine_of(config: SimConfig) -> (SimVm, DirtyLog, SimVcpu) {
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, PAGES).unwrap();
    vm.create_slot(RAM, PAGES);
    let vcpu = vm.add_vcpu();
    (vm, log, vcpu)
}

/// The pages of `RAM` that a sync reports.
fn sync(log: &DirtyLog) -> Vec<u64> {
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    dirty.pages().map(|(_, page)| page).collect()
}

#[test]
fn a_log_says_what_it_rests_on() {
    let (_, log, _) = machine();
    assert_eq!(log.mode(), Mode::Bitmap);
    assert_eq!(log.mode().to_string(), "bitmap");
    let log = SimVm::new(SimConfig::default()).dirty_log();
    assert_eq!(log.mode(), Mode::Rings);
    assert_eq!(log.mode().to_string(), "rings");
}

#[test]
fn vcpus_never_stop_for_a_ring() {
    let (_vm, log, vcpu) = machine();
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    for page in 0..PAGES {
        vcpu.write(RAM, page).unwrap();
    }
    assert_eq!(ring.occupancy(), 0);
    ring.on_full().unwrap();
    assert_eq!(log.reap().unwrap(), 0);
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    assert!(sync(&log).is_empty());
}

/// Without a bitmap beside rings such a write is not reported, as in KVM.
#[test]
fn what_the_kernel_writes_comes_by_the_bitmap() {
    for with_bitmap in [false, true] {
        let (vm, log, vcpu) = with_rings(with_bitmap);
        let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        vcpu.write(RAM, 3).unwrap();
        assert!(vm.kernel_write(RAM, 129));
        let expected: &[u64] = if with_bitmap { &[3, 129] } else { &[3] };
        assert_eq!(sync(&log), expected);
        assert_eq!(log.stats().entries, 1);
    }
}

/// A slot that KVM does not have, or does not log, may have been written anywhere.
#[test]
fn a_slot_without_a_bitmap_is_dirty() {
    let (vm, log, vcpu) = machine();
    vm.delete_slot(RAM);
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    assert_eq!(log.stats().missing_bitmaps, 1);
    vm.create_slot(RAM, PAGES);
    // What was written before the kernel logged it, it does not know.
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    assert!(sync(&log).is_empty());
    vcpu.write(RAM, 64).unwrap();
    assert_eq!(sync(&log), [64]);
    assert_eq!(log.stats().missing_bitmaps, 1);
}

/// A removal is called off, and by then KVM has let go of the slot once.
#[test]
fn a_slot_that_is_kept_after_all_is_dirty_once_more() {
    let (vm, log, vcpu) = machine();
    let retired = log.retire_slot(RAM).unwrap();
    vm.set_logged(RAM, false);
    assert!(sync(&log).is_empty());
    vcpu.write(RAM, 5).unwrap();
    vm.set_logged(RAM, true);
    log.keep_slot(&retired).unwrap();
    assert!(sync(&log).contains(&5), "page 5 was lost");
    assert!(sync(&log).is_empty());
    assert_eq!(log.stats().missing_bitmaps, 0);
}

/// The VMM sets the flag without `start_tracking`, so the log misses that, and what was written before.
#[test]
fn a_slot_whose_flag_comes_late_is_dirty_once_more() {
    let (vm, log, vcpu) = machine();
    vm.set_logged(RAM, false);
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    vcpu.write(RAM, 5).unwrap();
    vm.set_logged(RAM, true);
    assert!(sync(&log).contains(&5), "page 5 was lost");
}

#[test]
fn a_slot_that_is_larger_in_the_kernel_is_dirty() {
    let (vm, log, vcpu) = machine();
    vm.create_slot(RAM, PAGES + 64);
    vcpu.write(RAM, PAGES + 63).unwrap();
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    assert_eq!(log.stats().missing_bitmaps, 1);
}

/// Bits past the slot's end, in its last word: the kernel has it in another size.
#[test]
fn a_slot_with_bits_past_its_end_is_dirty() {
    let (vm, log, vcpu) = machine();
    vm.create_slot(RAM, PAGES + 62);
    vcpu.write(RAM, PAGES + 61).unwrap();
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    assert_eq!(log.stats().missing_bitmaps, 1);
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    // There are none but those of pages that it has.
    vcpu.write(RAM, PAGES - 1).unwrap();
    assert_eq!(sync(&log), [PAGES - 1]);
    assert_eq!(log.stats().missing_bitmaps, 1);
}

/// KVM says so of a slot of another size, and of one that it can't have. All others are still to be had.
#[test]
fn a_slot_that_is_refused_as_invalid_is_dirty() {
    let (vm, log, vcpu) = machine();
    let fault = BitmapFault {
        after: 0,
        error: libc::EINVAL,
    };
    for missing in 1..4 {
        vcpu.write(RAM, 3).unwrap();
        vm.inject_bitmap([fault]);
        assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
        assert_eq!(log.stats().missing_bitmaps, missing);
    }
    vm.inject_bitmap([fault]);
    drop(log.retire_slot(RAM).unwrap());
    assert_eq!(log.stats().missing_bitmaps, 4);
}

#[test]
fn a_reading_that_fails_loses_nothing() {
    let (vm, log, vcpu) = machine();
    let written = [0, 63, 64, 100, 129];
    for after in 0..=written.len() as u64 {
        for page in written {
            vcpu.write(RAM, page).unwrap();
        }
        let error = libc::ENOMEM;
        vm.inject_bitmap([BitmapFault { after, error }; 2]);
        let mut dirty = DirtyPages::new();
        match log.sync(&mut dirty) {
            Err(SyncError::Bitmap(failed)) => {
                assert_eq!(failed.slot(), RAM);
                assert_eq!(failed.raw_os_error(), Some(error));
            }
            other => panic!("{other:?}"),
        }
        assert!(dirty.is_empty());
        let removal = log.retire_slot(RAM);
        assert!(matches!(removal, Err(SlotError::Bitmap(_))), "{removal:?}");
        assert_eq!(sync(&log), written, "after {after}");
        assert!(sync(&log).is_empty());
    }
}

#[test]
fn a_removal_takes_what_was_written() {
    let (vm, log, vcpu) = machine();
    vcpu.write(RAM, 77).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    vm.delete_slot(RAM);
    // It has no bitmap any more, and needs none.
    drop(log.retire_slot(RAM).unwrap());
    assert_eq!(sync(&log), [77]);
    assert!(sync(&log).is_empty());
    log.finish_slot(&retired).unwrap();
    assert_eq!(log.stats().missing_bitmaps, 0);
}

/// The kernel's bits go when the slot's log is switched off.
#[test]
fn a_slot_that_was_rearmed_is_dirty() {
    let (vm, log, vcpu) = machine();
    vcpu.write(RAM, 5).unwrap();
    vm.rearm_slot(RAM);
    log.rearmed(RAM).unwrap();
    assert_eq!(sync(&log), Vec::from_iter(0..PAGES));
    assert!(sync(&log).is_empty());
}

/// Rearming throws away what is in the kernel's bitmap alone. It is taken before; and a sync before it is over must not take
/// the slot for clean.
#[test]
fn a_rearming_takes_the_kernels_bits_first() {
    let (vm, log, vcpu) = with_rings(true);
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    vm.inject([ResetFault::Short { after: 0 }]);
    vcpu.write(RAM, 3).unwrap();
    assert_eq!(sync(&log), [3]);
    assert!(vm.kernel_write(RAM, 129));

    let rearmed = log.rearm(|slot| {
        vm.rearm_slot(slot);
        Ok(())
    });
    assert_eq!(rearmed.unwrap(), 1);
    assert_eq!(
        sync(&log),
        [3, 129],
        "the suspect, and what the kernel wrote"
    );
    assert!(sync(&log).is_empty());

    vm.inject([ResetFault::Short { after: 0 }]);
    vcpu.write(RAM, 3).unwrap();
    assert_eq!(sync(&log), [3]);
    let mut amid = Vec::new();
    let rearmed = log.rearm(|slot| {
        vm.rearm_slot(slot);
        amid = sync(&log);
        Ok(())
    });
    assert_eq!(rearmed.unwrap(), 1);
    assert_eq!(amid, Vec::from_iter(0..PAGES), "the sync amid it");
    assert_eq!(sync(&log), [3]);
    assert!(sync(&log).is_empty());
    assert_eq!(log.stats().missing_bitmaps, 0);
}

/// Every page is written once, while several threads sync and another slot comes and goes: each page
/// is reported once, by one of them.
#[test]
fn syncs_and_removals_beside_each_other() {
    const OTHER: SlotId = SlotId::new(0, 2);
    const MANY: u64 = 20_000;
    let (vm, log, vcpu) = machine();
    let large = SlotId::new(1, 0);
    log.add_slot(large, MANY).unwrap();
    vm.create_slot(large, MANY);
    let over = AtomicBool::new(false);
    let found = Mutex::new(BTreeSet::new());
    let collect = || {
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        let mut found = found.lock().unwrap();
        for (slot, page) in dirty.pages() {
            assert!(
                slot != large || found.insert(page),
                "page {page} came twice"
            );
        }
    };
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    collect();
                }
            });
        }
        scope.spawn(|| {
            let mut size = 1;
            while !over.load(Ordering::Relaxed) {
                // Created first, so that no sync finds it missing.
                vm.create_slot(OTHER, size);
                log.add_slot(OTHER, size).unwrap();
                vcpu.write(OTHER, size - 1).unwrap();
                let retired = log.retire_slot(OTHER).unwrap();
                vm.delete_slot(OTHER);
                log.finish_slot(&retired).unwrap();
                size = size % 300 + 1;
            }
        });
        let _over = Over(&over);
        let writer = vm.add_vcpu();
        for page in 0..MANY {
            writer.write(large, page).unwrap();
            if page % 64 == 0 {
                // So that the others get on meanwhile.
                thread::yield_now();
            }
        }
    });
    collect();
    assert_eq!(found.into_inner().unwrap().len() as u64, MANY);
    assert_eq!(log.stats().missing_bitmaps, 0);
}
