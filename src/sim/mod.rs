//! A simulated kernel, to test a VMM's use of this crate without `/dev/kvm` (feature `test-utils`).
//!
//! It keeps rings in ordinary memory and treats them as KVM does: a page that is *armed*
//! (write-protected) is logged at its next write and disarmed; further writes are silent until a
//! reset arms it again; a vCPU whose ring has reached the soft limit does not run. It also knows
//! the truth: every write counts up the version of its page, logged or not, so a test can tell
//! whether a copy made on the word of a [`DirtyLog`] is equal to the original.
//!
//! Where the kernel leaves room, the simulation takes the worst: a reset frees all entries first,
//! then arms all pages at the very end, so that whoever copies a page before the reset has returned
//! is found out; so does the reading of a [bitmap](Mode::Bitmap). It arms them in batches, as KVM does,
//! and forgets a whole batch for one page that its slot does not have. [Faults](ResetFault) make it
//! misbehave.
//!
//! ```
//! use kvm_dirty_ring::sim::{SimConfig, SimVm};
//! use kvm_dirty_ring::{DirtyPages, SlotId};
//!
//! let vm = SimVm::new(SimConfig::default());
//! let log = vm.dirty_log();
//! let ram = SlotId::new(0, 0);
//! log.add_slot(ram, 1000)?;
//! vm.create_slot(ram, 1000);
//! let vcpu = vm.add_vcpu();
//! let _ring = log.attach_ring(vcpu.ring_memory())?;
//!
//! vcpu.write(ram, 7)?;
//! let mut dirty = DirtyPages::new();
//! log.sync(&mut dirty)?;
//! assert!(dirty.contains(ram, 7));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
mod slot;
mod vcpu;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::kernel::{Kernel, Mode, RESERVED_ENTRIES, Recycled};
use crate::log::DirtyLog;
use crate::slot_id::SlotId;
use batch::Batch;
use slot::SimSlot;
pub use vcpu::{SimVcpu, WriteError};

/// How a simulated machine is made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SimConfig {
    /// Entries of each ring: a power of two.
    pub ring_entries: u32,
    /// Entries in reserve: a vCPU stops that many before its ring's end.
    pub reserved: u32,
    /// Entries of each vCPU's hardware buffer (Intel's page-modification logging has 512), whose
    /// pages reach the ring late: when it is full, or when the vCPU leaves the guest. Zero: none.
    pub pml: usize,
    /// Index at which rings start, to reach the wrap at 2^32.
    pub first_index: u32,
    /// How it logs what vCPUs write. In [`Mode::Bitmap`] their rings stay empty.
    pub mode: Mode,
    /// Whether there are bitmaps beside rings, for [what the kernel writes](SimVm::kernel_write).
    pub with_bitmap: bool,
}

impl Default for SimConfig {
    /// Rings of 4,096 entries, 64 of them in reserve, no hardware buffer, no bitmaps.
    fn default() -> Self {
        Self {
            ring_entries: 4096,
            reserved: RESERVED_ENTRIES,
            pml: 0,
            first_index: 0,
            mode: Mode::Rings,
            with_bitmap: false,
        }
    }
}

/// The reading of a slot's bitmap that fails half-way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapFault {
    /// Bits that it takes, if there are as many.
    pub after: u64,
    /// The error number that it fails with then.
    pub error: i32,
}

/// Something that a reset does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetFault {
    /// It stops after so many entries, if there are more, as with a signal pending: the last of
    /// them, up to 64, are recycled and their pages not armed, and the count says only what was
    /// recycled.
    Short {
        /// Entries recycled.
        after: u32,
    },
    /// The thread is stopped after the last entry: all are recycled, and the count says so; those of
    /// them that end the last ring, within 64 pages, are not armed.
    AtEnd,
    /// It fails with this error number and does nothing.
    Error(i32),
}

/// A moment inside a reset, or the reading of a bitmap, at which a test may let the guest write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetPhase {
    /// Nothing is recycled yet, no bit is taken.
    Begin,
    /// All entries are free again, or all bits taken; no page is armed yet: writes to them are still
    /// silent.
    Recycled,
}

/// A simulated virtual machine. Clones are handles to the same one.
#[derive(Clone)]
pub struct SimVm {
    inner: Arc<Inner>,
}

