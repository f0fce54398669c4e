// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes wrong, one scenario each: what is reported, what is counted, and that no page is lost.

#[path = "common/scenario.rs"]
mod scenario;

use std::collections::BTreeSet;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvm_dirty_ring::error::{AttachError, SlotError, SyncError};
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::ring::{RingMemory, RingView};
use kvm_dirty_ring::sim::{ResetFault, ResetPhase, SimConfig, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Kernel, Reaper, Recycled, Stats};
use scenario::{ALL_RAM, ALL_ROM, Machine, RAM, ROM, run};

/// Everything is suspect: each sync reports it, until it is armed again.
fn assert_all_suspect(machine: &mut Machine) {
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
    machine.rearm();
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
    assert_eq!(machine.sync(), []);
    machine.write([9]);
    assert_eq!(machine.sync(), [run(RAM, 9, 1)]);
}

#[test]
fn pages_of_a_short_reset_are_reported_until_rearmed() {
    for after in 0..10 {
        let mut machine = Machine::new();
        machine.write([100]);
        assert_eq!(machine.sync(), [run(RAM, 100, 1)]);
        machine.vm.inject([ResetFault::Short { after }]);
        machine.write(0..10);
        assert_eq!(machine.sync(), [run(RAM, 0, 10)]);
        let stats = machine.log.stats();
        assert_eq!((stats.short_resets, stats.resets), (1, 3));
        // Unlogged, for some of these pages are not armed.
        machine.write(0..10);
        assert_eq!(machine.sync(), [run(RAM, 0, 10)]);
        assert_eq!(machine.sync(), [run(RAM, 0, 10)]);
        machine.rearm();
        assert_eq!(machine.sync(), [run(RAM, 0, 10)]);
        assert_eq!(machine.sync(), []);
        assert_eq!(machine.log.stats().short_resets, 1);
    }
}

#[test]
fn a_reset_that_only_recycles_what_another_left_is_short() {
    let mut machine = Machine::new();
    let short = |after| ResetFault::Short { after };
    // Three entries stay behind: the reset stops, and its repetition is refused.
    let refused = ResetFault::Error(libc::EINTR);
    machine.vm.inject([short(1), refused]);
    machine.write([10, 20, 30, 40]);
    machine.sync();
    // The three and page 50 are recycled, four for the two that were marked; page 50 is not armed.
    machine.vm.inject([short(4)]);
    machine.write([50, 60]);
    machine.sync();
    assert_eq!(machine.log.stats().short_resets, 2);
    machine.write([50]);
    let reported = machine.sync();
    assert!(reported.contains(&run(RAM, 50, 1)), "{reported:?}");
}

/// Switched off and not on again, the slot is not logged: all of it is suspect until the hook succeeds.
#[test]
fn a_slot_whose_rearming_fails_is_suspect_as_a_whole() {
    for panics in [false, true] {
        let mut machine = Machine::new();
        machine.vm.inject([ResetFault::Short { after: 1 }]);
        machine.write([1, 2, 3]);
        machine.sync();
        let fails = |slot| {
            machine.vm.set_logged(slot, false);
            assert!(!panics, "the hook panics");
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        };
        let rearmed = catch_unwind(AssertUnwindSafe(|| machine.log.rearm(fails)));
        assert_eq!(rearmed.is_err(), panics);
        machine.write([200]);
        assert_eq!(machine.sync(), [ALL_RAM]);
        assert_eq!(machine.sync(), [ALL_RAM]);
        let logged = |slot| {
            machine.vm.set_logged(slot, true);
            Ok(())
        };
        assert_eq!(machine.log.rearm(logged).unwrap(), 1);
        assert_eq!(machine.sync(), [ALL_RAM]);
        assert_eq!(machine.sync(), []);
    }
}

