// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine: slots, vCPUs, and the kernel behind the log.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::batch::Batch;
use super::config::{BitmapFault, ResetFault, ResetPhase, SimConfig};
use super::slot::SimSlot;
use super::vcpu_state::VcpuState;
use crate::kernel::{Kernel, Mode, Recycled};
use crate::log::DirtyLog;
use crate::slot_id::SlotId;

/// A simulated virtual machine. Clones are handles to the same one.
#[derive(Clone)]
pub struct SimVm {
    inner: Arc<Inner>,
}

struct Inner {
    config: SimConfig,
    slots: RwLock<BTreeMap<SlotId, Arc<SimSlot>>>,
    vcpus: RwLock<Vec<Arc<VcpuState>>>,
    /// Held through a reset, as the kernel holds its `slots_lock`.
    resets: Mutex<Resets>,
    /// `KVM_DIRTY_LOG_INITIALLY_SET`.
    initially_set: AtomicBool,
}

#[derive(Default)]
struct Resets {
    faults: VecDeque<ResetFault>,
    bitmap_faults: VecDeque<BitmapFault>,
    hook: Option<Hook>,
}

type Hook = Box<dyn FnMut(ResetPhase) + Send>;

impl SimVm {
    /// Creates a machine without slots and vCPUs.
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
            initially_set: AtomicBool::new(false),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Creates a new log over this machine.
    pub fn dirty_log(&self) -> DirtyLog {
        DirtyLog::with_kernel(Box::new(self.clone()), self.inner.config.ring_entries)
    }

    /// Returns the entries at which a vCPU stops.
    pub fn soft_limit(&self) -> u32 {
        self.inner.config.ring_entries - self.inner.config.reserved
    }

    /// Creates a logged slot, with every page armed and of version zero. It replaces a slot with that id.
    pub fn create_slot(&self, slot: SlotId, pages: u64) {
        let memory = Arc::new(SimSlot::new(pages));
        // In ring mode nothing is mapped yet that would have to be protected.
        if self.mode() == Mode::Bitmap {
            self.begin(&memory);
        }
        let slots = &self.inner.slots;
        let mut slots = slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.insert(slot, memory);
    }

    /// Enables `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, with `KVM_DIRTY_LOG_INITIALLY_SET` if `on`: the pages of a slot whose log begins then are
    /// unprotected, and their bits are set where there is a bitmap.
    pub fn set_initially_set(&self, on: bool) {
        // Release: pairs with the acquire in `begin`.
        self.inner.initially_set.store(on, Ordering::Release);
    }

