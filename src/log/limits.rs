// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dirty limits, as a VMM sets, applies and ends them.

use core::fmt;
use core::num::NonZeroU64;
use core::time::Duration;

use super::DirtyLog;
use super::vcpu_ring::VcpuRing;
use crate::error::LimitError;
use crate::kernel::Mode;
use crate::limit::account::Standing;
use crate::sync::lock;

/// How long after a look at limited vCPUs the next look is due, while one of them runs.
const LOOK: Duration = Duration::from_millis(1);

/// Dirty limits.
impl DirtyLog {
    /// Limits one vCPU to `limit` dirty pages a second; `vcpu` is its number in the order in which vCPUs were
    /// attached.
    ///
    /// `None` lifts the limit, ends the vCPU's sleep, and forgives its debt.
    ///
    /// A page counts when it is logged: at the first write to it since it was last protected. A vCPU that is ahead of its limit
    /// sleeps in [`VcpuRing::throttle`] and at the end of [`VcpuRing::on_full`]. So the mean over some seconds is the limit,
    /// whichever thread empties the ring, and whenever. Unused budget is good for a quarter of a second; a debt of less than 5 ms
    /// is left standing.
    ///
    /// Run a [`Limiter`](crate::Limiter): it kicks the vCPU out of the guest about a millisecond after it has got ahead. Without
    /// one, the vCPU stops only at a full ring, for as long as a whole ring takes under the limit (65,536 entries at 1,000 pages/s:
    /// a minute). With a reaper that leaves no ring to fill, it does not stop at all.
    ///
    /// # Errors
    /// [`LimitError::NoVcpu`]; [`LimitError::Bitmap`] in [`Mode::Bitmap`].
    ///
    /// ```
    /// # let vm = kvm_dirty_ring::sim::SimVm::new(Default::default());
    /// # let log = vm.dirty_log();
    /// # let ring = log.attach_ring(vm.add_vcpu().ring_memory())?;
    /// use std::num::NonZeroU64;
    ///
    /// log.set_dirty_limit(0, NonZeroU64::new(20_000))?;
    /// assert_eq!(log.stats().vcpus[0].dirty_limit, NonZeroU64::new(20_000));
    /// log.set_dirty_limit(0, None)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_dirty_limit(
        &self,
        vcpu: usize,
        limit: Option<NonZeroU64>,
    ) -> Result<(), LimitError> {
        self.limitable()?;
        let inner = self.inner();
        let terms = lock(&inner.limits.terms);
        let layout = inner.harvester.layout();
        let vcpus = layout.vcpus.len();
        let limited = layout.vcpus.get(vcpu);
        let limited = limited.ok_or(LimitError::NoVcpu { vcpu, vcpus })?;
        limited.limit.set(limit, || limited.logged());
        inner.note_limited();
        inner.limits.change(terms);
        Ok(())
    }

    /// Limits every vCPU, including those attached later, to `limit` dirty pages a second each.
    ///
    /// Otherwise as [`set_dirty_limit`](Self::set_dirty_limit).
    ///
    /// # Errors
    /// [`LimitError::Bitmap`] in [`Mode::Bitmap`].
    pub fn set_dirty_limits(&self, limit: Option<NonZeroU64>) -> Result<(), LimitError> {
        self.limitable()?;
        let inner = self.inner();
        let mut terms = lock(&inner.limits.terms);
        terms.all = limit;
        for vcpu in &inner.harvester.layout().vcpus {
            vcpu.limit.set(limit, || vcpu.logged());
        }
        inner.note_limited();
        inner.limits.change(terms);
        Ok(())
    }

    /// Calls `kick` for each limited vCPU that is ahead of its limit and not asleep, with its number in the order
    /// in which vCPUs were attached.
    ///
    /// Returns when to look again, or `None` if no vCPU that has its [`VcpuRing`] has a limit.
    ///
    /// `kick` must make the vCPU's thread leave `KVM_RUN` and call [`VcpuRing::throttle`]. Use this in an event loop of the VMM's; a
    /// [`Limiter`](crate::Limiter) is a thread that does it.
    ///
    /// The next look repeats a kick that had no effect because the thread was about to enter the guest. `kick` is called with no
    /// lock held. The `VcpuRing` may be dropped meanwhile, so `kick` must cope with a thread that has ended.
    pub fn enforce_dirty_limits(&self, mut kick: impl FnMut(usize)) -> Option<Duration> {
        let mut next: Option<Duration> = None;
        for (place, vcpu) in self.inner().harvester.layout().vcpus.iter().enumerate() {
            if !vcpu.is_held() {
                // Without a `VcpuRing` there is no thread to kick.
                continue;
            }
            let wait = match vcpu.limit.look(|| vcpu.logged()) {
                None => continue,
                Some(Standing::Asleep(rest)) => rest.saturating_add(LOOK),
                Some(Standing::Free) => LOOK,
                Some(Standing::Owes) => {
                    kick(place);
                    LOOK
                }
            };
            next = Some(next.map_or(wait, |next| next.min(wait)));
        }
        next
    }

    /// Wakes every vCPU thread that sleeps for its limit, and lets none fall asleep until the returned value is
    /// dropped.
    ///
    /// Debts remain and are slept off later.
    ///
    /// Call it before you stop vCPUs, and drop the result when they are to run again. Then no stop waits for a sleep.
    ///
    /// ```
    /// # let log = kvm_dirty_ring::sim::SimVm::new(Default::default()).dirty_log();
    /// # let (stop_vcpus, resume_vcpus) = (|| (), || ());
    /// let awake = log.keep_awake();
    /// stop_vcpus();
    /// // The last round of a migration, for example.
    /// drop(awake);
    /// resume_vcpus();
    /// ```
    pub fn keep_awake(&self) -> Awake {
        let inner = self.inner();
        let mut terms = lock(&inner.limits.terms);
        terms.wakers += 1;
        for vcpu in &inner.harvester.layout().vcpus {
            vcpu.limit.keep_awake(true);
        }
        inner.limits.change(terms);
        Awake { log: self.clone() }
    }

    fn limitable(&self) -> Result<(), LimitError> {
        match self.mode() {
            Mode::Bitmap => Err(LimitError::Bitmap),
            _ => Ok(()),
        }
    }
}

/// Keeps the threads of all vCPUs from sleeping for their limits; see [`DirtyLog::keep_awake`].
#[must_use = "threads may sleep again as soon as it is dropped"]
pub struct Awake {
    log: DirtyLog,
}

impl Drop for Awake {
    fn drop(&mut self) {
        let inner = self.log.inner();
        let mut terms = lock(&inner.limits.terms);
        terms.wakers -= 1;
        if terms.wakers == 0 {
            for vcpu in &inner.harvester.layout().vcpus {
                vcpu.limit.keep_awake(false);
            }
        }
        inner.limits.change(terms);
    }
}

impl fmt::Debug for Awake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Awake").finish_non_exhaustive()
    }
}

impl VcpuRing {
    /// Sleeps for as long as the vCPU is ahead of its [dirty limit](DirtyLog::set_dirty_limit), and returns how long that was: zero,
    /// after a lock and a look, if it is not ahead.
    ///
    /// Call it on the vCPU's thread whenever `KVM_RUN` was interrupted (`EINTR`). You may also call it after every other exit. It
    /// returns early when the limit is lifted, and at once while an [`Awake`] exists.
    pub fn throttle(&mut self) -> Duration {
        self.vcpu.pay()
    }
}
