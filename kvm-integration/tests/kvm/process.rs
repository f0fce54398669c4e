// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What else is in the process: forks, other machines, descriptors that come and go.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Reaper, RingEntries};
use kvm_integration::{TinyVm, Workload, kvm_available};
use libtest_mimic::Completion::Completed;

use super::harness::Outcome;
use super::machine::{
    Machine, assert_unsuspicious, host_page_size, pause, resume, run_passes, serve, stop,
};
use super::raw::RING_OFFSET_PAGES;
use super::scale::scaled;

tests![
    rings_are_not_inherited,
    two_machines,
    descriptors_may_be_closed,
];

/// A child of this process that does nothing, until this is dropped.
struct Child(libc::pid_t);

impl Child {
    fn fork() -> Self {
        // SAFETY: the child of a process with threads may only make system calls, and that is all
        // that this one does.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: both take integers or nothing; the first ends the child with its parent.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            child => {
                assert!(child > 0, "fork failed");
                Self(child)
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child is ours and not waited for yet, so that its id is still its own.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// A child that wrote to a ring would mark entries of the guest for reset.
fn rings_are_not_inherited() -> Outcome {
    let mut machine = Machine::new(1024, &[256])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    run_passes(&vcpus, 1)?;
    // Mappings of a vCPU, from where its ring begins.
    let start = format!(" {:08x} ", RING_OFFSET_PAGES * host_page_size());
    let rings = |process: &str| {
        let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
        let is_vcpu = |line: &&str| line.contains("kvm-vcpu") && line.contains(&start);
        Ok::<_, io::Error>(maps.lines().filter(is_vcpu).count())
    };
    let before = rings("self")?;
    assert!(
        before > 0,
        "a ring cannot be distinguished from other mappings"
    );
    let child = Child::fork();
    assert_eq!(rings(&child.0.to_string())?, 0);
    assert_eq!(rings("self")?, before);
    // Neither the child nor its end disturbs the log.
    run_passes(&vcpus, 2)?;
    machine.finish(&vcpus)?;
    drop(child);
    resume(&vcpus);
    run_passes(&vcpus, 2)?;
    machine.finish(&vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// Nothing is global: each has its rings, its slots of the same ids, its reaper and its numbers.
fn two_machines() -> Outcome {
    let mut machines = [
        Machine::new(1024, &[2000])?,
        Machine::new(4096, &[300, 1000])?,
    ];
    let vcpus = [
        machines[0].spawn_all(Workload::Random, 2)?,
        machines[1].spawn_all(Workload::Walk, 2)?,
    ];
    let period = Fixed::new(Duration::from_millis(1));
    let reapers = [
        Reaper::spawn(&machines[0].log, period.clone())?,
        Reaper::spawn(&machines[1].log, period)?,
    ];
    for round in 0..scaled(20, 4) {
        run_passes(&vcpus[0], 1)?;
        run_passes(&vcpus[1], 1)?;
        // One stands still while the other runs, and its log with it.
        let still = (round % 2) as usize;
        machines[still].finish(&vcpus[still])?;
        let entries = machines[still].log.stats().entries;
        run_passes(&vcpus[1 - still], 1)?;
        machines[1 - still].round()?;
        assert_eq!(machines[still].round()?, 0);
        assert_eq!(machines[still].log.stats().entries, entries);
        machines[still].compare()?;
        resume(&vcpus[still]);
    }
    for (machine, vcpus) in machines.iter_mut().zip(&vcpus) {
        machine.finish(vcpus)?;
        assert_unsuspicious(&machine.log.stats());
    }
    // One ends; the other does not notice.
    let [first, mut second] = machines;
    let [first_vcpus, second_vcpus] = vcpus;
    let [first_reaper, second_reaper] = reapers;
    first_reaper.stop()?;
    stop(first_vcpus)?;
    drop(first);
    resume(&second_vcpus);
    run_passes(&second_vcpus, 3)?;
    second.finish(&second_vcpus)?;
    second_reaper.stop()?;
    assert_unsuspicious(&second.log.stats());
    Ok(Completed)
}

fn duplicate(file: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the file is borrowed for the call, so that its descriptor stays open.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }.try_clone_to_owned()
}

/// The log has descriptors of its own: the VMM may close those that it showed to the log, and their
/// numbers may go to other files.
fn descriptors_may_be_closed() -> Outcome {
    let vm = TinyVm::new(&kvm_available()?)?;
    let shown = duplicate(vm.vm_fd())?;
    let number = shown.as_raw_fd();
    let log = DirtyLog::enable(&shown, RingEntries::new(1024)?)?;
    drop(shown);
    let mut others = vec![File::open("/dev/null")?];
    while others.iter().all(|file| file.as_raw_fd() != number) {
        assert!(others.len() < 100, "the number is not given out again");
        others.push(File::open("/dev/null")?);
    }
    let mut machine = Machine::with(vm, log, &[500])?;
    let load = machine.load(Workload::Walk, 0, 1);
    let vcpu = machine.vm.create_vcpu(0, &load)?;
    let shown = duplicate(vcpu.fd())?;
    let ring = machine.log.attach_vcpu(&shown)?;
    drop(shown);
    let vcpus = [serve(vcpu, ring)?];
    run_passes(&vcpus, 2)?;
    machine.finish(&vcpus)?;
    assert_eq!(machine.dirty().page_count(), 500);
    assert_unsuspicious(&machine.log.stats());

    // The log outlives the machine, too: it holds what is left of it.
    resume(&vcpus);
    run_passes(&vcpus, 2)?;
    pause(&vcpus)?;
    let log = machine.log.clone();
    stop(vcpus)?;
    drop(machine);
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty)?;
    assert_eq!(dirty.page_count(), 500);
    Ok(Completed)
}
