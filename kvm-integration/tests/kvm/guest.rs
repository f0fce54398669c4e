// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tiny guest itself: every other test rests on what it is believed to do.

use std::collections::HashMap;
use std::slice::from_ref;
use std::sync::Arc;
use std::time::Duration;

use kvm_integration::program::{split_stamp, stamp_offset};
use kvm_integration::{
    Action, Exit, GuestMemory, Load, Mode, PAGE_SIZE, Region, TinyVcpu, TinyVm, VcpuError,
    VcpuThread, VmError, Workload, kvm_available,
};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, chain};
use super::machine::{
    gpa, nap, page_of, pause, resume, run_passes, stop, wait, wait_beside, wait_paused,
};
use super::scale::scaled;

tests![
    stores_what_its_progress_says,
    stands_still_while_paused,
    stops_and_goes_on,
    handlers_end_it,
    slots_come_and_go,
    misuse_is_refused,
];

const REGIONS: [Region; 2] = [
    Region {
        gpa: 1 << 30,
        pages: 1500,
    },
    Region {
        gpa: 100 << 30,
        pages: 548,
    },
];

/// A machine without dirty rings and its memory, logged, as slots 1 and 2.
fn machine() -> Result<(TinyVm, Vec<Arc<GuestMemory>>), Failed> {
    let vm = TinyVm::new(&kvm_available()?)?;
    let add = |(id, region): (u32, &Region)| {
        let memory = Arc::new(GuestMemory::new(region.pages)?);
        vm.add_slot(id, region.gpa, Arc::clone(&memory), true)?;
        Ok::<_, Failed>(memory)
    };
    let memory: Result<_, _> = (1..).zip(&REGIONS).map(add).collect();
    Ok((vm, memory?))
}

fn spawn(vm: &TinyVm, index: u32, load: &Load) -> Result<VcpuThread, Failed> {
    let vcpu = vm.create_vcpu(index, load)?;
    Ok(VcpuThread::spawn(vcpu, |_exit| Action::Continue)?)
}

/// Sixteen pages of the first slot.
fn short_list() -> Vec<u64> {
    (0..16)
        .map(|page| REGIONS[0].gpa + page * PAGE_SIZE)
        .collect()
}

/// Each workload in each mode: every page is written, each with the stamp of its last store.
fn stores_what_its_progress_says() -> Outcome {
    const VCPUS: u32 = 2;
    for (mode, chunk) in [(Mode::Native, 0), (Mode::Native, 128), (Mode::Emulated, 32)] {
        for workload in Workload::ALL {
            let (vm, memory) = machine()?;
            let pages = REGIONS.iter().map(|region| region.pages).sum();
            let length = workload.covering_length(pages, VCPUS, chunk);
            let list = |vcpu| workload.addresses(1, vcpu, VCPUS, &REGIONS, length);
            let load = |vcpu| Load::new(mode, list(vcpu)).chunk(chunk);
            let vcpus: Result<Vec<_>, _> = (0..VCPUS)
                .map(|vcpu| spawn(&vm, vcpu, &load(vcpu)))
                .collect();
            let vcpus = vcpus?;
            run_passes(&vcpus, 3)?;
            for vcpu in stop(vcpus)? {
                check_stamps(&vcpu, &load(vcpu.index()), &memory)?;
            }
            for (id, memory) in (1..).zip(&memory) {
                let log = vm.vm_fd().get_dirty_log(id, memory.bytes() as usize)?;
                let dirty: u32 = log.iter().map(|word| word.count_ones()).sum();
                assert_eq!(u64::from(dirty), memory.pages(), "{workload} {mode:?}");
            }
        }
    }
    Ok(Completed)
}