/// What is near the last page of a ring may be unprotected, and is reported until it is protected anew.
/// Whose ring was the last one the log does not know.
#[test]
fn the_last_pages_of_a_doubtful_reset_are_reported_until_rearmed() {
    let mut machine = Machine::new();
    let other = machine.vm.add_vcpu();
    let _ring = machine.log.attach_ring(other.ring_memory()).unwrap();
    let idle = machine.vm.add_vcpu();
    let _idle = machine.log.attach_ring(idle.ring_memory()).unwrap();
    machine.write([0, 100]);
    other.write(RAM, 230).unwrap();
    machine.vm.inject([ResetFault::AtEnd]);
    // Of the ring that only ever held one entry, that entry's; of the other, any that is near.
    let near = [run(RAM, 37, 127), run(RAM, 230, 1)];
    assert_eq!(machine.sync(), [&[run(RAM, 0, 1)][..], &near].concat());
    let stats = machine.log.stats();
    assert_eq!((stats.short_resets, stats.doubtful_resets), (0, 1));
    assert_eq!(stats.suspect_pages, 127 + 1);
    // Unlogged, for the last ring's is not armed.
    other.write(RAM, 230).unwrap();
    assert_eq!(machine.sync(), near);
    assert_eq!(machine.log.stats().entries, stats.entries);
    machine.rearm();
    assert_eq!(machine.sync(), near);
    assert_eq!(machine.sync(), []);
    // A reset that finds nothing to recycle has nothing to leave.
    machine.vm.inject([ResetFault::AtEnd]);
    machine.ring.on_full().unwrap();
    assert_eq!(machine.log.stats().doubtful_resets, 1);
    assert_eq!(machine.sync(), []);
}

/// Where a slot has so many that to copy them each time costs more than to stop the guest once.
#[test]
fn stats_say_where_a_rearming_pays() {
    for (suspects, slots) in [(Stats::REARM_PAYS_FROM - 1, 0), (Stats::REARM_PAYS_FROM, 1)] {
        let vm = SimVm::new(SimConfig::default());
        let log = vm.dirty_log();
        for slot in [RAM, ROM] {
            log.add_slot(slot, 4000).unwrap();
            vm.create_slot(slot, 4000);
        }
        let vcpu = vm.add_vcpu();
        let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        vm.inject([ResetFault::Short { after: 1 }]);
        (0..suspects).for_each(|page| vcpu.write(RAM, page).unwrap());
        vcpu.write(ROM, 5).unwrap();
        log.reap().unwrap();
        let stats = log.stats();
        assert_eq!(stats.suspect_pages, suspects + 1);
        assert_eq!(stats.slots_to_rearm, slots);
        let told = stats.to_string().contains("1 slots to re-arm");
        assert_eq!(told, slots == 1, "{stats}");
        vm.rearm_slot(RAM);
        log.rearmed(RAM).unwrap();
        assert_eq!(log.stats().slots_to_rearm, 0);
    }
}

/// A slot with fewer is not worth a stop, and goes on being reported.
#[test]
fn a_rearming_can_leave_slots_with_few_suspects_alone() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    for slot in [RAM, ROM] {
        log.add_slot(slot, 100).unwrap();
        vm.create_slot(slot, 100);
    }
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    let mut dirty = DirtyPages::new();
    // Nothing is suspect, so that even 0 protects nothing.
    let never = |slot| panic!("{slot} is protected");
    assert_eq!(log.rearm_from(0, never).unwrap(), 0);
    vm.inject([ResetFault::Short { after: 1 }]);
    (0..5).for_each(|page| vcpu.write(RAM, page).unwrap());
    (0..3).for_each(|page| vcpu.write(ROM, page).unwrap());
    log.sync(&mut dirty).unwrap();
    assert_eq!(log.stats().suspect_pages, 8);
    for (least, protected, left) in [(6, vec![], 8), (5, vec![RAM], 3), (0, vec![ROM], 0)] {
        let mut called = Vec::new();
        let rearmed = log.rearm_from(least, |slot| {
            vm.rearm_slot(slot);
            called.push(slot);
            Ok(())
        });
        assert_eq!((rearmed.unwrap(), &called), (protected.len(), &protected));
        assert_eq!(log.stats().suspect_pages, left, "at least {least}");
        log.sync(&mut dirty).unwrap();
        assert!(protected.iter().all(|&slot| dirty.contains(slot, 0)));
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.page_count(), left, "at least {least}");
    }
}

