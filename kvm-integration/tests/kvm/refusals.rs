// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What KVM or the crate refuses, each as an error of its own, and that the VM is none the worse
//! for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::slice::from_ref;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NR_MEMSLOTS, kvm_enable_cap};
use kvm_dirty_ring::error::{AttachError, EnableError, RingSizeError};
use kvm_dirty_ring::sim::{SimConfig, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, HostSupport, RingEntries, WorkingSet};
use kvm_integration::{
    Action, Exit, GuestMemory, Host, Load, Mode, PAGE_SIZE, TinyVcpu, TinyVm, VcpuThread, Workload,
    kvm_available,
};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::Outcome;
use super::machine::{
    Machine, assert_unsuspicious, gpa, host_page_size, page_of, pause, resume, run_passes, slot_id,
    stop, wait_paused,
};

tests![
    ring_sizes,
    no_vm,
    by_borrowed_descriptors,
    twice,
    twice_takes_no_entries,
    after_a_vcpu,
    manual_protection,
    initially_set_after_the_log,
    initially_set_when_a_slot_is_created,
    slots_of_the_vmm_are_left_alone,
    no_vcpu,
    vcpu_of_a_vm_without_rings,
    vcpu_of_a_vm_with_other_rings,
    ring_of_another_size,
];

fn entries() -> RingEntries {
    RingEntries::new(1024).expect("every host has rings of 1,024 entries")
}

fn vm() -> Result<TinyVm, Failed> {
    Ok(TinyVm::new(&kvm_available()?)?)
}

/// A vCPU with nothing much to do, of a VM with a slot for it.
fn vcpu(vm: &TinyVm) -> Result<TinyVcpu, Failed> {
    Ok(vm.create_vcpu(0, &Load::new(Mode::Native, vec![page_of(1, 0)]))?)
}

/// After a refusal the rings can still be enabled, and they work.
fn still_works(vm: TinyVm) -> Result<(), Failed> {
    let log = DirtyLog::enable(vm.vm_fd(), entries())?;
    log.add_slot(slot_id(1), 16)?;
    let memory = Arc::new(GuestMemory::new(16)?);
    if vm.slot_memory(1).is_none() {
        vm.add_slot(1, gpa(1), memory, true)?;
    }
    let vcpu = vcpu(&vm)?;
    let _ring = log.attach_vcpu(vcpu.fd())?;
    let vcpu = VcpuThread::spawn(vcpu, |exit| {
        Action::Fail(format!("an exit was not asked for: {exit:?}").into())
    })?;
    run_passes(from_ref(&vcpu), 2)?;
    stop([vcpu])?;
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty)?;
    let runs: Vec<_> = dirty
        .runs()
        .map(|run| (run.first_page, run.pages))
        .collect();
    assert_eq!(runs, [(0, 1)]);
    Ok(())
}

fn ring_sizes() -> Outcome {
    let max = HostSupport::query()?.max_entries;
    assert!((1024..=65_536).contains(&max), "{max} entries at most");
    for entries in [0, 3, 1000, 65_535] {
        let expected = RingSizeError::NotPowerOfTwo { entries };
        assert_eq!(RingEntries::new(entries), Err(expected));
    }
    // A page of 16-byte entries.
    let least = u32::try_from(host_page_size() / 16)?;
    let (entries, min) = (least / 2, least);
    let refused = RingSizeError::TooSmall { entries, min };
    assert_eq!(RingEntries::new(entries), Err(refused));
    let large = RingEntries::new(131_072);
    assert!(
        matches!(
            large,
            Err(RingSizeError::TooLarge {
                entries: 131_072,
                max: 65_536
            })
        ),
        "{large:?}"
    );

    let largest = DirtyLog::enable(vm()?.vm_fd(), RingEntries::new(max)?)?;
    assert_eq!(largest.ring_entries(), max);
    // A page is enough, but for the entries that page-modification logging reserves.
    let vm = vm()?;
    match DirtyLog::enable(vm.vm_fd(), RingEntries::new(least)?) {
        Ok(log) => {
            assert_eq!(log.ring_entries(), least);
            assert!(least >= 1024 || !Host::detect().has_pml());
        }
        Err(EnableError::RingSize(RingSizeError::TooSmall { entries, min })) => {
            assert_eq!((entries, min), (least, 1024));
            assert!(Host::detect().has_pml());
            still_works(vm)?;
        }
        Err(other) => return Err(other.into()),
    }
    Ok(Completed)
}

