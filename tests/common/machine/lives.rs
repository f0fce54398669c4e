// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Slots that come and go, and whose log is switched on and off, as a VMM does it.

use std::io;
use std::mem;

use kvm_dirty_ring::RetiredSlot;
use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::SimVcpu;

use super::memory::Memory;
use super::{Machine, SLOTS};
use crate::common::ops::Moment;

pub(super) enum Life {
    Absent,
    Live,
    Retired(RetiredSlot),
    /// Deleted in the kernel, its removal from the log not finished.
    Deleted(RetiredSlot),
}

impl Machine {
    pub(super) fn step_slot(&mut self, index: usize, pages: u64) {
        let Memory { vm, log, sizes, .. } = &*self.memory;
        let slot = SLOTS[index];
        let injected = self.injected > 0;
        let failed = |error| match error {
            SlotError::Reset(_) | SlotError::Bitmap(_) if injected => {}
            error => panic!("{error}"),
        };
        let life = mem::replace(&mut self.lives[index], Life::Absent);
        self.lives[index] = match life {
            Life::Absent => match log.add_slot(slot, pages) {
                Ok(()) => {
                    vm.create_slot(slot, pages);
                    sizes.lock().unwrap().insert(slot, pages);
                    self.tracked.insert(slot, pages);
                    if log.stats().unknown_slot_entries > 0 {
                        // They may have been its: it is suspect.
                        vm.rearm_slot(slot);
                        self.memory.rearmed(slot);
                        self.written.insert(slot, (0..pages).collect());
                    }
                    self.copy.insert(slot, vec![0; pages as usize]);
                    Life::Live
                }
                Err(error) => {
                    failed(error);
                    Life::Absent
                }
            },
            Life::Live => match log.retire_slot(slot) {
                Ok(retired) => {
                    let written = self.written.get(&slot).cloned();
                    self.kept.insert(slot, written.unwrap_or_default());
                    Life::Retired(retired)
                }
                Err(error) => {
                    failed(error);
                    Life::Live
                }
            },
            Life::Retired(retired) => {
                let again = log.add_slot(slot, pages);
                assert!(matches!(again, Err(SlotError::Retired { .. })));
                sizes.lock().unwrap().remove(&slot);
                vm.delete_slot(slot);
                // Deleting a slot makes every vCPU leave the guest.
                let vcpus = self.memory.vcpus.lock().unwrap();
                vcpus.iter().for_each(SimVcpu::exit);
                drop(vcpus);
                self.copy.remove(&slot);
                // Should the removal never be finished, its members are reported still; nothing depends on that.
                self.forget_open(slot);
                self.written.remove(&slot);
                let kept = self.kept.remove(&slot).filter(|kept| !kept.is_empty());
                self.written.extend(kept.map(|kept| (slot, kept)));
                Life::Deleted(retired)
            }
            Life::Deleted(retired) => match log.finish_slot(&retired) {
                Ok(()) => {
                    self.tracked.remove(&slot);
                    self.written.remove(&slot);
                    Life::Absent
                }
                Err(error) => {
                    failed(error);
                    Life::Deleted(retired)
                }
            },
        };
    }

    pub(super) fn switch(&self, index: usize, on: bool, fails: Option<Moment>) {
        let Memory { vm, log, .. } = &*self.memory;
        let slot = SLOTS[index];
        let fail_at = |moment| match fails {
            Some(fails) if fails == moment => Err(io::ErrorKind::Other.into()),
            _ => Ok(()),
        };
        let set = || {
            fail_at(Moment::Before)?;
            vm.set_logged(slot, on);
            fail_at(Moment::After)
        };
        let switched = match on {
            true => log.start_tracking(slot, set),
            false => log.stop_tracking(slot, set),
        };
        let as_expected = match (&self.lives[index], &switched) {
            (Life::Absent, Err(SlotError::Unknown { .. })) => true,
            (Life::Retired(_) | Life::Deleted(_), Err(SlotError::Retired { .. })) => true,
            (Life::Live, Ok(())) => fails.is_none(),
            (Life::Live, Err(SlotError::Switch { .. })) => fails.is_some(),
            _ => false,
        };
        assert!(as_expected, "{switched:?}");
    }

    /// Whatever resets have left of a slot that is deleted, its removal ends.
    pub fn end_removals(&mut self) {
        for index in 0..self.lives.len() {
            if matches!(self.lives[index], Life::Deleted(_)) {
                self.step_slot(index, 1);
                assert!(
                    matches!(self.lives[index], Life::Absent),
                    "a removal does not end"
                );
            }
        }
    }
}
