// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vCPUs that are unplugged, parked, and plugged in again. KVM keeps each for the life of its VM.

use kvm_dirty_ring::error::AttachError;
use kvm_integration::Workload;
use libtest_mimic::Completion::Completed;

use super::harness::Outcome;
use super::machine::{
    Machine, assert_unsuspicious, pause, resume, run_passes, serve, slot_id, stop,
};

tests![
    what_an_unplugged_vcpu_wrote_is_found,
    a_parked_vcpu_is_plugged_in_again,
];

/// The vCPU's thread has ended, its `VcpuRing` is dropped, even its descriptor is closed: the
/// entries that it left in the ring are harvested all the same.
fn what_an_unplugged_vcpu_wrote_is_found() -> Outcome {
    let mut machine = Machine::new(4096, &[2048])?;
    let mut vcpus = machine.spawn_all(Workload::Walk, 2)?;
    run_passes(&vcpus, 1)?;
    machine.finish(&vcpus)?;
    resume(&vcpus);
    run_passes(&vcpus, 2)?;
    pause(&vcpus)?;
    let waiting = || {
        let mut rings = Vec::new();
        machine.log.observe(&mut rings);
        rings[1].waiting
    };
    assert!(waiting() > 0);
    drop(stop(vcpus.pop())?);
    assert!(waiting() > 0, "the entries went with the vCPU");
    machine.round()?;
    machine.compare()?;
    assert!(machine.dirty().contains(slot_id(1), 2047));
    // The other one goes on.
    resume(&vcpus);
    run_passes(&vcpus, 1)?;
    machine.finish(&vcpus)?;
    stop(vcpus)?;
    assert_eq!(machine.log.stats().vcpus.len(), 2);
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// Only its descriptor is kept, as QEMU does; what the vCPU's thread had is gone.
fn a_parked_vcpu_is_plugged_in_again() -> Outcome {
    let mut machine = Machine::new(1024, &[2048])?;
    let mut vcpus = machine.spawn_all(Workload::Random, 2)?;
    for _ in 0..10 {
        run_passes(&vcpus, 1)?;
        let parked = stop(vcpus.pop())?.remove(0);
        machine.round()?;
        run_passes(&vcpus, 1)?;
        let ring = machine.log.attach_vcpu(parked.fd())?;
        let twice = machine.log.attach_vcpu(parked.fd());
        assert!(matches!(twice, Err(AttachError::Twice)), "{twice:?}");
        vcpus.push(serve(parked, ring)?);
        // More than a ring full, so that it must make room by itself.
        run_passes(&vcpus, 2)?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    let stats = machine.log.stats();
    assert_eq!(stats.vcpus.len(), 2);
    assert!(stats.vcpus[1].full_exits > 0, "{stats:?}");
    assert_unsuspicious(&stats);
    Ok(Completed)
}
