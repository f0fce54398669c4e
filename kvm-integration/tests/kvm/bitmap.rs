// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log in bitmap mode, and that it says the same as with rings.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    kvm_enable_cap,
};
use kvm_dirty_ring::error::{AttachError, EnableError, SyncError};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{
    DirtyLog, DirtyPages, HostSupport, Mode, Reaper, RingEntries, SlotId, VcpuRing,
};
use kvm_integration::{GuestMemory, Load, PAGE_SIZE, TinyVm, Workload, kvm_available};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

use super::harness::Outcome;
use super::held_call::HeldCalls;
use super::machine::{
    Machine, assert_unsuspicious, gpa, nap, page_of, pause, resume, run_passes, slot_id, stop,
    wait_paused,
};
use super::scale::{at_most, scaled};

tests![
    last_sync_is_complete,
    a_page_written_before_the_clearing_is_kept,
    a_large_slot_is_cleared_in_parts,
    protection_is_as_the_vmm_wants_it,
    pages_that_begin_dirty_are_protected_on_demand,
    both_modes_say_the_same,
    a_removal_takes_what_was_written,
    a_slot_that_is_not_logged_is_dirty,
    a_slot_that_is_larger_in_kvm_is_dirty,
    a_slot_of_another_size_in_its_last_word_is_dirty,
    a_slot_that_kvm_cannot_have_is_dirty,
    what_is_refused,
    rings_behind_the_logs_back_are_noticed,
    auto_takes_bitmaps_where_there_are_no_rings,
];

fn entries() -> RingEntries {
    RingEntries::new(1024).expect("every host has rings of 1,024 entries")
}

fn vm() -> Result<TinyVm, Failed> {
    Ok(TinyVm::new(&kvm_available()?)?)
}

/// Lets `vcpus` vCPUs run for a moment, with syncs beside them, stops them, and wants everything.
fn stop_and_sync(machine: &mut Machine, vcpus: u32) -> Result<(), Failed> {
    let vcpus = machine.spawn_all(Workload::Random, vcpus)?;
    let reaper = Reaper::spawn(&machine.log, Adaptive::default())?;
    for round in 0..scaled(60, 4) {
        for _ in 0..3 {
            // So that they are met at no moment in particular.
            nap(Duration::from_micros(round * 37 % 1000));
            machine.round()?;
        }
        machine.finish(&vcpus)?;
        // Nobody has written since: nothing is left over.
        assert_eq!(machine.round()?, 0);
        resume(&vcpus);
    }
    run_passes(&vcpus, 1)?;
    machine.finish(&vcpus)?;
    reaper.stop()?;
    stop(vcpus)?;
    let stats = machine.log.stats();
    assert_unsuspicious(&stats);
    assert_eq!((stats.entries, stats.full_exits()), (0, 0));
    Ok(())
}

fn last_sync_is_complete() -> Outcome {
    // No whole words.
    let mut machine = Machine::with_bitmap(&[1500, 547])?;
    assert_eq!(machine.log.mode(), Mode::Bitmap);
    stop_and_sync(&mut machine, 4)?;
    Ok(Completed)
}

/// A page that is written after the bitmap was read keeps its bit: only those that were read are cleared.
fn a_page_written_before_the_clearing_is_kept() -> Outcome {
    const CLEAR_DIRTY_LOG: u32 = 0xc018_aec0;
    // Two words of one call.
    let machine = Machine::with_bitmap(&[128])?;
    let writer_of = |index, page| {
        let list = vec![page_of(1, page)];
        let load = Load::new(kvm_integration::Mode::Native, list).pass_exits();
        machine.spawn(index, &load)
    };
    let dirty = || {
        let mut dirty = DirtyPages::new();
        machine.log.sync(&mut dirty)?;
        Ok::<Vec<u64>, Failed>(dirty.pages().map(|(_, page)| page).collect())
    };
    // What the guest has not written is clean.
    assert_eq!(dirty()?, [0; 0]);
    let mut vcpus = vec![writer_of(0, 3)?, writer_of(1, 70)?];
    wait_paused(&vcpus)?;
    let (listener, held_calls) = mpsc::channel();
    thread::scope(|scope| {
        let sync = scope.spawn(|| {
            listener.send(HeldCalls::of_this_thread(CLEAR_DIRTY_LOG)?)?;
            dirty()
        });
        let between = || {
            let calls = held_calls.recv()?;
            let clearing = calls.wait()?;
            for (index, page) in [(2, 5), (3, 100)] {
                vcpus.push(writer_of(index, page)?);
            }
            let written = wait_paused(&vcpus);
            drop(clearing);
            written?;
            // The listener stays until the sync has ended.
            Ok::<_, Failed>((sync.join().expect("no panic")?, calls))
        };
        let (pages, _) = between()?;
        assert_eq!(pages, [3, 70]);
        Ok::<_, Failed>(())
    })?;
    assert_eq!(
        dirty()?,
        [5, 100],
        "pages written before the clearing were lost"
    );
    stop(vcpus)?;
    Ok(Completed)
}

