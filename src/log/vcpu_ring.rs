// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vCPU's ring: attaching it, and the calls of the thread that runs the vCPU.

use core::fmt;
use std::time::Instant;

use super::{DirtyLog, Inner};
use crate::error::{AttachError, FullError};
use crate::harvest::vcpu::{Seen, SoftLimit, Vcpu};
use crate::kernel::Mode;
use crate::observe::trace;
use crate::ring::memory::RingMemory;
use crate::sync::{Arc, lock};

/// After so many full exits in a row without room, the call returns an error. In the models after the first: none should
/// count as such there.
const PATIENCE: u32 = if cfg!(all(test, feature = "modelled")) {
    1
} else {
    3
};

/// The same where resets fall short meanwhile and recycle something.
const LONG_PATIENCE: u32 = 16;

impl DirtyLog {
    /// Starts to harvest a ring that is not mapped from a KVM vCPU.
    ///
    /// A ring whose [`VcpuRing`] was dropped may be attached again.
    ///
    /// # Errors
    /// [`AttachError::Size`] if the ring's size is not [`ring_entries`](Self::ring_entries);
    /// [`AttachError::Twice`] if its `VcpuRing` still exists.
    pub fn attach_ring(&self, memory: RingMemory) -> Result<VcpuRing, AttachError> {
        let (found, expected) = (memory.entries(), self.inner().ring_entries);
        if found != expected {
            return Err(AttachError::Size { found, expected });
        }
        let harvester = &self.inner().harvester;
        let reserved = harvester.kernel().reserved_entries();
        let prior = u64::from(expected.saturating_sub(reserved).max(1));
        let new = Arc::new(Vcpu::new(memory, reserved));
        // Held until the vCPU is in the layout. A call that changes all limits then reaches it, or came before.
        let terms = lock(&self.inner().limits.terms);
        let attached = harvester.change_layout(|layout| {
            // A second consumer would take the first one's entries for an overrun, so a vCPU that is attached again continues with
            // the first.
            let mut vcpus = layout.vcpus.iter();
            let index = match vcpus.position(|vcpu| vcpu.name == new.name) {
                Some(index) => index,
                None => {
                    new.limit.set(terms.all, || new.logged());
                    new.limit.keep_awake(terms.wakers > 0);
                    layout.vcpus.push(Arc::clone(&new));
                    layout.vcpus.len() - 1
                }
            };
            let vcpu = Arc::clone(&layout.vcpus[index]);
            match vcpu.hold() {
                true => Ok((index, vcpu)),
                false => Err(AttachError::Twice),
            }
        });
        self.inner().note_limited();
        self.inner().limits.change(terms);
        let (index, vcpu) = attached?;
        Ok(VcpuRing {
            inner: Arc::clone(self.inner()),
            index,
            // A vCPU that is attached again may have exited before. That exit saw another state of the ring.
            before: Some(vcpu.seen()).filter(|seen| seen.taken == 0),
            prior,
            calls_in_vain: 0,
            taught: None,
            vcpu,
        })
    }
}

/// One vCPU's ring, for the thread that runs the vCPU.
///
/// Dropping it detaches nothing: the ring stays mapped and harvested for as long as the log lives, as the vCPU stays in KVM.
/// Attach the vCPU again when it is plugged in again.
pub struct VcpuRing {
    inner: Arc<Inner>,
    index: usize,
    /// The ring when the last full exit ended, or when it was attached.
    before: Option<Seen>,
    /// Entries at which the vCPU should stop, by what the kernel reports.
    prior: u64,
    /// Full exits in a row that have made no room.
    calls_in_vain: u32,
    /// The soft limit before the last full exit, if that exit showed one.
    taught: Option<SoftLimit>,
    pub(crate) vcpu: Arc<Vcpu>,
}

impl VcpuRing {
    /// Makes room in the ring. Call it on `KVM_EXIT_DIRTY_RING_FULL`, on the vCPU's thread, then enter the guest again.
    ///
    /// It harvests this ring only, wakes the reaper, and returns when a reset has recycled the entries. Several vCPUs may share
    /// that reset. A vCPU that is ahead of its [dirty limit](DirtyLog::set_dirty_limit) then sleeps as in
    /// [`throttle`](Self::throttle).
    ///
    /// In [`Mode::Bitmap`](crate::Mode::Bitmap) there is no such exit, and this does nothing.
    ///
    /// # Errors
    /// The vCPU got no room, its pages are kept, and the thread has not slept. Entering the guest again leads to the same exit at
    /// once.
    ///
    /// - [`FullError::Reset`]: the reset failed. Call it again, a bounded number of times.
    /// - [`FullError::Broken`]: the kernel has overrun the ring, and none of it was recycled since the call before.
    /// - [`FullError::NoRoom`]: by the third call in a row, each of which found nothing, or next to nothing, of a full ring; by
    ///   the sixteenth where resets fall short and make progress. The ring is not this vCPU's, the log is not its VM's, or
    ///   the vCPU had not stopped on a full ring. A vCPU that waits for another thread's pass or reset does not get this
    ///   error, because entries that any thread recycled since the call before count. Two vCPUs whose rings were swapped get it
    ///   only if the other one's ring fills slowly, and no reaper empties it meanwhile.
    pub fn on_full(&mut self) -> Result<(), FullError> {
        let start = Instant::now();
        let mut entries = 0;
        let result = self.make_room(&mut entries);
        let stall = start.elapsed().as_nanos() as u64;
        self.vcpu.counts.stall_ns.add(stall);
        trace::full(&self.inner.name, self.index, entries, stall);
        self.inner.emit_faults();
        // Return a failure at once, not after a sleep.
        if result.is_ok() {
            self.vcpu.pay();
        }
        result
    }