struct Inner {
    config: SimConfig,
    slots: RwLock<BTreeMap<SlotId, Arc<SimSlot>>>,
    vcpus: RwLock<Vec<Arc<vcpu::Inner>>>,
    /// Held through a reset, as the kernel holds its `slots_lock`.
    resets: Mutex<Resets>,
}

#[derive(Default)]
struct Resets {
    faults: VecDeque<ResetFault>,
    bitmap_faults: VecDeque<BitmapFault>,
    hook: Option<Hook>,
}

type Hook = Box<dyn FnMut(ResetPhase) + Send>;

impl SimVm {
    /// A machine without slots and vCPUs.
    ///
    /// # Panics
    /// If the ring's size is not a power of two, or the reserve leaves nothing of it.
    pub fn new(config: SimConfig) -> Self {
        assert!(config.ring_entries.is_power_of_two());
        assert!(config.reserved > 0 && config.reserved < config.ring_entries);
        let inner = Inner {
            config,
            slots: RwLock::default(),
            vcpus: RwLock::default(),
            resets: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A new log over this machine.
    pub fn dirty_log(&self) -> DirtyLog {
        DirtyLog::with_kernel(Box::new(self.clone()), self.inner.config.ring_entries)
    }

    /// Entries at which a vCPU stops.
    pub fn soft_limit(&self) -> u32 {
        self.inner.config.ring_entries - self.inner.config.reserved
    }

    /// Creates a logged slot, every page armed and of version zero; in place of one with that id.
    pub fn create_slot(&self, slot: SlotId, pages: u64) {
        let slots = &self.inner.slots;
        let mut slots = slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.insert(slot, Arc::new(SimSlot::new(pages)));
    }

    /// Deletes a slot. Entries that name it stay in the rings and are recycled without effect.
    pub fn delete_slot(&self, slot: SlotId) {
        let slots = &self.inner.slots;
        let mut slots = slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.remove(&slot);
    }

    /// Arms every page of a slot, as toggling `KVM_MEM_LOG_DIRTY_PAGES` does.
    pub fn rearm_slot(&self, slot: SlotId) {
        if let Some(slot) = self.slot(slot) {
            slot.rearm();
            self.flush();
        }
    }

    /// Switches a slot's `KVM_MEM_LOG_DIRTY_PAGES`, which [`create_slot`](Self::create_slot) has
    /// set. On: every page is armed. Off: no write is logged, what the hardware or a bitmap still
    /// holds is gone, and entries in the rings stay there. The same as before: nothing happens.
    pub fn set_logged(&self, slot: SlotId, logged: bool) {
        if let Some(slot) = self.slot(slot) {
            slot.set_logged(logged);
            self.flush();
        }
    }

    /// Creates a vCPU.
    pub fn add_vcpu(&self) -> SimVcpu {
        let vcpu = SimVcpu::new(self.clone());
        let vcpus = &self.inner.vcpus;
        let mut vcpus = vcpus.write().unwrap_or_else(PoisonError::into_inner);
        vcpus.push(vcpu.inner());
        vcpu
    }

    /// Writes a page as a device does: no vCPU logs it. False if there is no such page.
    pub fn device_write(&self, slot: SlotId, page: u64) -> bool {
        self.slot(slot).is_some_and(|slot| slot.write(page))
    }

    /// Writes a page as the kernel itself does, without a vCPU: only a bitmap logs it. False if there is
    /// no such page.
    pub fn kernel_write(&self, slot: SlotId, page: u64) -> bool {
        self.slot(slot).is_some_and(|slot| {
            let written = slot.write(page);
            // After the write, as in the kernel's `kvm_write_guest_page`.
            if self.has_bitmap() && slot.is_logged() {
                slot.log(page);
            }
            written
        })
    }

    /// The truth: how often `page` was written since its slot was created; `None` if there is no
    /// such page. Reading it stands for copying the page.
    pub fn version(&self, slot: SlotId, page: u64) -> Option<u64> {
        self.slot(slot)?.version(page)
    }

    /// Lets the next resets go wrong, each fault one of them, in this order.
    pub fn inject(&self, faults: impl IntoIterator<Item = ResetFault>) {
        self.resets().faults.extend(faults);
    }

    /// Lets the next readings of bitmaps go wrong.
    pub fn inject_bitmap(&self, faults: impl IntoIterator<Item = BitmapFault>) {
        self.resets().bitmap_faults.extend(faults);
    }

    /// Calls `hook` inside every reset, and every reading of a bitmap, from now on. It may write as vCPUs and devices do; it must
    /// not reset, sync, or change slots.
    pub fn on_reset(&self, hook: impl FnMut(ResetPhase) + Send + 'static) {
        self.resets().hook = Some(Box::new(hook));
    }

    fn resets(&self) -> std::sync::MutexGuard<'_, Resets> {
        let resets = &self.inner.resets;
        resets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, slot: SlotId) -> Option<Arc<SimSlot>> {
        let slots = &self.inner.slots;
        let slots = slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&slot).cloned()
    }