/// More than a GiB, which more than one call clears: where there is something to clear.
fn a_large_slot_is_cleared_in_parts() -> Outcome {
    const GIB: u64 = 1 << 18;
    let whole = at_most(3, 1) * GIB;
    let mut machine = Machine::with_bitmap(&[whole + 70])?;
    let pages = [0, GIB - 1, GIB, whole + 1, whole + 69];
    let list = pages.map(|page| page_of(1, page));
    let load = Load::new(kvm_integration::Mode::Native, list.into()).pass_exits();
    let vcpu = [machine.spawn(0, &load)?];
    for _ in 0..3 {
        wait_paused(&vcpu)?;
        machine.round()?;
        let dirty = machine.dirty().pages().map(|(_, page)| page);
        assert_eq!(dirty.collect::<Vec<_>>(), pages);
        assert_eq!(machine.round()?, 0, "not cleared");
        // That all are protected shows in the next round, by their being dirty again.
        resume(&vcpu);
    }
    wait_paused(&vcpu)?;
    machine.round()?;
    machine.compare()?;
    stop(vcpu)?;
    Ok(Completed)
}

/// Manual protection with all pages initially set, or none of it, whenever the VMM says so.
fn protection_is_as_the_vmm_wants_it() -> Outcome {
    let set = |vm: &TinyVm, flags| {
        let mut protect = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        protect.args[0] = flags;
        vm.vm_fd().enable_cap(&protect)
    };
    for flags in [0, 1, 3] {
        let before = vm()?;
        set(&before, flags)?;
        let log = DirtyLog::enable_bitmap(before.vm_fd())?;
        let mut machine = Machine::with(before, log, &[700])?;
        assert_eq!(machine.round()?, 0, "{flags}");
        stop_and_sync(&mut machine, 1)?;

        let after = vm()?;
        let log = DirtyLog::enable_bitmap(after.vm_fd())?;
        set(&after, flags)?;
        let mut machine = Machine::with(after, log, &[700])?;
        let initially = if flags == 3 { 700 } else { 0 };
        assert_eq!(machine.round()?, initially, "{flags}");
        stop_and_sync(&mut machine, 1)?;
    }
    Ok(Completed)
}

/// The same guest, pass by pass: the same pages, and the same copy.
fn both_modes_say_the_same() -> Outcome {
    let mut reports = Vec::new();
    for mut machine in [
        Machine::new(4096, &[500, 1000])?,
        Machine::with_bitmap(&[500, 1000])?,
    ] {
        let load = machine.load(Workload::HotAndCold, 0, 1).pass_exits();
        let vcpu = [machine.spawn(0, &load)?];
        let mut report = Vec::new();
        for _ in 0..5 {
            wait_paused(&vcpu)?;
            machine.log.mark_dirty(slot_id(2), 998, 2)?;
            machine.round()?;
            report.push(machine.dirty().runs().collect::<Vec<_>>());
            machine.compare()?;
            resume(&vcpu);
        }
        wait_paused(&vcpu)?;
        stop(vcpu)?;
        reports.push(report);
    }
    assert!(!reports[0][0].is_empty());
    assert_eq!(reports[0], reports[1]);
    Ok(Completed)
}