fn no_vm() -> Outcome {
    let refused = |result: Result<DirtyLog, EnableError>| {
        assert!(matches!(result, Err(EnableError::NotAVm)), "{result:?}");
    };
    refused(DirtyLog::enable(&File::open("/dev/null")?, entries()));
    refused(DirtyLog::enable(&kvm_available()?, entries()));
    refused(DirtyLog::enable(vcpu(&vm()?)?.fd(), entries()));
    Ok(Completed)
}

/// As a jail has them: descriptors that were opened elsewhere.
fn by_borrowed_descriptors() -> Outcome {
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")?;
    assert_eq!(HostSupport::query_fd(&kvm)?, HostSupport::query()?);
    let tiny = vm()?;
    // SAFETY: `tiny` has it open until the end.
    let borrowed = unsafe { BorrowedFd::borrow_raw(tiny.vm_fd().as_raw_fd()) };
    let owned = borrowed.try_clone_to_owned()?;
    // A VM is no host, and a host no VM.
    assert!(HostSupport::query_fd(&owned).is_err());
    let refused = DirtyLog::enable_fd(&kvm, entries());
    assert!(matches!(refused, Err(EnableError::NotAVm)), "{refused:?}");
    let log = DirtyLog::enable_fd(&owned, entries())?;
    // The log has a descriptor of its own.
    drop(owned);
    let vcpu = vcpu(&tiny)?;
    // SAFETY: as above, for `vcpu`.
    let borrowed = unsafe { BorrowedFd::borrow_raw(vcpu.fd().as_raw_fd()) };
    let ring = log.attach_vcpu_fd(borrowed)?;
    assert_eq!(ring.occupancy(), 0);
    drop((ring, log, vcpu));
    let tiny = vm()?;
    // SAFETY: as above.
    let borrowed = unsafe { BorrowedFd::borrow_raw(tiny.vm_fd().as_raw_fd()) };
    let log = DirtyLog::enable_bitmap_fd(borrowed)?;
    assert_eq!(log.mode(), kvm_dirty_ring::Mode::Bitmap);
    Ok(Completed)
}

