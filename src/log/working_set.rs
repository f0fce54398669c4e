// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The writable working set, and the refresh that closes it.

use std::io;
use std::time::Instant;

use super::DirtyLog;
use crate::error::SlotError;
use crate::kernel::Mode;
use crate::observe::trace;
use crate::slot_id::SlotId;
use crate::slots::working_set::WorkingSet;
use crate::sync::lock;

impl DirtyLog {
    /// Leaves pages open that the guest writes again and again, within `terms`.
    ///
    /// `None` protects every page that a sync reports, as in a new log. You can change it at any time.
    ///
    /// Protecting a page costs a reset and the guest's next fault on it. That is wasted on a page that is written again before it is
    /// sent for good. With a working set, a harvested page stays writable while there are free places, and after that if it was
    /// written before in the same round, or if a [`refresh`](Self::refresh) has just closed it. It is then a *member*: the kernel does
    /// not log it any more, and every sync reports it among [`DirtyPages::members`](crate::DirtyPages::members), until a refresh has
    /// closed it, or its slot's [tracking has stopped](Self::stop_tracking). Send members in the last round.
    ///
    /// In [`Mode::Bitmap`] a page joins when a sync finds it set, and the sync before has found it set and cleared it. Without
    /// manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`) none joins.
    ///
    /// Call it when a migration starts, not before: otherwise pages that have long been cold fill the places.
    /// [`Convergence`](crate::convergence::Convergence) decides when to refresh.
    ///
    /// While any vCPU has a [dirty limit](Self::set_dirty_limit) no page joins, because the vCPU must pay for what it writes.
    /// Members stay then, as they do when the set is switched off, and a refresh is [owed](crate::WorkingSetStats::refresh_owed).
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId, WorkingSet};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// # let vcpu = vm.add_vcpu();
    /// # let _ring = log.attach_ring(vcpu.ring_memory())?;
    /// let mut dirty = DirtyPages::new();
    /// log.set_working_set(Some(WorkingSet::new(1)));
    /// vcpu.write(ram, 5)?;
    /// vcpu.write(ram, 6)?;
    /// log.sync(&mut dirty)?;
    /// assert_eq!((dirty.members().page_count(), dirty.others().page_count()), (1, 1));
    /// // Nothing is logged of page 5 any more, and every sync reports it.
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.contains(ram, 5) && !dirty.contains(ram, 6));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_working_set(&self, terms: Option<WorkingSet>) {
        self.inner().harvester.working_set.set(terms);
    }

    /// Closes all members of the working set: has their pages protected again.
    ///
    /// The next sync reports them once more, as [others](crate::DirtyPages::others). Returns the number of slots
    /// that were protected anew.
    ///
    /// With rings, it calls `protect` with each slot that has members or suspects, as [`rearm`](Self::rearm) does: no vCPU may be in
    /// `KVM_RUN` meanwhile. The cost depends on the kernel and on the *slot's* size, not on the number of members: less than 50 ms
    /// per GiB, but seconds for hundreds of GiB of huge pages. Measure it
    /// ([`WorkingSetStats::refresh_ns`](crate::WorkingSetStats::refresh_ns)), and refresh only where it fits the downtime.
    ///
    /// In [`Mode::Bitmap`] it clears the bits; no vCPU has to stop, and `protect` is not called.
    ///
    /// # Errors
    /// As [`rearm`](Self::rearm), or the kernel's bits could not be cleared. Members whose slot was not protected stay members.
    pub fn refresh(
        &self,
        mut protect: impl FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        let start = Instant::now();
        let before = self.members();
        for slot in self.inner().harvester.layout().slots.slots() {
            slot.members().refresh_begins();
        }
        let refreshed = match self.mode() {
            Mode::Bitmap => self.clear_members(),
            Mode::Rings => self.protect_those(
                |slot| slot.suspects() > 0 || slot.members().any(),
                &mut protect,
            ),
        };
        if refreshed.is_ok() {
            for slot in self.inner().harvester.layout().slots.slots() {
                slot.members().refresh_ends();
            }
        }
        let closed = before.saturating_sub(self.members());
        let ns = start.elapsed().as_nanos() as u64;
        let terms = &self.inner().harvester.working_set;
        terms.note_refresh(closed, ns, refreshed.is_ok());
        trace::refreshed(&self.inner().name, closed, ns);
        self.inner().emit_faults();
        refreshed
    }

    /// How many pages stay open in slots that stay.
    fn members(&self) -> u64 {
        let layout = self.inner().harvester.layout();
        layout
            .slots
            .staying()
            .map(|slot| slot.members().count())
            .sum()
    }

    /// The refresh of bitmaps. A sync in between would report pages whose writes the clearing then forgets.
    fn clear_members(&self) -> Result<usize, SlotError> {
        let harvester = &self.inner().harvester;
        let _one_at_a_time = lock(&self.inner().slot_change);
        let mut pending = lock(&self.inner().pending);
        let mut taking = self.inner().kernel_bits.lock();
        let layout = harvester.layout();
        let mut refreshed = 0;
        for slot in layout.slots.staying() {
            if !slot.members().any() || !slot.is_tracked() {
                continue;
            }
            let (id, pages) = (slot.id(), slot.pages());
            if !taking.fit(pages) || !pending.fit(&layout.slots) {
                return Err(SlotError::NoMemory { slot: id, pages });
            }
            taking.close_members(harvester.kernel(), slot)?;
            slot.members().begin_leaving();
            for (have, bits) in pending.slots_mut() {
                if core::ptr::eq(have, &**slot) {
                    slot.members().end_leaving(bits);
                }
            }
            refreshed += 1;
        }
        Ok(refreshed)
    }
}