fn a_removal_takes_what_was_written() -> Outcome {
    let mut machine = Machine::with_bitmap(&[64, 200])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    run_passes(&vcpus, 1)?;
    pause(&vcpus)?;
    let retired = machine.log.retire_slot(slot_id(2))?;
    // KVM has no bits of it any more: they are in the log.
    let left = machine
        .vm
        .vm_fd()
        .get_dirty_log(2, 200 * PAGE_SIZE as usize)?;
    assert!(left.iter().all(|&word| word == 0), "{left:x?}");
    machine.round()?;
    assert_eq!(
        machine.dirty().words(slot_id(2)),
        Some(&[u64::MAX, u64::MAX, u64::MAX, 0xff][..])
    );
    machine.compare()?;
    machine.delete_slot(2)?;
    assert_eq!(machine.round()?, 0, "of a slot that is no more");
    machine.log.finish_slot(&retired)?;
    // The next one of that id begins clean.
    machine.add_slot(2, 200)?;
    assert_eq!(machine.round()?, 0);
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// KVM's ENOENT.
fn a_slot_that_is_not_logged_is_dirty() -> Outcome {
    let mut machine = Machine::with_bitmap(&[64])?;
    assert_eq!(machine.round()?, 0);
    machine.log.add_slot(slot_id(2), 100)?;
    let mut dirty = DirtyPages::new();
    // Not there, and there without a bitmap.
    machine.log.sync(&mut dirty)?;
    assert_eq!(dirty.page_count(), 100);
    let memory = Arc::new(GuestMemory::new(100)?);
    machine.vm.add_slot(2, gpa(2), memory, false)?;
    machine.log.sync(&mut dirty)?;
    assert_eq!(dirty.page_count(), 100);
    assert_eq!(machine.log.stats().missing_bitmaps, 2);
    Ok(Completed)
}

/// KVM writes as many bits as its slot has pages: not past the log's buffer.
fn a_slot_that_is_larger_in_kvm_is_dirty() -> Outcome {
    let vm = vm()?;
    let log = DirtyLog::enable_bitmap(vm.vm_fd())?;
    log.add_slot(slot_id(1), 100)?;
    // 32 KiB of bits where 16 bytes are expected.
    let memory = Arc::new(GuestMemory::new(1 << 18)?);
    vm.add_slot(1, gpa(1), memory, true)?;
    let mut dirty = DirtyPages::new();
    for times in 1..=3 {
        log.sync(&mut dirty)?;
        assert_eq!(dirty.page_count(), 100);
        assert_eq!(log.stats().missing_bitmaps, times);
    }
    Ok(Completed)
}

/// KVM refuses to clear up to an end that is not its slot's, and clears nothing.
fn a_slot_of_another_size_in_its_last_word_is_dirty() -> Outcome {
    for (pages, in_kvm) in [(70, 100), (128, 100)] {
        let vm = vm()?;
        let log = DirtyLog::enable_bitmap(vm.vm_fd())?;
        let mut protect = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        // Its pages are dirty without a guest, by INITIALLY_SET.
        protect.args[0] = 3;
        vm.vm_fd().enable_cap(&protect)?;
        log.add_slot(slot_id(1), pages)?;
        vm.add_slot(1, gpa(1), Arc::new(GuestMemory::new(in_kvm)?), true)?;
        let mut dirty = DirtyPages::new();
        for times in 1..=3 {
            log.sync(&mut dirty)?;
            assert_eq!(dirty.page_count(), pages);
            assert_eq!(log.stats().missing_bitmaps, times);
        }
        drop(log.retire_slot(slot_id(1))?);
    }
    Ok(Completed)
}

/// `KVM_DIRTY_LOG_INITIALLY_SET`, switched on after the log: KVM protects no page when a slot's log starts, all are dirty, and
/// each chunk is protected when it is read. Here while the guest writes.
fn pages_that_begin_dirty_are_protected_on_demand() -> Outcome {
    const PAGES: u64 = 1500;
    let mut machine = Machine::with_bitmap(&[PAGES])?;
    let mut protect = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    protect.args[0] = 3;
    machine.vm.vm_fd().enable_cap(&protect)?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    for round in 0..scaled(10, 2) {
        for on in [false, true] {
            pause(&vcpus)?;
            let set = || machine.vm.set_logged(1, on).map_err(io::Error::other);
            match on {
                true => machine.log.start_tracking(slot_id(1), set)?,
                false => machine.log.stop_tracking(slot_id(1), set)?,
            }
            if on {
                let bits = machine
                    .vm
                    .vm_fd()
                    .get_dirty_log(1, (PAGES * PAGE_SIZE) as usize)?;
                let set: u32 = bits.iter().map(|word| word.count_ones()).sum();
                assert!(u64::from(set) >= PAGES, "{set} pages begin dirty");
            }
            resume(&vcpus);
            run_passes(&vcpus, 1)?;
        }
        assert_eq!(machine.round_on_demand(64 << (round % 4))?, PAGES);
        run_passes(&vcpus, 2)?;
        // The guest has written each page, and with KVM's bit of each all are found.
        assert_eq!(machine.round_on_demand(64)?, PAGES);
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// It keeps no other slot from being synced, nor from being removed.
fn a_slot_that_kvm_cannot_have_is_dirty() -> Outcome {
    for slot in [SlotId::new(0, 40_000), SlotId::new(1, 7)] {
        let mut machine = Machine::with_bitmap(&[64])?;
        machine.log.add_slot(slot, 100)?;
        let mut dirty = DirtyPages::new();
        for times in 1..=3 {
            machine.log.sync(&mut dirty)?;
            assert_eq!(dirty.page_count(), 100);
            assert_eq!(machine.log.stats().missing_bitmaps, times);
        }
        let retired = machine.log.retire_slot(slot)?;
        machine.log.finish_slot(&retired)?;
        assert_eq!(machine.round()?, 0);
    }
    Ok(Completed)
}

/// Bitmaps don't have what a vCPU writes that has a ring.
fn has_ring(attached: Result<VcpuRing, AttachError>) {
    assert!(
        matches!(attached, Err(AttachError::HasRing)),
        "{attached:?}"
    );
}

fn what_is_refused() -> Outcome {
    let no_vm = |result: Result<DirtyLog, EnableError>| {
        assert!(matches!(result, Err(EnableError::NotAVm)), "{result:?}");
    };
    no_vm(DirtyLog::enable_bitmap(&File::open("/dev/null")?));
    no_vm(DirtyLog::enable_bitmap(&kvm_available()?));

    let rings = Machine::new(1024, &[64])?;
    let late = DirtyLog::enable_bitmap(rings.vm.vm_fd());
    let twice = DirtyLog::enable_auto(rings.vm.vm_fd(), entries());
    if HostSupport::query()?.with_bitmap {
        // It has both from then on, and no descriptor of its own shows the rings.
        assert!(matches!(twice, Err(EnableError::TooLate)), "{twice:?}");
        let load = rings.load(Workload::Walk, 0, 1);
        let vcpu = rings.vm.create_vcpu(0, &load)?;
        has_ring(late?.attach_vcpu(vcpu.fd()));
    } else {
        // Rings that were refused are no reason for bitmaps.
        for refused in [late, twice] {
            let enabled = matches!(refused, Err(EnableError::AlreadyEnabled));
            assert!(enabled, "{refused:?}");
        }
    }

    let machine = Machine::with_bitmap(&[64])?;
    let load = machine.load(Workload::Walk, 0, 1);
    let (vcpu, mut ring) = machine.attach(0, &load)?;
    let again = machine.log.attach_vcpu(vcpu.fd());
    assert!(matches!(again, Err(AttachError::Twice)), "{again:?}");
    assert_eq!(ring.occupancy(), 0);
    ring.on_full()?;
    Ok(Completed)
}

/// The bitmaps are gone then, or have nothing that vCPUs write, and no sync takes that for clean.
fn rings_behind_the_logs_back_are_noticed() -> Outcome {
    let mut machine = Machine::with_bitmap(&[64])?;
    machine.round()?;
    match DirtyLog::enable(machine.vm.vm_fd(), entries()) {
        // The latter where bitmaps beside them come too late: the rings are enabled all the same.
        Ok(_) | Err(EnableError::SlotExists) => {}
        Err(error) => return Err(error.into()),
    }
    let load = machine.load(Workload::Walk, 0, 1);
    let vcpu = machine.vm.create_vcpu(0, &load)?;
    has_ring(machine.log.attach_vcpu(vcpu.fd()));
    let synced = machine.log.sync(&mut DirtyPages::new());
    match synced {
        Err(SyncError::Bitmap(error)) => assert_eq!(error.raw_os_error(), Some(libc::ENXIO)),
        other => panic!("{other:?}"),
    }
    Ok(Completed)
}

/// A filter by which KVM seems to have no dirty rings: a query for them returns 0.
fn without_rings() -> Result<BpfProgram, Failed> {
    const CHECK_EXTENSION: u64 = 0xae03;
    let mut rules = Vec::new();
    for cap in [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL] {
        let equal = |place, value| SeccompCondition::new(place, Dword, SeccompCmpOp::Eq, value);
        rules.push(SeccompRule::new(vec![
            equal(1, CHECK_EXTENSION)?,
            equal(2, cap.into())?,
        ])?);
    }
    let rules = BTreeMap::from([(libc::SYS_ioctl, rules)]);
    let (others, these) = (SeccompAction::Allow, SeccompAction::Errno(0));
    let filter = SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}

fn auto_takes_bitmaps_where_there_are_no_rings() -> Outcome {
    let log = DirtyLog::enable_auto(vm()?.vm_fd(), entries())?;
    assert_eq!(log.mode(), Mode::Rings);

    let (vm, filter) = (vm()?, without_rings()?);
    let enable = || {
        apply_filter(&filter).expect("a filter for the thread");
        let rings = DirtyLog::enable(vm.vm_fd(), entries());
        assert!(matches!(rings, Err(EnableError::NoDirtyRing)), "{rings:?}");
        DirtyLog::enable_auto(vm.vm_fd(), entries())
    };
    let log = thread::scope(|scope| scope.spawn(enable).join()).expect("no panic")?;
    assert_eq!(log.mode(), Mode::Bitmap);
    let mut machine = Machine::with(vm, log, &[300])?;
    stop_and_sync(&mut machine, 2)?;
    Ok(Completed)
}
