//! The virtual machine: its boot slot, its page tables, and the slots a test gives it.
//!
//! Slot 0, the *boot slot*, starts at address 0 and is never logged:
//!
//! | page | holds |
//! |---|---|
//! | 0 | nothing: `kvm_pvm` ends a guest that executes `out` in its page 0 |
//! | 1 | the code: at its start that of [`program`], halfway that of [`stress`] |
//! | 2, 3 | PML4 and PDPT |
//! | 4 … 515 | a page directory for each of the 512 GiB |
//! | 516 … 547 | each vCPU's progress |
//! | 1024 … | each vCPU's list, or its random buffer |
//!
//! Addresses are mapped one to one by pages of 2 MiB. Every table entry has its accessed and dirty
//! bits set already, or the CPU would set them, dirtying pages of the tables.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::memory::{GuestMemory, MemoryError, PAGE_SIZE};
use crate::program::{self, CODE, Load, MAX_VCPUS, Mode, Places};
use crate::stress::{self, Stress};
use crate::vcpu::TinyVcpu;

/// The slot of code, page tables, progress and lists.
pub const BOOT_SLOT: u32 = 0;
/// Slots of a test's own begin here or above; below is the boot slot's.
pub const LOWEST_GPA: u64 = 1 << 30;
/// Slots of a test's own end here or below.
pub const HIGHEST_GPA: u64 = 512 << 30;
/// Entries in a vCPU's list, unless [`TinyVm::with_capacity`] says otherwise.
pub const LIST_CAPACITY: usize = 1 << 20;

const ENTRY: u64 = 1;
/// Bytes from there.
const STRESS_ENTRY: u64 = PAGE_SIZE / 2;
const PML4: u64 = 2;
const PDPT: u64 = 3;
const DIRECTORIES: u64 = 4;
const PROGRESS: u64 = 516;
const LISTS: u64 = 1024;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0xe7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// The machine could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// A call to KVM failed.
    #[error("{call} failed for {what}: see the cause")]
    Kvm {
        /// The call.
        call: &'static str,
        /// What it was about.
        what: String,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// There is no memory for the boot slot or a vCPU's run page.
    #[error("the machine's own memory could not be mapped")]
    Memory(#[from] MemoryError),
    /// A mapping of a vCPU's run page failed.
    #[error("the run page of vCPU {index} could not be mapped")]
    MapRun {
        /// The vCPU.
        index: u32,
        /// What mmap said.
        source: std::io::Error,
    },
    /// The lists' capacity does not fit into the boot slot.
    #[error(
        "lists of {entries} entries for {vcpus} vCPUs don't fit below {LOWEST_GPA:#x}: ask for \
         at least one vCPU, at most {MAX_VCPUS}, and fewer entries"
    )]
    Capacity {
        /// The vCPUs asked for.
        vcpus: u32,
        /// The entries asked for.
        entries: usize,
    },
    /// A slot's place is not for tests, or not page-aligned.
    #[error(
        "slot {id} can't be at {gpa:#x}: give it a page-aligned address such that it lies within \
         {LOWEST_GPA:#x} and {HIGHEST_GPA:#x}"
    )]
    SlotPlace {
        /// The slot.
        id: u32,
        /// Where it was to be.
        gpa: u64,
    },
    /// The id is in use.
    #[error("slot {id} exists already: remove it first or choose another id")]
    SlotExists {
        /// The slot.
        id: u32,
    },
    /// There is no such slot, or it is the boot slot.
    #[error("there is no slot {id} of yours: add it first")]
    NoSlot {
        /// The slot.
        id: u32,
    },
    /// The machine was made for fewer vCPUs.
    #[error("vCPU {index} is one too many: the machine was made for {vcpus}")]
    VcpuIndex {
        /// The vCPU.
        index: u32,
        /// How many there may be.
        vcpus: u32,
    },
    /// The list is empty, too long, or no multiple of the chunk.
    #[error(
        "vCPU {index} can't work on {entries} entries in chunks of {chunk}: give it at least one \
         and at most {capacity}, and a multiple of the chunk"
    )]
    List {
        /// The vCPU.
        index: u32,
        /// How long its list is.
        entries: usize,
        /// The stores between two exits, 0 for none.
        chunk: u32,
        /// How long its list may be.
        capacity: usize,
    },
}

impl VmError {
    pub(crate) fn kvm(
        call: &'static str,
        what: impl Into<String>,
    ) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |source| Self::Kvm { call, what, source }
    }
}

/// A virtual machine that does nothing but dirty pages.
///
/// It keeps the memory of its slots alive, and each [`TinyVcpu`] keeps the machine alive. All
/// methods may be called while vCPUs run.
#[derive(Debug)]
pub struct TinyVm {
    inner: Arc<VmInner>,
}

/// What a vCPU needs of the machine it belongs to.
#[derive(Debug)]
pub(crate) struct VmInner {
    // Fields drop in this order: the machine goes before the memory it uses.
    pub(crate) fd: VmFd,
    slots: Mutex<BTreeMap<u32, Slot>>,
    boot: Arc<GuestMemory>,
    pub(crate) cpuid: CpuId,
    vcpus: u32,
    list_capacity: usize,
}