/// Each page's stamp must be that of the last store to it, up to the one step of stores that may
/// not have been reported yet.
fn check_stamps(vcpu: &TinyVcpu, load: &Load, memory: &[Arc<GuestMemory>]) -> Result<(), Failed> {
    let (list, step) = (&load.list, load.granule());
    let (stores, length) = (vcpu.progress().stores(), list.len() as u64);
    let last_of = |stores: u64| -> HashMap<u64, u64> {
        let from = stores.saturating_sub(length);
        (from..stores)
            .map(|n| (list[(n % length) as usize], n / length + 1))
            .collect()
    };
    let (least, most) = (last_of(stores), last_of(stores + step));
    for (page, pass) in least {
        let holds =
            |region: &Region| (region.gpa..region.gpa + region.pages * PAGE_SIZE).contains(&page);
        let slot = REGIONS.iter().position(holds);
        let slot = slot.ok_or("a page that is in no region")?;
        let at = page - REGIONS[slot].gpa + stamp_offset(vcpu.index());
        let stamp = split_stamp(memory[slot].read_u64(at));
        let (index, found) = stamp.ok_or_else(|| format!("{page:#x} has no stamp"))?;
        assert_eq!(index, vcpu.index());
        let wanted = pass..=most[&page];
        assert!(
            wanted.contains(&found),
            "{page:#x} has stamp {found}, not {wanted:?}"
        );
    }
    Ok(())
}

/// Paused is paused, at whatever moment, and through signals; resumed is running.
fn stands_still_while_paused() -> Outcome {
    let (vm, _) = machine()?;
    let mut vcpus = Vec::new();
    for (mode, chunk) in [(Mode::Native, 0), (Mode::Native, 16), (Mode::Emulated, 16)] {
        let load = Load::new(mode, short_list()).chunk(chunk);
        vcpus.push(spawn(&vm, vcpus.len() as u32, &load)?);
    }
    let progress =
        |vcpus: &[VcpuThread]| -> Vec<u64> { vcpus.iter().map(VcpuThread::progress).collect() };
    for _ in 0..scaled(200, 10) {
        pause(&vcpus)?;
        let still = progress(&vcpus);
        vcpus.iter().for_each(VcpuThread::interrupt);
        nap(Duration::from_micros(100));
        assert_eq!(still, progress(&vcpus), "a paused vCPU went on");
        assert!(vcpus[0].pause(), "pausing twice is pausing once");
        resume(&vcpus);
        wait_beside(&vcpus, "progress after resuming", || {
            vcpus.iter().for_each(VcpuThread::interrupt);
            progress(&vcpus)
                .iter()
                .zip(&still)
                .all(|(now, still)| now > still)
        })?;
    }
    // As fast as can be, a resume right behind each request.
    for _ in 0..scaled(2000, 100) {
        vcpus[1].request_pause();
        vcpus[1].resume();
    }
    run_passes(&vcpus, 1)?;
    stop(vcpus)?;
    Ok(Completed)
}

/// A vCPU that was stopped starts again where it was, and no chunk is counted twice or left out.
fn stops_and_goes_on() -> Outcome {
    let (vm, _) = machine()?;
    let mut vcpu = vm.create_vcpu(0, &Load::new(Mode::Native, short_list()).chunk(8))?;
    for round in 1..=30 {
        vcpu = VcpuThread::spawn(vcpu, |exit| {
            assert_eq!(exit, Exit::Chunk);
            Action::Stop
        })?
        .join()?;
        assert_eq!(vcpu.progress().stores(), round * 8);
    }
    let vcpu = VcpuThread::spawn(vcpu, |_exit| Action::Pause)?;
    for round in 31..=60 {
        wait_paused(from_ref(&vcpu))?;
        assert_eq!(vcpu.progress(), round * 8);
        vcpu.resume();
    }
    vcpu.stop()?;
    Ok(Completed)
}

