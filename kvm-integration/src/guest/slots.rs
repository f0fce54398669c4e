// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine's memslots, mapped one to one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::error::VmError;
use super::memory::GuestMemory;
use super::processor::tables;

/// The slot of code, page tables, progress and lists.
const BOOT_SLOT: u32 = 0;

/// A machine with its memory.
#[derive(Debug)]
pub(super) struct Slots {
    // Fields drop in this order: the machine goes before the memory it uses.
    pub(super) fd: VmFd,
    slots: Mutex<BTreeMap<u32, Slot>>,
    pub(super) boot: Arc<GuestMemory>,
}

#[derive(Debug)]
struct Slot {
    gpa: u64,
    memory: Arc<GuestMemory>,
}

impl Slots {
    /// Without slots. The boot slot comes with the first one, or with a vCPU: arm64 takes no rings once there is one.
    pub(super) fn new(fd: VmFd, boot: Arc<GuestMemory>) -> Self {
        tables::begin(&boot);
        tables::map(&boot, 0, boot.bytes());
        Self {
            fd,
            slots: Mutex::default(),
            boot,
        }
    }

    /// Gives KVM the boot slot, unless it has it.
    pub(super) fn boot(&self) -> Result<(), VmError> {
        self.add_boot(&mut self.lock())
    }

    fn add_boot(&self, slots: &mut BTreeMap<u32, Slot>) -> Result<(), VmError> {
        if !slots.contains_key(&BOOT_SLOT) {
            let (gpa, memory) = (0, Arc::clone(&self.boot));
            self.add(slots, BOOT_SLOT, Slot { gpa, memory }, false)?;
        }
        Ok(())
    }

    fn add(
        &self,
        slots: &mut BTreeMap<u32, Slot>,
        id: u32,
        slot: Slot,
        logged: bool,
    ) -> Result<(), VmError> {
        self.set_region(id, &slot, slot.memory.bytes(), logged)?;
        slots.insert(id, slot);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        // Every change of the map is one step, so a panic elsewhere leaves it whole.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(
        &self,
        id: u32,
        gpa: u64,
        memory: Arc<GuestMemory>,
        logged: bool,
    ) -> Result<(), VmError> {
        let mut slots = self.lock();
        self.add_boot(&mut slots)?;
        tables::map(&self.boot, gpa, memory.bytes());
        if slots.contains_key(&id) {
            return Err(VmError::SlotExists { id });
        }
        self.add(&mut slots, id, Slot { gpa, memory }, logged)
    }

    pub(super) fn remove(&self, id: u32) -> Result<(), VmError> {
        let mut slots = self.lock();
        self.set_region(id, own(&slots, id)?, 0, false)?;
        // KVM has let go of the memory, so that it may go now.
        slots.remove(&id);
        Ok(())
    }

    pub(super) fn set_logged(&self, id: u32, logged: bool) -> Result<(), VmError> {
        let slots = self.lock();
        let slot = own(&slots, id)?;
        self.set_region(id, slot, slot.memory.bytes(), logged)
    }

    pub(super) fn memory(&self, id: u32) -> Option<Arc<GuestMemory>> {
        self.lock().get(&id).map(|slot| Arc::clone(&slot.memory))
    }

    /// Sets slot `id` to `bytes` bytes: all of the slot's memory, or 0 to delete it.
    fn set_region(&self, id: u32, slot: &Slot, bytes: u64, logged: bool) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: id,
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: bytes,
            userspace_addr: slot.memory.host_addr(),
        };
        // SAFETY: the region is a GuestMemory's mapping, or part of none when it is deleted. The
        // caller keeps the slot in `slots`, hence mapped, until KVM has deleted it or the
        // machine is gone; and nobody makes references to a GuestMemory's bytes.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(VmError::kvm(
            "KVM_SET_USER_MEMORY_REGION",
            format!("slot {id}"),
        ))
    }
}

/// A slot that is not the boot slot.
fn own(slots: &BTreeMap<u32, Slot>, id: u32) -> Result<&Slot, VmError> {
    let slot = slots.get(&id).filter(|_| id != BOOT_SLOT);
    slot.ok_or(VmError::NoSlot { id })
}