#[derive(Debug)]
struct Slot {
    gpa: u64,
    memory: Arc<GuestMemory>,
}

impl TinyVm {
    /// Makes a machine for up to [`MAX_VCPUS`] vCPUs with lists of up to [`LIST_CAPACITY`]
    /// entries. It has no vCPU yet, so that a dirty ring can still be enabled.
    ///
    /// # Errors
    /// KVM or mmap refuses.
    pub fn new(kvm: &Kvm) -> Result<Self, VmError> {
        Self::with_capacity(kvm, MAX_VCPUS, LIST_CAPACITY)
    }

    /// The same for other numbers. Room for a list is taken only as it is filled.
    ///
    /// # Errors
    /// KVM or mmap refuses, or the lists don't fit.
    pub fn with_capacity(kvm: &Kvm, vcpus: u32, list_entries: usize) -> Result<Self, VmError> {
        let capacity = VmError::Capacity {
            vcpus,
            entries: list_entries,
        };
        let per_page = (PAGE_SIZE / 8) as usize;
        let list_pages = list_entries.div_ceil(per_page) as u64;
        let pages = list_pages
            .checked_mul(u64::from(vcpus))
            .and_then(|n| n.checked_add(LISTS));
        let pages = match pages {
            Some(pages) if (1..=MAX_VCPUS).contains(&vcpus) && pages <= LOWEST_GPA / PAGE_SIZE => {
                pages
            }
            _ => return Err(capacity),
        };
        let boot = Arc::new(GuestMemory::new(pages)?);
        boot.write_bytes(ENTRY * PAGE_SIZE, CODE);
        boot.write_bytes(ENTRY * PAGE_SIZE + STRESS_ENTRY, stress::CODE);
        boot.write_u64(PML4 * PAGE_SIZE, (PDPT * PAGE_SIZE) | TABLE);
        for gib in 0..HIGHEST_GPA >> 30 {
            let directory = (DIRECTORIES + gib) * PAGE_SIZE;
            boot.write_u64(PDPT * PAGE_SIZE + gib * 8, directory | TABLE);
        }

        let fd = kvm
            .create_vm()
            .map_err(VmError::kvm("KVM_CREATE_VM", "the machine"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID", "the machine"))?;
        let list_capacity = list_pages as usize * per_page;
        let slots = Mutex::default();
        let inner = VmInner {
            fd,
            slots,
            boot: Arc::clone(&boot),
            cpuid,
            vcpus,
            list_capacity,
        };
        inner.map(0, boot.bytes());
        inner.insert(BOOT_SLOT, 0, boot, false)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The machine, for calls of your own: to enable the dirty ring, to reset it.
    pub fn vm_fd(&self) -> &VmFd {
        &self.inner.fd
    }

    /// Gives the machine `memory` at guest-physical address `gpa` as slot `id`, its pages logged
    /// or not. Running vCPUs may use it from then on.
    ///
    /// # Errors
    /// The place is below [`LOWEST_GPA`] or above [`HIGHEST_GPA`], the id is taken, or KVM
    /// refuses, as for an overlap (EEXIST).
    pub fn add_slot(
        &self,
        id: u32,
        gpa: u64,
        memory: Arc<GuestMemory>,
        logged: bool,
    ) -> Result<(), VmError> {
        let end = gpa.checked_add(memory.bytes());
        let fits = gpa >= LOWEST_GPA && end.is_some_and(|end| end <= HIGHEST_GPA);
        if !fits || gpa % PAGE_SIZE != 0 {
            return Err(VmError::SlotPlace { id, gpa });
        }
        self.inner.map(gpa, memory.bytes());
        self.inner.insert(id, gpa, memory, logged)
    }

    /// Takes slot `id` away, and lets go of its memory. A vCPU that stores to it later ends with
    /// [`VcpuError::UnexpectedExit`](crate::vcpu::VcpuError::UnexpectedExit).
    ///
    /// # Errors
    /// There is no such slot, or KVM refuses.
    pub fn remove_slot(&self, id: u32) -> Result<(), VmError> {
        let mut slots = self.inner.slots();
        let slot = slots
            .get(&id)
            .filter(|_| id != BOOT_SLOT)
            .ok_or(VmError::NoSlot { id })?;
        self.inner.set_region(id, slot, 0, 0)?;
        // KVM has let go of the memory, so that it may go now.
        slots.remove(&id);
        Ok(())
    }

    /// Starts or stops the dirty log of slot `id`.
    ///
    /// # Errors
    /// There is no such slot, or KVM refuses.
    pub fn set_logged(&self, id: u32, logged: bool) -> Result<(), VmError> {
        let slots = self.inner.slots();
        let slot = slots
            .get(&id)
            .filter(|_| id != BOOT_SLOT)
            .ok_or(VmError::NoSlot { id })?;
        self.inner
            .set_region(id, slot, slot.memory.bytes(), log_flag(logged))
    }

    /// Protects all pages of slot `id` anew, which is logged. No vCPU may run: what it wrote meanwhile
    /// would not be logged.
    ///
    /// # Errors
    /// There is no such slot, or KVM refuses.
    pub fn protect(&self, id: u32) -> Result<(), VmError> {
        self.set_logged(id, false)?;
        self.set_logged(id, true)
    }

    /// Which pages of slot `id` were written since the last call, a bit each: `KVM_GET_DIRTY_LOG`.
    /// They are protected again.
    ///
    /// # Errors
    /// There is no such slot, or KVM refuses: ENOENT if the slot is not logged, ENXIO where dirty
    /// rings are enabled.
    pub fn dirty_bitmap(&self, id: u32) -> Result<Vec<u64>, VmError> {
        let memory = self.slot_memory(id).ok_or(VmError::NoSlot { id })?;
        let bitmap = self.inner.fd.get_dirty_log(id, memory.bytes() as usize);
        bitmap.map_err(VmError::kvm("KVM_GET_DIRTY_LOG", format!("slot {id}")))
    }

    /// The memory of slot `id`.
    pub fn slot_memory(&self, id: u32) -> Option<Arc<GuestMemory>> {
        self.inner
            .slots()
            .get(&id)
            .map(|slot| Arc::clone(&slot.memory))
    }

    /// Makes vCPU `index`, ready to start on its load. This may be done at any time, also while
    /// others run, but only once for each index.
    ///
    /// # Errors
    /// The index or the list is out of bounds, or KVM refuses.
    pub fn create_vcpu(&self, index: u32, load: &Load) -> Result<TinyVcpu, VmError> {
        let inner = &self.inner;
        let (entries, capacity) = (load.list.len(), inner.list_capacity);
        if !(1..=capacity).contains(&entries) || entries as u64 % load.granule() != 0 {
            return Err(VmError::List {
                index,
                entries,
                chunk: load.chunk,
                capacity,
            });
        }
        let places = self.places(index, 0)?;
        let registers = program::registers(index, load, &places);
        let words = load.list.iter().copied();
        self.create(index, load.mode, &registers, &places, words)
    }

    /// The same under memory stress. The lists' capacity must do for the random buffer, of 1,023
    /// words.
    ///
    /// # Errors
    /// The index is out of bounds, the capacity is too small, or KVM refuses.
    pub fn create_stressed_vcpu(&self, index: u32, stress: &Stress) -> Result<TinyVcpu, VmError> {
        let capacity = self.inner.list_capacity;
        if capacity < stress::RANDOM_WORDS {
            let entries = stress::RANDOM_WORDS;
            return Err(VmError::List {
                index,
                entries,
                chunk: 0,
                capacity,
            });
        }
        let places = self.places(index, STRESS_ENTRY)?;
        let (registers, words) = (stress.registers(&places), stress.random_words());
        self.create(index, Mode::Native, &registers, &places, words)
    }

    fn places(&self, index: u32, entry: u64) -> Result<Places, VmError> {
        let VmInner {
            vcpus,
            list_capacity,
            ..
        } = *self.inner;
        if index >= vcpus {
            return Err(VmError::VcpuIndex { index, vcpus });
        }
        Ok(Places {
            code: ENTRY * PAGE_SIZE + entry,
            page_tables: PML4 * PAGE_SIZE,
            list: LISTS * PAGE_SIZE + u64::from(index) * list_capacity as u64 * 8,
            progress: (PROGRESS + u64::from(index)) * PAGE_SIZE,
        })
    }

    /// Makes a vCPU that finds `words` at its list's place.
    fn create(
        &self,
        index: u32,
        mode: Mode,
        registers: &kvm_regs,
        places: &Places,
        words: impl Iterator<Item = u64>,
    ) -> Result<TinyVcpu, VmError> {
        let inner = &self.inner;
        let vcpu = TinyVcpu::new(
            Arc::clone(inner),
            &inner.boot,
            index,
            mode,
            registers,
            places,
        )?;
        for (word, at) in words.zip((places.list..).step_by(8)) {
            inner.boot.write_u64(at, word);
        }
        Ok(vcpu)
    }
}

impl VmInner {
    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        // Every change of the map is one step, so a panic elsewhere leaves it whole.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(
        &self,
        id: u32,
        gpa: u64,
        memory: Arc<GuestMemory>,
        logged: bool,
    ) -> Result<(), VmError> {
        let mut slots = self.slots();
        if slots.contains_key(&id) {
            return Err(VmError::SlotExists { id });
        }
        let slot = Slot { gpa, memory };
        self.set_region(id, &slot, slot.memory.bytes(), log_flag(logged))?;
        slots.insert(id, slot);
        Ok(())
    }

    /// Sets slot `id` to `bytes` bytes: all of the slot's memory, or 0 to delete it.
    fn set_region(&self, id: u32, slot: &Slot, bytes: u64, flags: u32) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: id,
            flags,
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

fn log_flag(logged: bool) -> u32 {
    if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
}
