// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory, and who writes to it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{ResetPhase, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, SlotId};

use super::SLOTS;
use crate::common::ops::Write;

/// What writes can reach; shared with the hook that writes inside resets.
pub(super) struct Memory {
    pub(super) vm: SimVm,
    pub(super) log: DirtyLog,
    pub(super) vcpus: Mutex<Vec<SimVcpu>>,
    pub(super) sizes: Mutex<BTreeMap<SlotId, u64>>,
    pub(super) in_reset: Mutex<VecDeque<(ResetPhase, Vec<Write>)>>,
}

impl Memory {
    /// The pages that `write` names, if its slot exists.
    pub(super) fn pages(&self, write: &Write) -> Option<(SlotId, Vec<u64>)> {
        let slot = SLOTS[write.slot];
        let size = *self.sizes.lock().unwrap().get(&slot)?;
        let first = (u64::from(write.at) * size) >> 16;
        let pages = (first..first + write.pages).map(|page| page % size);
        Some((slot, pages.collect()))
    }

    pub(super) fn device_write(&self, slot: SlotId, page: u64) {
        assert!(self.vm.device_write(slot, page));
        self.log.mark_dirty(slot, page, 1).unwrap();
    }

    pub(super) fn is_broken(&self) -> bool {
        self.log.stats().overruns > 0
    }

    /// Says that a slot was protected anew: in vain where a ring is broken.
    pub(super) fn rearmed(&self, slot: SlotId) {
        match self.log.rearmed(slot) {
            Ok(()) => assert!(!self.is_broken()),
            Err(SlotError::BrokenRing { .. }) => assert!(self.is_broken()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Writes inside a reset: a vCPU whose ring is full stays out of the guest.
    fn write_in_reset(&self, write: &Write) {
        let Some((slot, pages)) = self.pages(write) else {
            return;
        };
        for page in pages {
            match write.vcpu {
                None => self.device_write(slot, page),
                Some(vcpu) => {
                    let vcpus = self.vcpus.lock().unwrap();
                    let _ = vcpus[vcpu % vcpus.len()].write(slot, page);
                }
            }
        }
    }

    pub(super) fn reset_reaches(&self, phase: ResetPhase) {
        let mut writes = self.in_reset.lock().unwrap();
        while writes.front().is_some_and(|(when, _)| *when == phase) {
            let (_, now) = writes.pop_front().unwrap();
            now.iter().for_each(|write| self.write_in_reset(write));
        }
    }
}
