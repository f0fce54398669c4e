//! The machine's memslots, and the page tables that map them: one to one, by pages of 2 MiB. Every
//! entry has its accessed and dirty bits set already, or the CPU would set them, dirtying pages of
//! the tables.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::error::VmError;
use super::memory::{GuestMemory, HIGHEST_GPA, PAGE_SIZE};

/// The slot of code, page tables, progress and lists.
const BOOT_SLOT: u32 = 0;

/// The page of the topmost table; the next ones follow.
pub(super) const PML4: u64 = 2;
const PDPT: u64 = 3;
const DIRECTORIES: u64 = 4;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0xe7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

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
    /// With the boot slot alone.
    pub(super) fn new(fd: VmFd, boot: Arc<GuestMemory>) -> Result<Self, VmError> {
        boot.write_u64(PML4 * PAGE_SIZE, (PDPT * PAGE_SIZE) | TABLE);
        for gib in 0..HIGHEST_GPA >> 30 {
            let directory = (DIRECTORIES + gib) * PAGE_SIZE;
            boot.write_u64(PDPT * PAGE_SIZE + gib * 8, directory | TABLE);
        }
        let this = Self {
            fd,
            slots: Mutex::default(),
            boot: Arc::clone(&boot),
        };
        this.insert(BOOT_SLOT, 0, boot, false)?;
        Ok(this)
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
        self.map(gpa, memory.bytes());
        let mut slots = self.lock();
        if slots.contains_key(&id) {
            return Err(VmError::SlotExists { id });
        }
        let slot = Slot { gpa, memory };
        self.set_region(id, &slot, slot.memory.bytes(), logged)?;
        slots.insert(id, slot);
        Ok(())
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
        // caller keeps the slot in `slots`, hence mapped, until KVM was told to delete it or the
        // machine is gone; and nobody makes references to a GuestMemory's bytes.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(VmError::kvm(
            "KVM_SET_USER_MEMORY_REGION",
            format!("slot {id}"),
        ))
    }

    /// Maps these addresses one to one, wherever they aren't yet. Running vCPUs need not be told:
    /// entries only turn from absent to present, and no TLB keeps absent ones.
    fn map(&self, gpa: u64, bytes: u64) {
        for large_page in gpa / LARGE_PAGE_SIZE..(gpa + bytes).div_ceil(LARGE_PAGE_SIZE) {
            // The directories are adjacent, so they are one array of entries.
            let entry = DIRECTORIES * PAGE_SIZE + large_page * 8;
            self.boot
                .write_u64(entry, (large_page * LARGE_PAGE_SIZE) | LARGE_PAGE);
        }
    }
}

/// A slot that is not the boot slot.
fn own(slots: &BTreeMap<u32, Slot>, id: u32) -> Result<&Slot, VmError> {
    let slot = slots.get(&id).filter(|_| id != BOOT_SLOT);
    slot.ok_or(VmError::NoSlot { id })
}
