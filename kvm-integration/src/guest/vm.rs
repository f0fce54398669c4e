// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtual machine: its boot slot, its page tables, and the slots a test gives it.
//!
//! Slot 0, the *boot slot*, starts at address 0 and is never logged:
//!
//! | page | holds |
//! |---|---|
//! | 0 | nothing: `kvm_pvm` ends a guest that executes `out` in its page 0 |
//! | 1 | the code: at its start the loop over a list, halfway that of memory stress |
//! | 2 … 515 | page tables: on x86-64 PML4, PDPT, and a directory for each of 512 GiB |
//! | 516 … 547 | each vCPU's progress |
//! | 1024 … | each vCPU's list, or its random buffer |

use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};

use super::error::VmError;
use super::memory::{GuestMemory, HIGHEST_GPA, LOWEST_GPA, PAGE_SIZE};
use super::processor::{self, BOOT_END, Processor, Registers, tables};
use super::program::{Load, Mode, Places};
use super::slots::Slots;
use super::stamp::MAX_VCPUS;
use super::stress::{RANDOM_WORDS, Stress};
use super::vcpu::TinyVcpu;

/// Entries in a vCPU's list, unless [`TinyVm::with_capacity`] says otherwise.
const LIST_CAPACITY: usize = 1 << 20;

const ENTRY: u64 = 1;
/// Bytes from there.
const STRESS_ENTRY: u64 = PAGE_SIZE / 2;
const PROGRESS: u64 = 516;
const LISTS: u64 = 1024;

/// A virtual machine that does nothing but dirty pages.
///
/// It keeps the memory of its slots alive, and each [`TinyVcpu`] keeps the machine alive. All
/// methods may be called while vCPUs run.
#[derive(Debug)]
pub struct TinyVm {
    slots: Arc<Slots>,
    processor: Processor,
    vcpus: u32,
    list_capacity: usize,
}

impl TinyVm {
    /// Makes a machine for up to [`MAX_VCPUS`] vCPUs with lists of up to 2²⁰ entries. It has no vCPU
    /// yet, so that a dirty ring can still be enabled.
    pub fn new(kvm: &Kvm) -> Result<Self, VmError> {
        Self::with_capacity(kvm, MAX_VCPUS, LIST_CAPACITY)
    }

    /// The same for other numbers. Room for a list is taken only as it is filled.
    ///
    /// # Errors
    /// KVM or mmap refuses, or the lists don't fit.
    pub fn with_capacity(kvm: &Kvm, vcpus: u32, list_entries: usize) -> Result<Self, VmError> {
        let per_page = (PAGE_SIZE / 8) as usize;
        let list_pages = list_entries.div_ceil(per_page) as u64;
        let pages = list_pages
            .checked_mul(u64::from(vcpus))
            .and_then(|pages| pages.checked_add(LISTS))
            .filter(|&pages| pages <= BOOT_END / PAGE_SIZE)
            .filter(|_| (1..=MAX_VCPUS).contains(&vcpus))
            .ok_or(VmError::Capacity(vcpus, list_entries))?;
        let boot = Arc::new(GuestMemory::new(pages)?);
        boot.write_bytes(ENTRY * PAGE_SIZE, processor::program::code());
        boot.write_bytes(ENTRY * PAGE_SIZE + STRESS_ENTRY, processor::stress::code());
        let fd = kvm
            .create_vm()
            .map_err(VmError::kvm("KVM_CREATE_VM", "the machine"))?;
        let processor = Processor::of(kvm, &fd)?;
        Ok(Self {
            slots: Arc::new(Slots::new(fd, boot)),
            processor,
            vcpus,
            list_capacity: list_pages as usize * per_page,
        })
    }

    /// The machine, for calls of your own: to enable the dirty ring, to reset it.
    pub fn vm_fd(&self) -> &VmFd {
        &self.slots.fd
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
        self.slots.insert(id, gpa, memory, logged)
    }