/// Errors and panics of a handler end the thread, and nobody waits for it any more.
fn handlers_end_it() -> Outcome {
    let (vm, _) = machine()?;
    let load = Load::new(Mode::Native, short_list()).chunk(16);
    let failing = VcpuThread::spawn(vm.create_vcpu(0, &load)?, |_| Action::Fail("no".into()))?;
    wait("the end of the vCPU", || failing.ended())?;
    assert!(!failing.pause());
    // Nor for anything that it might have done.
    let failing = [failing];
    let waited = wait_beside(&failing, "nothing", || false).expect_err("it has ended");
    let why = "vCPU 0 has ended: the handler of vCPU 0 failed: no; this was waited for: nothing";
    assert_eq!(waited.message(), Some(why));
    let [failing] = failing;
    let error = failing.join().expect_err("its handler failed");
    assert_eq!(chain(&error), "the handler of vCPU 0 failed: no");
    let panicking = VcpuThread::spawn(vm.create_vcpu(1, &load)?, |_| {
        // As a panic without the message of one.
        std::panic::resume_unwind(Box::new("on purpose"))
    })?;
    wait("the end of the vCPU", || panicking.ended())?;
    let why = panicking.why_ended().ok_or("it has not ended")?;
    assert!(why.ends_with("by a panic"), "{why}");
    let error = panicking.stop().expect_err("its handler panicked");
    assert!(
        matches!(error, VcpuError::Panicked { index: 1, .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("on purpose"), "{error}");
    Ok(Completed)
}

/// Slots change under running vCPUs; a store to none of them is an error, not a hang.
fn slots_come_and_go() -> Outcome {
    let (vm, memory) = machine()?;
    let vcpus = [spawn(&vm, 0, &Load::new(Mode::Native, short_list()))?];
    run_passes(&vcpus, 2)?;
    vm.set_logged(1, false)?;
    run_passes(&vcpus, 2)?;
    vm.set_logged(1, true)?;
    run_passes(&vcpus, 2)?;
    vm.remove_slot(1)?;
    // Once its memory is nobody's, the machine has let go of it.
    assert_eq!(Arc::strong_count(&memory[0]), 1);
    wait("the end of the vCPU", || vcpus[0].ended())?;
    let [vcpu] = vcpus;
    let error = vcpu.join().expect_err("its memory is gone");
    assert!(error.to_string().contains("MMIO"), "{error}");

    vm.add_slot(7, gpa(3), Arc::clone(&memory[0]), true)?;
    let list = (0..16).map(|page| page_of(3, page)).collect();
    let vcpus = [spawn(&vm, 1, &Load::new(Mode::Native, list))?];
    run_passes(&vcpus, 2)?;
    stop(vcpus)?;
    Ok(Completed)
}

fn misuse_is_refused() -> Outcome {
    let (vm, memory) = machine()?;
    let add = |id, gpa| vm.add_slot(id, gpa, Arc::clone(&memory[0]), true);
    assert!(matches!(vm.remove_slot(0), Err(VmError::NoSlot { id: 0 })));
    assert!(matches!(
        vm.set_logged(9, true),
        Err(VmError::NoSlot { id: 9 })
    ));
    assert!(matches!(add(1, gpa(5)), Err(VmError::SlotExists { id: 1 })));
    assert!(matches!(
        add(3, 4096),
        Err(VmError::SlotPlace { id: 3, .. })
    ));
    assert!(matches!(
        add(3, gpa(5) + 8),
        Err(VmError::SlotPlace { id: 3, .. })
    ));
    assert!(
        matches!(add(3, REGIONS[0].gpa), Err(VmError::Kvm { .. })),
        "an overlap"
    );
    let load = Load::new(Mode::Native, short_list());
    let create = |index, load: &Load| vm.create_vcpu(index, load).map(drop);
    assert!(matches!(
        create(99, &load),
        Err(VmError::VcpuIndex { index: 99, .. })
    ));
    let odd = load.clone().chunk(5);
    assert!(matches!(
        create(0, &odd),
        Err(VmError::List { index: 0, .. })
    ));
    create(0, &load)?;
    assert!(
        matches!(create(0, &load), Err(VmError::Kvm { .. })),
        "a second vCPU 0"
    );
    let pinned = VcpuThread::spawn_pinned(vm.create_vcpu(1, &load)?, 9999, |_| Action::Stop);
    assert!(matches!(pinned, Err(VcpuError::Pin { .. })));
    Ok(Completed)
}