/// Each stop after a reset leaves what its last batch names, and no more: an open page is not logged, so that nothing
/// but a re-arming ends its suspicion.
#[test]
fn doubt_adds_up_by_the_pages_that_are_named() {
    const RESETS: u64 = 100;
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, 200_000).unwrap();
    vm.create_slot(RAM, 200_000);
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    let mut dirty = DirtyPages::new();
    let pages = || (0..RESETS).map(|round| round * 1000);
    for (round, page) in (1..).zip(pages()) {
        vm.inject([ResetFault::AtEnd]);
        vcpu.write(RAM, page).unwrap();
        log.sync(&mut dirty).unwrap();
        let stats = log.stats();
        assert_eq!((stats.doubtful_resets, stats.suspect_pages), (round, round));
        // Unlogged, as it is not armed.
        vcpu.write(RAM, page).unwrap();
        log.sync(&mut dirty).unwrap();
        assert!(dirty.contains(RAM, page), "page {page} was lost");
        assert_eq!((dirty.page_count(), log.stats().entries), (round, round));
    }
    // A batch of 60 pages, which the entries that can still be read do not show whole.
    vm.inject([ResetFault::AtEnd]);
    (150_000..150_060).for_each(|page| vcpu.write(RAM, page).unwrap());
    log.sync(&mut dirty).unwrap();
    assert_eq!(log.stats().suspect_pages, RESETS + 127);
    // As many slots as need it are re-armed, and it is over.
    let protect = |slot| {
        vm.rearm_slot(slot);
        Ok(())
    };
    assert_eq!(log.rearm(protect).unwrap(), 1);
    log.sync(&mut dirty).unwrap();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.is_empty());
}

#[test]
fn a_failed_reset_loses_nothing() {
    for number in [libc::EINTR, libc::ENOMEM, libc::EBADF] {
        let mut machine = Machine::new();
        machine.write([1]);
        assert_eq!(machine.sync(), [run(RAM, 1, 1)]);

        machine.vm.inject([ResetFault::Error(number); 2]);
        machine.write(5..8);
        let error = machine.log.reap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(number));
        let Err(SyncError::Reset(error)) = machine.log.sync(&mut machine.dirty) else {
            panic!("a sync whose reset fails");
        };
        assert_eq!(error.raw_os_error(), Some(number));
        assert!(machine.dirty.is_empty(), "pages that were not reset yet");

        assert_eq!(machine.sync(), [run(RAM, 5, 3)]);
        let stats = machine.log.stats();
        assert_eq!((stats.failed_resets, stats.short_resets), (2, 0));
        machine.write([6]);
        assert_eq!(machine.sync(), [run(RAM, 6, 1)]);
    }
}

#[test]
fn a_full_exit_whose_reset_fails_can_be_repeated() {
    let mut machine = Machine::new();
    machine.write(0..60);
    assert_eq!(machine.vcpu.write(RAM, 60), Err(WriteError::RingFull));
    machine.vm.inject([ResetFault::Error(libc::EINTR)]);
    machine.ring.on_full().unwrap_err();
    assert_eq!(machine.vcpu.write(RAM, 60), Err(WriteError::RingFull));
    machine.ring.on_full().unwrap();
    machine.write([60]);
    assert_eq!(machine.sync(), [run(RAM, 0, 61)]);
    let stats = machine.log.stats();
    assert_eq!((stats.full_exits(), stats.failed_resets), (2, 1));
    assert_eq!((stats.entries, stats.vcpus[0].entries), (61, 61));
}

#[test]
fn a_removal_whose_reset_fails_can_be_repeated() {
    let mut machine = Machine::new();
    let error = ResetFault::Error(libc::ENOMEM);
    machine.write([7]);
    machine.vm.inject([error]);
    let failed = machine.log.retire_slot(RAM);
    assert!(matches!(failed, Err(SlotError::Reset(_))));
    let retired = machine.log.retire_slot(RAM).unwrap();
    // Still tracked.
    assert_eq!(machine.sync(), [run(RAM, 7, 1)]);
    machine.write([8]);
    machine.vm.delete_slot(RAM);
    machine.vm.inject([error]);
    let failed = machine.log.finish_slot(&retired);
    assert!(matches!(failed, Err(SlotError::Reset(_))));
    machine.log.finish_slot(&retired).unwrap();
    assert_eq!(machine.sync(), []);
    assert_eq!(machine.dirty.words(RAM), None);
}

#[test]
fn an_entry_of_an_unknown_slot_makes_all_suspect() {
    for raw in [1, 0x10000, 0x20000, u32::MAX] {
        let mut machine = Machine::new();
        machine.vcpu.garble_next(raw, 0);
        machine.write([5]);
        assert_all_suspect(&mut machine);
        let stats = machine.log.stats();
        assert_eq!(stats.unknown_slot_entries, 1);
        assert_eq!(stats.out_of_range_entries, 0);
    }
}