/// Enabled rings and an existing vCPU look the same, once there is a memslot, where they have bitmaps beside
/// them.
fn refused_again(machine: &Machine) -> Result<(), Failed> {
    let with_bitmap = HostSupport::query()?.with_bitmap;
    match DirtyLog::enable(machine.vm.vm_fd(), entries()) {
        Err(EnableError::AlreadyEnabled) if !with_bitmap => Ok(()),
        Err(EnableError::TooLate) if with_bitmap => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

fn twice() -> Outcome {
    let mut machine = Machine::new(1024, &[64])?;
    refused_again(&machine)?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    refused_again(&machine)?;
    run_passes(&vcpus, 2)?;
    machine.finish(&vcpus)?;
    assert_eq!(machine.dirty().page_count(), 64);
    Ok(Completed)
}

/// Finding out that the rings are on must not recycle what their log has marked.
fn twice_takes_no_entries() -> Outcome {
    let mut machine = Machine::new(1024, &[64])?;
    let load = machine.load(Workload::Walk, 0, 1).pass_exits();
    let (vcpu, mut ring) = machine.attach(0, &load)?;
    let thread = VcpuThread::spawn(vcpu, |exit| match exit {
        Exit::PassDone => Action::Pause,
        _ => Action::Continue,
    })?;
    wait_paused(from_ref(&thread))?;
    assert_eq!(ring.harvest_and_stop(), 64);
    refused_again(&machine)?;
    machine.round()?;
    assert_eq!(machine.dirty().page_count(), 64);
    assert_unsuspicious(&machine.log.stats());
    stop([thread])?;
    Ok(Completed)
}

fn after_a_vcpu() -> Outcome {
    let vm = vm()?;
    vm.add_slot(1, gpa(1), Arc::new(GuestMemory::new(16)?), true)?;
    let vcpu = vcpu(&vm)?;
    let late = DirtyLog::enable(vm.vm_fd(), entries());
    match (HostSupport::query()?.with_bitmap, &late) {
        (false, Err(EnableError::VcpuOrReserve { .. })) | (true, Err(EnableError::TooLate)) => {}
        _ => panic!("{late:?}"),
    }
    let largest = RingEntries::new(HostSupport::query()?.max_entries)?;
    let late = DirtyLog::enable(vm.vm_fd(), largest);
    match (HostSupport::query()?.with_bitmap, &late) {
        (false, Err(EnableError::VcpuExists)) | (true, Err(EnableError::TooLate)) => {}
        _ => panic!("{late:?}"),
    }
    // The VM is what it was: without rings, and its guest runs.
    let vcpu = VcpuThread::spawn(vcpu, |_| Action::Continue)?;
    run_passes(from_ref(&vcpu), 2)?;
    stop([vcpu])?;
    let bitmap = vm.vm_fd().get_dirty_log(1, 16 * PAGE_SIZE as usize)?;
    assert_eq!(bitmap, [1]);
    Ok(Completed)
}

/// Switches manual protection: `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` is 1, `KVM_DIRTY_LOG_INITIALLY_SET` 2.
fn set_manual_protection(vm: &TinyVm, flags: u64) -> Result<(), Failed> {
    let mut protect = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    protect.args[0] = flags;
    Ok(vm.vm_fd().enable_cap(&protect)?)
}

/// The VMM switches it on once the rings are there. The log switches it off before the log of a slot begins, and before a slot is
/// protected anew.
fn initially_set_after_the_log() -> Outcome {
    const PAGES: u64 = 64;
    let mut machine = Machine::new(1024, &[PAGES])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    for _ in 0..3 {
        let set = |on| machine.vm.set_logged(1, on).map_err(io::Error::other);
        machine.log.stop_tracking(slot_id(1), || set(false))?;
        // All of it is mapped for writing.
        run_passes(&vcpus, 2)?;
        set_manual_protection(&machine.vm, 3)?;
        machine.log.start_tracking(slot_id(1), || set(true))?;
        assert_eq!(machine.round()?, PAGES);
        run_passes(&vcpus, 2)?;
        pause(&vcpus)?;
        assert_eq!(machine.round()?, PAGES, "after a start");
        machine.compare()?;
        // Open pages.
        machine.log.set_working_set(Some(WorkingSet::new(PAGES)));
        resume(&vcpus);
        run_passes(&vcpus, 2)?;
        pause(&vcpus)?;
        machine.round()?;
        set_manual_protection(&machine.vm, 3)?;
        machine.refresh()?;
        machine.log.set_working_set(None);
        machine.round()?;
        resume(&vcpus);
        run_passes(&vcpus, 2)?;
        pause(&vcpus)?;
        assert_eq!(machine.round()?, PAGES, "after a refresh");
        machine.compare()?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    Ok(Completed)
}

/// A slot that is created with its log has no page mapped that would have to be protected.
fn initially_set_when_a_slot_is_created() -> Outcome {
    const PAGES: u64 = 64;
    let mut machine = Machine::new(1024, &[])?;
    set_manual_protection(&machine.vm, 3)?;
    machine.add_slot(1, PAGES)?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    for _ in 0..3 {
        run_passes(&vcpus, 2)?;
        pause(&vcpus)?;
        assert_eq!(machine.round()?, PAGES);
        machine.compare()?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    Ok(Completed)
}

fn manual_protection() -> Outcome {
    let set = set_manual_protection;
    let enabled = vm()?;
    set(&enabled, 1)?;
    still_works(enabled)?;

    let initially_set = vm()?;
    set(&initially_set, 3)?;
    let refused = DirtyLog::enable(initially_set.vm_fd(), entries());
    assert!(
        matches!(refused, Err(EnableError::InitiallySet)),
        "{refused:?}"
    );
    set(&initially_set, 0)?;
    still_works(initially_set)?;
    Ok(Completed)
}

/// Finding out about manual protection makes a slot for a moment: where there is room for it. Hosts with bitmaps
/// beside rings refuse rings once there is a slot.
fn slots_of_the_vmm_are_left_alone() -> Outcome {
    let vm = vm()?;
    let slots = vm.vm_fd().check_extension_raw(KVM_CAP_NR_MEMSLOTS.into());
    let last = u32::try_from(slots)? - 1;
    let pages = 16;
    vm.add_slot(1, gpa(1), Arc::new(GuestMemory::new(pages)?), true)?;
    vm.add_slot(last, gpa(2), Arc::new(GuestMemory::new(1)?), true)?;
    if HostSupport::query()?.with_bitmap {
        let refused = DirtyLog::enable(vm.vm_fd(), entries());
        assert!(
            matches!(refused, Err(EnableError::SlotExists)),
            "{refused:?}"
        );
        return Ok(Completed);
    }
    still_works(vm)?;
    Ok(Completed)
}

fn no_vcpu() -> Outcome {
    let machine = Machine::new(1024, &[16])?;
    let refused = machine.log.attach_vcpu(&File::open("/dev/null")?);
    assert!(matches!(refused, Err(AttachError::Map(_))), "{refused:?}");
    let refused = machine.log.attach_vcpu(machine.vm.vm_fd());
    assert!(matches!(refused, Err(AttachError::Map(_))), "{refused:?}");

    let simulated = SimVm::new(SimConfig::default()).dirty_log();
    let vcpu = vcpu(&machine.vm)?;
    let refused = simulated.attach_vcpu(vcpu.fd());
    assert!(matches!(refused, Err(AttachError::NotKvm)), "{refused:?}");
    // None of these is a vCPU of the log's.
    assert_eq!(machine.log.stats().vcpus, []);
    machine.log.attach_vcpu(vcpu.fd())?;
    assert_eq!(machine.log.stats().vcpus.len(), 1);
    Ok(Completed)
}

/// KVM maps what it will not back, and the first look at such a ring is a SIGBUS.
fn vcpu_of_a_vm_without_rings() -> Outcome {
    let machine = Machine::new(1024, &[16])?;
    let refused = machine.log.attach_vcpu(vcpu(&vm()?)?.fd());
    assert!(matches!(refused, Err(AttachError::Map(_))), "{refused:?}");
    machine.log.reap()?;
    Ok(Completed)
}

fn vcpu_of_a_vm_with_other_rings() -> Outcome {
    let machine = Machine::new(4096, &[16])?;
    let other = Machine::new(1024, &[16])?;
    let refused = machine.log.attach_vcpu(vcpu(&other.vm)?.fd());
    assert!(matches!(refused, Err(AttachError::Map(_))), "{refused:?}");
    machine.log.reap()?;
    Ok(Completed)
}

fn ring_of_another_size() -> Outcome {
    let machine = Machine::new(1024, &[16])?;
    let ring = SimVm::new(SimConfig::default()).add_vcpu().ring_memory();
    let refused = machine.log.attach_ring(ring);
    let expected = matches!(
        refused,
        Err(AttachError::Size {
            found: 4096,
            expected: 1024
        })
    );
    assert!(expected, "{refused:?}");
    Ok(Completed)
}
