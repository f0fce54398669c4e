//! vCPUs that are unplugged and plugged in again, on the simulated kernel.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use kvm_dirty_ring::error::AttachError;
use kvm_dirty_ring::sim::WriteError;
use scenario::{Machine, RAM, run};

#[test]
fn a_ring_is_harvested_without_its_vcpu() {
    let mut machine = Machine::new();
    let vcpu = machine.vm.add_vcpu();
    let ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
    vcpu.write(RAM, 5).unwrap();
    drop(ring);
    vcpu.write(RAM, 6).unwrap();
    assert_eq!(machine.sync(), [run(RAM, 5, 2)]);
    assert_eq!(vcpu.used(), 0);
}

#[test]
fn a_vcpu_is_plugged_in_again() {
    let mut machine = Machine::new();
    let vcpu = machine.vm.add_vcpu();
    for round in 0..5 {
        let mut ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
        let twice = machine.log.attach_ring(vcpu.ring_memory());
        assert!(matches!(twice, Err(AttachError::Twice)), "{twice:?}");
        // Past a full ring, whose limit is learnt anew by nobody.
        for page in 0..150 {
            while vcpu.write(RAM, page) == Err(WriteError::RingFull) {
                ring.on_full().unwrap();
            }
        }
        if round % 2 == 0 {
            assert_eq!(machine.sync(), [run(RAM, 0, 150)]);
        }
        // With entries left in it, and without.
        drop(ring);
    }
    let stats = machine.log.stats();
    assert_eq!(stats.vcpus.len(), 2, "it is one vCPU, plugged in or not");
    assert_eq!(stats.vcpus[1].soft_limit, 60);
    assert_eq!((stats.overruns, stats.suspect_pages), (0, 0));
}
