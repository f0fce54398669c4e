// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vCPUs that are unplugged and plugged in again, on the simulated kernel.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use std::any::Any;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use kvm_dirty_ring::DirtyLog;
use kvm_dirty_ring::error::AttachError;
use kvm_dirty_ring::ring::RingMemory;
use kvm_dirty_ring::sim::{SimConfig, SimVm, WriteError};
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

/// Uses a log, when it is dropped, in ways that wait for each other.
struct UsesTheLog {
    log: DirtyLog,
    over: mpsc::Sender<()>,
}

impl Drop for UsesTheLog {
    fn drop(&mut self) {
        let (log, (done, is_done)) = (self.log.clone(), mpsc::channel());
        thread::spawn(move || {
            log.set_dirty_limits(None).unwrap();
            log.add_slot(RAM, 100).unwrap();
            done.send(())
        });
        if is_done.recv_timeout(Duration::from_secs(20)).is_ok() {
            let _ = self.over.send(());
        }
    }
}

/// The memory of a ring that the log has no use for is the VMM's to drop: not under a lock of ours.
#[test]
fn a_spare_ring_is_dropped_with_nothing_held() {
    const ENTRIES: u32 = 64;
    let vm = SimVm::new(SimConfig::default());
    let log = DirtyLog::with_kernel(Box::new(vm), ENTRIES);
    let words: Arc<[AtomicU64]> = (0..2 * ENTRIES).map(|_| AtomicU64::new(0)).collect();
    let memory = |owner: Box<dyn Any + Send + Sync>| {
        // SAFETY: the caller's words outlive the log, and an entry has two; they are reached by nobody
        // else, and any bytes are an entry.
        unsafe { RingMemory::new(NonNull::from(&*words).cast(), ENTRIES, owner) }
    };
    drop(log.attach_ring(memory(Box::new(()))).unwrap());
    let (over, is_over) = mpsc::channel();
    let spare = Box::new(UsesTheLog {
        log: log.clone(),
        over,
    });
    let again = log.attach_ring(memory(spare)).unwrap();
    is_over.try_recv().expect("it waited for the log for ever");
    drop((again, log));
}