    /// A slot's log has begun.
    fn begin(&self, memory: &SimSlot) {
        // Acquire: pairs with the release in `set_initially_set`.
        if self.inner.initially_set.load(Ordering::Acquire) {
            memory.begin_dirty(self.has_bitmap());
        }
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
            self.begin(&slot);
            self.flush();
        }
    }

    /// Switches a slot's `KVM_MEM_LOG_DIRTY_PAGES`, which [`create_slot`](Self::create_slot) has set.
    ///
    /// On: every page is armed. Off: no write is logged, the contents of the hardware buffer and of a bitmap are
    /// dropped, and entries in the rings stay there. No change: nothing happens.
    pub fn set_logged(&self, slot: SlotId, logged: bool) {
        if let Some(slot) = self.slot(slot) {
            if slot.set_logged(logged) && logged {
                self.begin(&slot);
            }
            self.flush();
        }
    }

    /// Protects one page, as the kernel may for its own reasons: the next write of a vCPU is logged, even to a page that stays
    /// open.
    pub fn protect(&self, slot: SlotId, page: u64) {
        if let Some(slot) = self.slot(slot) {
            slot.arm(page);
            self.flush();
        }
    }

    /// Whether the next write of a vCPU to the page faults, and is logged if its slot is. Returns `None` if there is no
    /// such page.
    pub fn is_protected(&self, slot: SlotId, page: u64) -> Option<bool> {
        self.slot(slot)?.is_armed(page)
    }

    /// Writes a page as a device does: no vCPU logs it. Returns false if there is no such page.
    pub fn device_write(&self, slot: SlotId, page: u64) -> bool {
        self.slot(slot).is_some_and(|slot| slot.write(page))
    }

    /// Writes a page as the kernel itself does, without a vCPU: only a bitmap logs it.
    ///
    /// Returns false if there is no such page.
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

    /// Returns the truth: how often `page` was written since its slot was created.
    ///
    /// `None` if there is no such page. Reading it stands for copying the page.
    pub fn version(&self, slot: SlotId, page: u64) -> Option<u64> {
        self.slot(slot)?.version(page)
    }

    /// Makes the next resets fail: one fault for each, in this order.
    pub fn inject(&self, faults: impl IntoIterator<Item = ResetFault>) {
        self.resets().faults.extend(faults);
    }

    /// Makes the next readings of bitmaps fail: one fault for each, in this order.
    pub fn inject_bitmap(&self, faults: impl IntoIterator<Item = BitmapFault>) {
        self.resets().bitmap_faults.extend(faults);
    }

    /// Calls `hook` inside every reset, and every reading of a bitmap, from now on.
    ///
    /// The hook may write as vCPUs and devices do. It must not reset, sync, or change slots.
    pub fn on_reset(&self, hook: impl FnMut(ResetPhase) + Send + 'static) {
        self.resets().hook = Some(Box::new(hook));
    }

    pub(super) fn config(&self) -> &SimConfig {
        &self.inner.config
    }

    pub(super) fn attach(&self, vcpu: Arc<VcpuState>) {
        let vcpus = &self.inner.vcpus;
        let mut vcpus = vcpus.write().unwrap_or_else(PoisonError::into_inner);
        vcpus.push(vcpu);
    }

    fn resets(&self) -> std::sync::MutexGuard<'_, Resets> {
        let resets = &self.inner.resets;
        resets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn slot(&self, slot: SlotId) -> Option<Arc<SimSlot>> {
        let slots = &self.inner.slots;
        let slots = slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&slot).cloned()
    }

    fn vcpus(&self) -> Vec<Arc<VcpuState>> {
        let vcpus = &self.inner.vcpus;
        vcpus.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for every write that may have begun under an older protection: the kernel's remote TLB flush.
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
            // The batch that was still open.
            batches.pop();
        }
        for batch in batches {
            if let Some(slot) = self.slot(SlotId::from_raw(batch.slot)) {
                batch.arm(&slot, self.config().protects_spans);
            }
        }
        self.flush();
        Ok(Recycled {
            entries: recycled,
            interrupted,
        })
    }

    fn reserved_entries(&self) -> u32 {
        let config = &self.inner.config;
        config.reported_reserve.unwrap_or(config.reserved)
    }

    fn switch_initially_set_off(&self) -> io::Result<()> {
        if self.mode() == Mode::Rings {
            self.set_initially_set(false);
        }
        Ok(())
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

    fn read_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        if !self.config().manual_protect {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let _resets = self.resets();
        for page in self.logged_slot(slot)?.logged() {
            match words.get_mut((page / 64) as usize) {
                Some(word) => *word |= 1 << (page % 64),
                None => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            }
        }
        Ok(())
    }

    fn clear_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        let mut resets = self.resets();
        let memory = self.logged_slot(slot)?;
        let fault = resets.bitmap_faults.pop_front();
        let mut most = fault.map_or(u64::MAX, |fault| fault.after);
        if let Some(hook) = &mut resets.hook {
            hook(ResetPhase::Begin);
        }
        let pages = (0..words.len() as u64 * 64).filter(|page| {
            let is_asked_for = words[(page / 64) as usize] >> (page % 64) & 1 == 1;
            let takes = is_asked_for && most > 0 && memory.unlog(*page);
            most -= u64::from(takes);
            takes
        });
        let pages: Vec<u64> = pages.collect();
        if let Some(hook) = &mut resets.hook {
            hook(ResetPhase::Recycled);
        }
        pages.into_iter().for_each(|page| memory.arm(page));
        self.flush();
        match fault {
            Some(fault) => Err(io::Error::from_raw_os_error(fault.error)),
            None => Ok(()),
        }
    }
}

impl SimVm {
    fn logged_slot(&self, slot: SlotId) -> io::Result<Arc<SimSlot>> {
        let logged = self.slot(slot).filter(|memory| memory.is_logged());
        logged.ok_or(io::Error::from_raw_os_error(libc::ENOENT))
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

    /// Otherwise a test that makes thousands of machines would fill the memory.
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
