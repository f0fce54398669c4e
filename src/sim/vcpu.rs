//! A vCPU: who pushes into a ring.

use std::sync::Arc;

use super::vcpu_state::{Running, VcpuState};
use super::vm::SimVm;
use crate::kernel::Mode;
use crate::ring::memory::RingMemory;
use crate::ring::producer::Producer;
use crate::slot_id::SlotId;

/// Why a write did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The ring has reached the soft limit: `KVM_EXIT_DIRTY_RING_FULL`.
    #[error("the dirty ring is full: harvest and reset it, then try again")]
    RingFull,
    /// The guest has no such page.
    #[error("slot {slot} has no page {page}")]
    NoSuchPage {
        /// The slot named.
        slot: SlotId,
        /// The page named.
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
    /// The ring as userspace maps it: for [`DirtyLog::attach_ring`](crate::DirtyLog::attach_ring),
    /// once.
    pub fn ring_memory(&self) -> RingMemory {
        self.inner.ring.memory()
    }

    /// Writes a page as the guest does.
    ///
    /// # Errors
    /// The ring is full, or there is no such page; nothing was written.
    pub fn write(&self, slot: SlotId, page: u64) -> Result<(), WriteError> {
        self.write_with(slot, page, || ())
    }

    /// Writes a page and runs `store` at the moment of the write: for a VMM under test that keeps
    /// real memory.
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
        // In bitmap mode nothing is ever in the ring.
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

    /// Leaves the guest, as a kick makes a vCPU do: what the hardware has logged reaches the ring, or
    /// the bitmap.
    pub fn exit(&self) {
        self.push_buffer(&mut self.inner.running());
    }

    fn push(&self, running: &mut Running, slot: u32, page: u64) {
        // That of now, which need not be that of the write (`mark_page_dirty_in_slot`).
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

    /// Entries in the ring that are not recycled yet.
    pub fn used(&self) -> u32 {
        self.inner.ring.used()
    }

    /// Makes the vCPU run on past the soft limit, as an instruction emulator that checks too
    /// rarely does, and so overrun its ring.
    pub fn ignore_soft_limit(&self, ignore: bool) {
        self.inner.running().ignores_limit = ignore;
    }

    /// Makes the next logged page reach the ring as this slot and page instead: the true one is
    /// disarmed, and nobody learns of it.
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
