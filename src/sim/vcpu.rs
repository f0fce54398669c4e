// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vCPU: the producer of a ring.

use std::sync::Arc;

use super::vcpu_state::{Running, VcpuState};
use super::vm::SimVm;
use crate::kernel::Mode;
use crate::ring::memory::RingMemory;
use crate::ring::producer::Producer;
use crate::slot_id::SlotId;

/// A write that did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The ring has reached the soft limit: `KVM_EXIT_DIRTY_RING_FULL`.
    #[error("the dirty ring is full: harvest and reset it, then try again")]
    RingFull,
    /// The guest has no such page.
    #[error("slot {slot} has no page {page}")]
    NoSuchPage {
        /// The slot of the write.
        slot: SlotId,
        /// The page of the write.
        page: u64,
    },
}

/// A simulated vCPU. Clones are handles to the same one.
#[derive(Clone)]
pub struct SimVcpu {
    vm: SimVm,
    inner: Arc<VcpuState>,
}

impl SimVm {
    /// Creates a vCPU.
    pub fn add_vcpu(&self) -> SimVcpu {
        let config = self.config();
        let ring = Producer::new(config.ring_entries, config.first_index);
        let inner = Arc::new(VcpuState::new(ring, config.ignores_voids));
        self.attach(Arc::clone(&inner));
        let vm = self.clone();
        SimVcpu { vm, inner }
    }
}

impl SimVcpu {
    /// Returns the ring as userspace maps it, for [`DirtyLog::attach_ring`](crate::DirtyLog::attach_ring). Attach it once.
    pub fn ring_memory(&self) -> RingMemory {
        self.inner.ring.memory()
    }

    /// Writes a page, as the guest does.
    ///
    /// # Errors
    /// The ring is full, or there is no such page; nothing was written.
    pub fn write(&self, slot: SlotId, page: u64) -> Result<(), WriteError> {
        self.write_with(slot, page, || ())
    }

    /// Writes a page and runs `store` at the moment of the write, for a VMM under test that keeps real memory.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_with(
        &self,
        slot: SlotId,
        page: u64,
        store: impl FnOnce(),
    ) -> Result<(), WriteError> {
        let mut running = self.inner.running();
        // In bitmap mode the ring stays empty.
        if !running.ignores_limit && self.inner.ring.used() >= self.vm.soft_limit() {
            return Err(WriteError::RingFull);
        }
        let missing = WriteError::NoSuchPage { slot, page };
        let memory = self.vm.slot(slot).ok_or(missing)?;
        if memory.disarm(page).ok_or(missing)? {
            let pml = self.vm.config().pml;
            if pml == 0 {
                self.push(&mut running, slot.raw(), page);
            } else {
                running.buffer.push((slot.raw(), page));
                if running.buffer.len() == pml {
                    self.push_buffer(&mut running);
                }
            }
        }
        memory.write(page);
        store();
        Ok(())
    }

    /// Leaves the guest, as a kicked vCPU does: pages in the hardware buffer reach the ring, or the bitmap.
    pub fn exit(&self) {
        self.push_buffer(&mut self.inner.running());
    }

    fn push(&self, running: &mut Running, slot: u32, page: u64) {
        // The slot as it is now, which may differ from that of the write (`mark_page_dirty_in_slot`).
        let memory = self.vm.slot(SlotId::from_raw(slot));
        if memory.as_ref().is_some_and(|memory| !memory.is_logged()) {
            return;
        }
        if self.vm.config().mode == Mode::Bitmap {
            if let Some(memory) = memory {
                memory.log(page);
            }
            return;
        }
        let (slot, page) = running.garbage.pop_front().unwrap_or((slot, page));
        self.inner.push(slot, page);
    }

    fn push_buffer(&self, running: &mut Running) {
        for (slot, page) in core::mem::take(&mut running.buffer) {
            self.push(running, slot, page);
        }
    }

    /// Returns the number of entries in the ring that are not recycled yet.
    pub fn used(&self) -> u32 {
        self.inner.ring.used()
    }

    /// Makes the vCPU run on past the soft limit and overrun its ring, as an instruction emulator does that checks too rarely.
    pub fn ignore_soft_limit(&self, ignore: bool) {
        self.inner.running().ignores_limit = ignore;
    }

    /// Makes the next logged page reach the ring as this slot and page instead.
    ///
    /// The true page is disarmed, and no log has it.
    pub fn garble_next(&self, raw_slot: u32, page: u64) {
        self.inner.running().garbage.push_back((raw_slot, page));
    }
}

impl core::fmt::Debug for SimVcpu {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SimVcpu")
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}