    /// Takes slot `id` away, and lets go of its memory. A vCPU that stores to it later ends with
    /// [`VcpuError::UnexpectedExit`](super::error::VcpuError::UnexpectedExit).
    pub fn remove_slot(&self, id: u32) -> Result<(), VmError> {
        self.slots.remove(id)
    }

    /// Starts or stops the dirty log of slot `id`.
    pub fn set_logged(&self, id: u32, logged: bool) -> Result<(), VmError> {
        self.slots.set_logged(id, logged)
    }

    /// Protects all pages of slot `id` anew, which is logged. No vCPU may run: what it wrote meanwhile
    /// would not be logged.
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
        let bitmap = self.slots.fd.get_dirty_log(id, memory.bytes() as usize);
        bitmap.map_err(VmError::kvm("KVM_GET_DIRTY_LOG", format!("slot {id}")))
    }

    /// The memory of slot `id`.
    pub fn slot_memory(&self, id: u32) -> Option<Arc<GuestMemory>> {
        self.slots.memory(id)
    }

    /// Makes vCPU `index`, ready to start on its load. This may be done at any time, also while
    /// others run, but only once for each index.
    ///
    /// # Errors
    /// The index or the list is out of bounds, or KVM refuses.
    pub fn create_vcpu(&self, index: u32, load: &Load) -> Result<TinyVcpu, VmError> {
        let (entries, capacity) = (load.list.len(), self.list_capacity);
        if !(1..=capacity).contains(&entries) || entries as u64 % load.granule() != 0 {
            return Err(VmError::List {
                index,
                entries,
                chunk: load.chunk,
                capacity,
            });
        }
        let places = self.places(index, 0)?;
        let registers = processor::program::registers(index, load, &places);
        let words = load.list.iter().copied();
        self.create(index, load.mode, &registers, &places, words)
    }

    /// The same under memory stress. The lists' capacity must do for the random buffer, of 1,023
    /// words.
    ///
    /// # Errors
    /// The index is out of bounds, the capacity is too small, or KVM refuses.
    pub fn create_stressed_vcpu(&self, index: u32, stress: &Stress) -> Result<TinyVcpu, VmError> {
        let capacity = self.list_capacity;
        if capacity < RANDOM_WORDS {
            return Err(VmError::List {
                index,
                entries: RANDOM_WORDS,
                chunk: 0,
                capacity,
            });
        }
        let places = self.places(index, STRESS_ENTRY)?;
        let (registers, words) = (
            processor::stress::registers(stress, &places),
            stress.random_words(),
        );
        self.create(index, Mode::Native, &registers, &places, words)
    }

    fn places(&self, index: u32, entry: u64) -> Result<Places, VmError> {
        let vcpus = self.vcpus;
        if index >= vcpus {
            return Err(VmError::VcpuIndex { index, vcpus });
        }
        Ok(Places {
            code: ENTRY * PAGE_SIZE + entry,
            page_tables: tables::ROOT * PAGE_SIZE,
            list: LISTS * PAGE_SIZE + u64::from(index) * self.list_capacity as u64 * 8,
            progress: (PROGRESS + u64::from(index)) * PAGE_SIZE,
        })
    }

    /// Makes a vCPU that finds `words` at its list's place.
    fn create(
        &self,
        index: u32,
        mode: Mode,
        registers: &Registers,
        places: &Places,
        words: impl Iterator<Item = u64>,
    ) -> Result<TinyVcpu, VmError> {
        let vm = Arc::clone(&self.slots);
        vm.boot()?;
        let vcpu = TinyVcpu::new(vm, index, places.progress, |fd| {
            self.processor.set_up(fd, index, mode, registers, places)
        })?;
        for (word, at) in words.zip((places.list..).step_by(8)) {
            self.slots.boot.write_u64(at, word);
        }
        Ok(vcpu)
    }
}