#[test]
fn an_entry_past_its_slots_end_makes_all_suspect() {
    for page in [ALL_ROM.pages, ALL_ROM.pages + 64, 1 << 32, u64::MAX] {
        let mut machine = Machine::new();
        machine.vcpu.garble_next(ROM.raw(), page);
        machine.write([5]);
        assert_all_suspect(&mut machine);
        let stats = machine.log.stats();
        assert_eq!(stats.out_of_range_entries, 1);
        assert_eq!(stats.unknown_slot_entries, 0);
    }
}

/// A kernel that does not keep as many entries in reserve as it reports.
struct Misreported {
    vm: SimVm,
    reserved: u32,
}

impl Kernel for Misreported {
    fn reset(&self) -> io::Result<Recycled> {
        self.vm.reset()
    }

    fn reserved_entries(&self) -> u32 {
        self.reserved
    }
}

#[test]
fn a_full_exit_shows_the_soft_limit() {
    for (kept, reported) in [(64, 576), (1088, 64)] {
        let mut config = SimConfig::default();
        config.reserved = kept;
        let vm = SimVm::new(config);
        let kernel = Misreported {
            vm: vm.clone(),
            reserved: reported,
        };
        let log = DirtyLog::with_kernel(Box::new(kernel), 4096);
        log.add_slot(RAM, 10_000).unwrap();
        vm.create_slot(RAM, 10_000);
        let vcpu = vm.add_vcpu();
        let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        let soft_limit = || log.stats().vcpus[0].soft_limit;
        assert_eq!(soft_limit(), u64::from(4096 - reported));
        // Too few for a full ring.
        vcpu.write(RAM, 9_000).unwrap();
        ring.on_full().unwrap();
        assert_eq!(soft_limit(), u64::from(4096 - reported));
        let full = (0..10_000).position(|page| vcpu.write(RAM, page).is_err());
        assert_eq!(full, Some(4096 - kept as usize));
        ring.on_full().unwrap();
        assert_eq!(soft_limit(), u64::from(4096 - kept));
    }
}

/// With a buffer of the hardware's the ring is fuller than its limit when the vCPU stops, by what the last flush has
/// added: the least that was found is the nearest.
#[test]
fn the_least_that_full_exits_find_is_the_soft_limit() {
    let mut config = SimConfig::default();
    (config.ring_entries, config.reserved, config.pml) = (1024, 576, 512);
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, 10_000).unwrap();
    vm.create_slot(RAM, 10_000);
    let vcpu = vm.add_vcpu();
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    let soft_limit = || log.stats().vcpus[0].soft_limit;
    assert_eq!(soft_limit(), 448, "as the kernel has it");
    let (mut found, mut spread) = (u64::MAX, BTreeSet::new());
    for round in 0..200 {
        vm.rearm_slot(RAM);
        let mut pages = 0..10_000;
        // Exits for other reasons flush the buffer, too, wherever it is.
        for exit in [round * 37 % 448, round * 101 % 97] {
            pages
                .by_ref()
                .take(exit)
                .for_each(|page| vcpu.write(RAM, page).unwrap());
            vcpu.exit();
        }
        assert!(pages.any(|page| vcpu.write(RAM, page).is_err()));
        let before = log.stats().entries;
        ring.on_full().unwrap();
        let now = log.stats().entries - before;
        spread.insert(now);
        found = found.min(now);
        assert_eq!(soft_limit(), found, "after {now} in round {round}");
    }
    assert!(
        spread.len() > 50 && spread.first() >= Some(&448),
        "{spread:?}"
    );
    assert!(spread.last() > Some(&900), "{spread:?}");
}

/// Entries that still await their reset count towards the limit, and are not in the harvest.
#[test]
fn a_full_exit_beside_a_failed_reset_shows_no_soft_limit() {
    let mut machine = Machine::new();
    machine.write(0..40);
    machine.vm.inject([ResetFault::Error(libc::EINTR)]);
    machine.log.reap().unwrap_err();
    machine.write(40..60);
    assert_eq!(machine.vcpu.write(RAM, 60), Err(WriteError::RingFull));
    machine.ring.on_full().unwrap();
    machine.write([60]);
    assert_eq!(machine.log.stats().vcpus[0].soft_limit, 60);
}

