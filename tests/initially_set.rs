// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `KVM_DIRTY_LOG_INITIALLY_SET`, enabled by the VMM after the log: beside rings, the first write to each page would be lost
//! when the log of a slot is switched on.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use std::error::Error;
use std::io;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Kernel, Mode, Recycled, SlotId};
use scenario::{ALL_RAM, Machine, RAM, run};

const DIMM: SlotId = SlotId::new(0, 7);

#[test]
fn a_slot_that_is_tracked_again_begins_protected() {
    let mut machine = Machine::new();
    let switch = |machine: &Machine, on| {
        machine.vm.set_logged(RAM, on);
        Ok(())
    };
    let off = || switch(&machine, false);
    machine.log.stop_tracking(RAM, off).unwrap();
    machine.write(0..300);
    machine.vm.set_initially_set(true);
    let on = || switch(&machine, true);
    machine.log.start_tracking(RAM, on).unwrap();
    assert_eq!(machine.sync(), [ALL_RAM]);
    machine.write(30..40);
    assert_eq!(machine.sync(), [run(RAM, 30, 10)]);
}

#[test]
fn a_slot_that_is_rearmed_is_protected() {
    let mut machine = Machine::new();
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.write(0..5);
    machine.sync();
    machine.vm.set_initially_set(true);
    let protect = |slot| {
        machine.vm.rearm_slot(slot);
        Ok(())
    };
    assert_eq!(machine.log.rearm(protect).unwrap(), 1);
    machine.sync();
    machine.write([3, 200]);
    assert_eq!(machine.sync(), [run(RAM, 3, 1), run(RAM, 200, 1)]);
}

/// In bitmap mode it is the VMM's choice: all pages begin dirty, and their bits are there to be taken.
#[test]
fn bitmaps_may_begin_set() {
    let mut config = SimConfig::default();
    config.mode = Mode::Bitmap;
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    vm.set_initially_set(true);
    log.add_slot(DIMM, 100).unwrap();
    vm.create_slot(DIMM, 100);
    assert_eq!(vm.is_protected(DIMM, 0), Some(false), "switched off");
    let vcpu = vm.add_vcpu();
    let mut dirty = DirtyPages::new();
    for expected in [run(DIMM, 0, 100), run(DIMM, 5, 1)] {
        vcpu.write(DIMM, 5).unwrap();
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [expected]);
    }
}

/// A kernel that refuses the switch, as a seccomp filter does.
struct Refuses(SimVm);

impl Kernel for Refuses {
    fn reset(&self) -> io::Result<Recycled> {
        self.0.reset()
    }

    fn switch_initially_set_off(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

fn assert_refused(refused: &SlotError) {
    assert!(matches!(
        refused,
        SlotError::InitiallySet { slot: DIMM, .. }
    ));
    assert!(refused.to_string().contains("KVM_ENABLE_CAP"));
    let source = refused.source().expect("the kernel's reason");
    let source = source.downcast_ref::<io::Error>().expect("the kernel's");
    assert_eq!(source.raw_os_error(), Some(libc::EPERM));
}

#[test]
fn a_refused_switch_changes_nothing() {
    let vm = SimVm::new(SimConfig::default());
    let log = DirtyLog::with_kernel(Box::new(Refuses(vm.clone())), 4096);
    log.add_slot(DIMM, 100).unwrap();
    vm.create_slot(DIMM, 100);
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    vm.inject([ResetFault::Short { after: 0 }]);
    vcpu.write(DIMM, 5).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert_eq!(log.stats().suspect_pages, 1);

    let rearmed = log.rearm(|_| panic!("the hook was called"));
    assert_refused(&rearmed.unwrap_err());
    assert_eq!(log.stats().suspect_pages, 1);
    let started = log.start_tracking(DIMM, || panic!("the hook was called"));
    assert_refused(&started.unwrap_err());
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.runs().collect::<Vec<_>>(), [run(DIMM, 5, 1)]);
}