    fn vcpus(&self) -> Vec<Arc<vcpu::Inner>> {
        let vcpus = &self.inner.vcpus;
        vcpus.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for every write that may have begun on an older protection: the kernel's remote TLB
    /// flush.
    fn flush(&self) {
        for vcpu in self.vcpus() {
            vcpu.flush();
        }
    }
}

impl Kernel for SimVm {
    fn reset(&self) -> io::Result<Recycled> {
        let mut resets = self.resets();
        let fault = resets.faults.pop_front();
        if let Some(ResetFault::Error(number)) = fault {
            return Err(io::Error::from_raw_os_error(number));
        }
        if let Some(hook) = &mut resets.hook {
            hook(ResetPhase::Begin);
        }
        let limit = match fault {
            Some(ResetFault::Short { after }) => after,
            _ => u32::MAX,
        };
        let (mut entries, mut batches) = (Vec::new(), Vec::new());
        let mut recycled = 0;
        let vcpus = self.vcpus();
        for vcpu in &vcpus {
            entries.clear();
            recycled += vcpu.recycle(limit - recycled, &mut entries);
            Batch::of_ring(&entries, &mut batches);
        }
        let short = recycled == limit && vcpus.iter().any(|vcpu| vcpu.awaits_reset());
        if let Some(hook) = &mut resets.hook {
            hook(ResetPhase::Recycled);
        }
        let interrupted = fault == Some(ResetFault::AtEnd);
        if short || interrupted {
            // The batch that was being put together.
            batches.pop();
        }
        for batch in batches {
            if let Some(slot) = self.slot(SlotId::from_raw(batch.slot)) {
                batch.arm(&slot);
            }
        }
        self.flush();
        Ok(Recycled {
            entries: recycled,
            interrupted,
        })
    }

    fn reserved_entries(&self) -> u32 {
        self.inner.config.reserved
    }

    fn mode(&self) -> Mode {
        self.inner.config.mode
    }

    fn has_bitmap(&self) -> bool {
        self.mode() == Mode::Bitmap || self.inner.config.with_bitmap
    }

    fn take_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        let mut resets = self.resets();
        let refused = |number| Err(io::Error::from_raw_os_error(number));
        let Some(memory) = self.slot(slot).filter(|memory| memory.is_logged()) else {
            return refused(libc::ENOENT);
        };
        let fault = resets.bitmap_faults.pop_front();
        let most = fault.map_or(u64::MAX, |fault| fault.after);
        if let Some(hook) = &mut resets.hook {
            hook(ResetPhase::Begin);
        }
        let pages: Vec<u64> = memory.take_logged(most).collect();
        if let Some(hook) = &mut resets.hook {
            hook(ResetPhase::Recycled);
        }
        let mut fits = true;
        for page in pages {
            memory.arm(page);
            match words.get_mut((page / 64) as usize) {
                Some(word) => *word |= 1 << (page % 64),
                None => fits = false,
            }
        }
        self.flush();
        match fault {
            Some(fault) => refused(fault.error),
            None if !fits => refused(libc::EFAULT),
            None => Ok(()),
        }
    }
}

impl core::fmt::Debug for SimVm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SimVm")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    /// A test that makes thousands of machines would otherwise fill the memory.
    #[test]
    fn a_machine_is_freed_with_its_last_handle() {
        let vm = SimVm::new(SimConfig::default());
        let held = Arc::new(());
        let hook = Arc::clone(&held);
        vm.on_reset(move |_| drop(Arc::clone(&hook)));
        let log = vm.dirty_log();
        let vcpu = vm.add_vcpu();
        let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        drop((vm, log, ring));
        assert_eq!(Arc::strong_count(&held), 2, "the vCPU is a handle");
        drop(vcpu);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