/// As above, with no other pass: the full exit before has left them. Nor does a broken ring show it.
#[test]
fn a_full_exit_after_a_short_reset_shows_no_soft_limit() {
    let mut machine = Machine::new();
    let soft_limit = |machine: &Machine| machine.log.stats().vcpus[0].soft_limit;
    machine.write(0..60);
    let refused = ResetFault::Error(libc::EINTR);
    machine
        .vm
        .inject([ResetFault::Short { after: 40 }, refused]);
    machine.ring.on_full().unwrap();
    machine.write(100..140);
    assert_eq!(machine.vcpu.write(RAM, 140), Err(WriteError::RingFull));
    machine.ring.on_full().unwrap();
    assert_eq!(soft_limit(&machine), 60);
    machine.vcpu.ignore_soft_limit(true);
    machine.write(200..264);
    machine.ring.on_full().unwrap();
    assert_eq!(machine.log.stats().overruns, 1);
    assert_eq!(soft_limit(&machine), 60);
}

#[test]
fn a_pass_that_finds_nothing_resets_nothing() {
    let mut machine = Machine::new();
    let other = machine.vm.add_vcpu();
    let _ring = machine.log.attach_ring(other.ring_memory()).unwrap();
    assert_eq!(machine.log.reap().unwrap(), 0);
    assert_eq!(machine.sync(), []);
    assert_eq!(machine.log.stats().resets, 0);
    machine.write(0..7);
    other.write(RAM, 7).unwrap();
    assert_eq!(machine.log.reap().unwrap(), 8);
    assert_eq!(machine.sync(), [run(RAM, 0, 8)]);
    assert_eq!(machine.log.stats().resets, 1);
}

#[test]
fn each_slot_is_rearmed_alone() {
    let mut machine = Machine::new();
    machine.vcpu.garble_next(77, 0);
    machine.write([5]);
    machine.sync();
    machine.vm.rearm_slot(RAM);
    machine.log.rearmed(RAM).unwrap();
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
    assert_eq!(machine.sync(), [ALL_ROM]);
}