    /// Returns the vCPU's number: its place in [`Stats::vcpus`](crate::Stats::vcpus), in [`DirtyLog::observe`], and
    /// in events.
    ///
    /// It is the number of vCPUs that were attached before it.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns whether at least `count` entries wait in the ring to be harvested.
    ///
    /// It costs one load of a flag. The answer holds for a moment during the call: other threads may take entries
    /// meanwhile, and the vCPU may log more.
    pub fn at_least(&self, count: u32) -> bool {
        self.vcpu.at_least(count)
    }

    /// Returns how many entries wait in the ring to be harvested.
    ///
    /// It costs one load per bit of the ring's size, or one load if the ring is empty. Other threads may take
    /// entries meanwhile. For all rings, and from any thread, see [`DirtyLog::observe`].
    pub fn occupancy(&self) -> u32 {
        let (waiting, _) = self.vcpu.occupancy();
        waiting
    }

    /// Harvests this ring and ends the pass before its reset, as a panic in between would.
    ///
    /// Returns the number of entries. Their pages come with a later sync, which makes the reset first. For tests
    /// (feature `test-utils`).
    #[cfg(feature = "test-utils")]
    #[doc(hidden)]
    pub fn harvest_and_stop(&mut self) -> u32 {
        self.inner.harvester.begin().harvest(&self.vcpu).entries
    }

    /// Sets `entries` to the number taken from the ring, reset or not.
    fn make_room(&mut self, entries: &mut u32) -> Result<(), FullError> {
        let mut pass = self.inner.harvester.begin();
        let taken = pass.harvest(&self.vcpu);
        *entries = taken.entries;
        // Whether the vCPU's exit saw exactly the entries that this call has taken: all that were taken before were recycled
        // before, and no other thread has taken any since. Asked now, as another pass may have been faster. "Since" counts from
        // the exit before, or from the last look at the ring. Otherwise a ring that a reaper empties now and then would never show
        // its limit, and the policy would never learn that the reaper comes too late.
        let is_all = |before: &Seen| {
            let since = self.vcpu.taken() - before.taken;
            before.all_recycled && since == u64::from(taken.entries)
        };
        let alone =
            self.before.as_ref().is_some_and(is_all) || self.vcpu.exit_saw_only(taken.entries);
        // No kernel stops a vCPU at so few entries.
        let is_little = alone && u64::from(taken.entries) * 16 < self.prior;
        let limit = self.vcpu.soft_limit();
        if alone && taken.alone && !is_little {
            self.vcpu.learn_soft_limit(taken.entries);
            self.taught = Some(limit);
        }
        self.vcpu.counts.full_exits.add(1);
        // This ring is empty by now; the others are the reaper's business. Its look must see all of the above, and may come
        // before our reset is done.
        self.inner.alarm.full();
        let gate = &self.inner.harvester.gate;
        let (faults, recycled) = (gate.faults(), gate.recycled());
        // If the ring was empty, another pass has taken its entries, and the vCPU waits for the reset of that pass.
        let pass = pass.reset_all()?;
        // The entries of a full ring are not all at its head.
        if taken.entries == 0 || alone && u64::from(taken.entries) < limit.entries {
            pass.look_for_a_gap(&self.vcpu);
        }
        pass.publish();
        if self.inner.harvester.kernel().mode() == Mode::Bitmap {
            return Ok(());
        }
        let gate = &self.inner.harvester.gate;
        let fell_short = gate.faults() != faults && gate.recycled() != recycled;
        self.judge(is_little, fell_short)
    }

    /// Decides whether the vCPU can run on: some entry of its ring was recycled since the full exit before, by any thread.
    fn judge(&mut self, is_little: bool, fell_short: bool) -> Result<(), FullError> {
        let now = self.vcpu.seen();
        let before = self.before.replace(now);
        let recycled = before.is_none_or(|before| before.reset_index != now.reset_index);
        if recycled && !is_little {
            self.calls_in_vain = 0;
            return Ok(());
        }
        let vcpu = self.index;
        if self.vcpu.is_broken() && !recycled {
            return Err(FullError::Broken { vcpu });
        }
        self.calls_in_vain = self.calls_in_vain.saturating_add(1);
        let calls = self.calls_in_vain;
        // The resets have recycled something and may not have reached this ring yet. It is full all the same.
        if fell_short {
            return match calls {
                LONG_PATIENCE.. => Err(FullError::NoRoom { vcpu, calls }),
                _ => Ok(()),
            };
        }
        // This exit, or the one before it, did not come from a full ring, so forget the limit that it showed.
        if let Some(before) = self.taught.take() {
            self.vcpu.set_soft_limit(before);
        }
        match calls {
            PATIENCE.. => {
                self.vcpu.set_soft_limit(SoftLimit::supposed(self.prior));
                Err(FullError::NoRoom { vcpu, calls })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for VcpuRing {
    fn drop(&mut self) {
        self.vcpu.let_go();
    }
}

impl fmt::Debug for VcpuRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuRing").finish_non_exhaustive()
    }
}