#[test]
fn rearming_asks_for_the_slots_that_need_it() {
    let mut machine = Machine::new();
    let (vm, log) = (machine.vm.clone(), machine.log.clone());
    let protect = |slot| {
        vm.rearm_slot(slot);
        Ok(())
    };
    assert_eq!(log.rearm(|slot| panic!("{slot} needs none")).unwrap(), 0);
    vm.inject([ResetFault::Short { after: 2 }]);
    machine.write(10..13);
    machine.sync();
    assert_eq!(log.stats().suspect_pages, 3);
    let mut asked = Vec::new();
    let rearmed = log.rearm(|slot| {
        asked.push(slot);
        protect(slot)
    });
    assert_eq!((rearmed.unwrap(), asked), (1, vec![RAM]));
    assert_eq!(log.stats().suspect_pages, 0);
    assert_eq!(machine.sync(), [run(RAM, 10, 3)]);
    machine.write([11]);
    assert_eq!(machine.sync(), [run(RAM, 11, 1)]);

    // One that fails ends it there; what was done is done.
    machine.vcpu.garble_next(77, 0);
    machine.write([5]);
    machine.sync();
    assert_eq!(log.stats().suspect_pages, ALL_RAM.pages + ALL_ROM.pages);
    let refused = log.rearm(|slot| match slot {
        RAM => protect(slot),
        _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
    });
    let Err(SlotError::Protect { slot, source }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((slot, source.raw_os_error()), (ROM, Some(libc::EBADF)));
    assert_eq!(log.stats().suspect_pages, ALL_ROM.pages);
    assert_eq!(machine.sync(), [ALL_RAM, ALL_ROM]);
    assert_eq!(machine.sync(), [ALL_ROM]);

    // What is being removed may be gone in KVM.
    let retired = log.retire_slot(ROM).unwrap();
    assert_eq!(log.rearm(|slot| panic!("{slot} goes")).unwrap(), 0);
    assert_eq!(log.stats().suspect_pages, ALL_ROM.pages);
    vm.delete_slot(ROM);
    log.finish_slot(&retired).unwrap();
    assert_eq!(machine.sync(), []);
}

#[test]
fn writes_inside_a_reset_are_reported() {
    for phase in [ResetPhase::Begin, ResetPhase::Recycled] {
        let mut machine = Machine::new();
        machine.write([1, 2]);
        let (vcpu, mut once) = (machine.vcpu.clone(), true);
        machine.vm.on_reset(move |now| {
            if now == phase && core::mem::take(&mut once) {
                // Silent, and logged.
                vcpu.write(RAM, 1).unwrap();
                vcpu.write(RAM, 100).unwrap();
            }
        });
        assert_eq!(machine.sync(), [run(RAM, 1, 2)]);
        assert_eq!(machine.sync(), [run(RAM, 100, 1)]);
        assert_eq!(machine.vm.version(RAM, 1), Some(2));
        // The hook holds the vCPU, which holds the machine, which holds the hook.
        machine.vm.on_reset(|_| ());
    }
}

#[test]
fn a_ring_of_another_size_is_refused() {
    let machine = Machine::new();
    let other = SimVm::new(SimConfig::default()).add_vcpu();
    let refused = machine.log.attach_ring(other.ring_memory());
    let Err(AttachError::Size { found, expected }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((found, expected), (4096, 64));
    assert_eq!(machine.log.stats().vcpus.len(), 1);
    let not_kvm = machine.log.attach_vcpu(&io::stdin());
    assert!(matches!(not_kvm, Err(AttachError::NotKvm)));
}

#[test]
fn a_ring_is_attached_once() {
    let machine = Machine::new();
    let twice = machine.log.attach_ring(machine.vcpu.ring_memory());
    assert!(matches!(twice, Err(AttachError::Twice)), "{twice:?}");
    // Another vCPU's is welcome.
    let other = machine.vm.add_vcpu();
    machine.log.attach_ring(other.ring_memory()).unwrap();
}

/// Somebody else's ioctl recycles what the log has marked: one reset looks short, no later one.
#[test]
fn a_reset_by_somebody_else_is_forgiven() {
    let mut machine = Machine::new();
    machine.write(0..10);
    assert_eq!(machine.ring.harvest_and_stop(), 10);
    assert_eq!(machine.vm.reset().unwrap(), 10.into());
    machine.sync();
    assert_eq!(machine.log.stats().short_resets, 1);
    machine.rearm();
    machine.sync();
    machine.write([5]);
    assert_eq!(machine.sync(), [run(RAM, 5, 1)]);
    assert_eq!(machine.sync(), []);
    assert_eq!(machine.log.stats().short_resets, 1);
}

/// Everything that may look at a ring keeps it mapped: the log, the vCPU's thread, the reaper.
#[test]
fn a_ring_is_unmapped_last() {
    const ENTRIES: u32 = 64;
    let mapped = Arc::new(());
    let is_mapped = || Arc::strong_count(&mapped) > 1;
    let attached = || {
        let words: Box<[AtomicU64]> = (0..2 * ENTRIES).map(|_| AtomicU64::new(0)).collect();
        let start = NonNull::from(&*words).cast();
        let owner = Box::new((words, Arc::clone(&mapped)));
        // SAFETY: the owner keeps the words, of which an entry has two; they are reached by nobody
        // else, and any bytes are an entry.
        let memory = unsafe { RingMemory::new(start, ENTRIES, owner) };
        let log = DirtyLog::with_kernel(Box::new(SimVm::new(SimConfig::default())), ENTRIES);
        let ring = log.attach_ring(memory).unwrap();
        (log, ring)
    };
    let (log, ring) = attached();
    drop(log);
    assert_eq!((ring.occupancy(), is_mapped()), (0, true));
    drop(ring);
    assert!(!is_mapped());

    let (log, ring) = attached();
    drop(ring);
    assert_eq!((log.reap().unwrap(), is_mapped()), (0, true));
    let reaper = Reaper::spawn(&log, Fixed::default()).unwrap();
    drop(log);
    assert!(is_mapped());
    reaper.stop().unwrap();
    assert!(!is_mapped());
}

/// Entries that somebody else has marked do not stand in, later, for some that a reset has left.
#[test]
fn entries_marked_by_somebody_else_hide_no_short_reset() {
    let mut machine = Machine::new();
    let other = machine.vm.add_vcpu();
    for page in 200..210 {
        other.write(RAM, page).unwrap();
    }
    RingView::new(other.ring_memory()).harvest(|_, _| ());
    machine.write([50]);
    machine.sync();
    machine.write(0..10);
    machine.vm.inject([ResetFault::Short { after: 5 }]);
    machine.sync();
    assert_eq!(machine.log.stats().short_resets, 1);
    machine.write([3]);
    assert!(machine.sync().contains(&run(RAM, 0, 10)), "page 3 is lost");
}
