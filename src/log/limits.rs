//! Dirty limits, as a VMM sets, feels and ends them.

use core::fmt;
use core::num::NonZeroU64;
use core::time::Duration;

use super::DirtyLog;
use super::vcpu_ring::VcpuRing;
use crate::error::LimitError;
use crate::kernel::Mode;
use crate::limit::account::Standing;
use crate::sync::lock;

/// How long after a look at limited vCPUs the next one should be, while one of them runs.
const LOOK: Duration = Duration::from_millis(1);

/// Dirty limits.
impl DirtyLog {
    /// Lets one vCPU, by its place in the order in which they were attached, dirty no more than
    /// `limit` pages a second from now on; `None` lifts the limit, ends the sleep in which the vCPU
    /// may be for it, and forgives what it owed.
    ///
    /// A page counts when it is logged: at the first write to it since it was last protected. What
    /// a vCPU is ahead of its limit, it sleeps off in [`VcpuRing::throttle`] and at the end of
    /// [`VcpuRing::on_full`], so the mean over some seconds is the limit, whoever empties the ring
    /// and when. What it has not used stays good for a quarter of a second; a debt of less than 5
    /// ms is left standing.
    ///
    /// Who brings the vCPU there decides how long its stops are. A [`Limiter`](crate::Limiter)
    /// kicks it out of the guest about a millisecond after it has got ahead. Without one it stops
    /// at a full ring, for as long as a whole ring takes under the limit (65,536 entries at 1,000
    /// pages/s: a minute), and with a reaper that leaves no ring to fill, not at all.
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

    /// As [`set_dirty_limit`](Self::set_dirty_limit), for every vCPU and those attached later: each
    /// may dirty `limit` pages a second.
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

    /// Looks at the vCPUs that have a limit, and calls `kick` for each that is ahead of it and not
    /// asleep, by its place in the order in which they were attached: `kick` makes its thread leave
    /// `KVM_RUN` and call [`VcpuRing::throttle`]. Returns when to look again, `None` if no vCPU that
    /// has its [`VcpuRing`] has a limit. For a VMM's own event loop; a [`Limiter`](crate::Limiter) is a
    /// thread that does this.
    ///
    /// A kick that comes to nothing, since the thread was about to enter the guest, is repeated by
    /// the next look. `kick` is called with no lock held; the `VcpuRing` may be dropped meanwhile, so
    /// it must bear a thread that ends.
    pub fn enforce_dirty_limits(&self, mut kick: impl FnMut(usize)) -> Option<Duration> {
        let mut next: Option<Duration> = None;
        for (place, vcpu) in self.inner().harvester.layout().vcpus.iter().enumerate() {
            if !vcpu.is_held() {
                // Without a `VcpuRing` it has no thread that could be kicked.
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

    /// Wakes every vCPU's thread that sleeps for its limit, and lets none fall asleep until what is
    /// returned is dropped. What they owe remains, and is slept off later.
    ///
    /// A VMM that stops its vCPUs calls this first, and drops it when they are to run again: so no
    /// stop waits for a sleep, whether the thread is in it or about to be.
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

/// Keeps the threads of all vCPUs from sleeping for their limits, see [`DirtyLog::keep_awake`].
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
    /// Sleeps off what the vCPU is ahead of its [dirty limit](DirtyLog::set_dirty_limit), and
    /// returns how long that took: zero, after a lock and a look, where there is nothing to sleep
    /// for.
    ///
    /// Call it on the vCPU's thread whenever `KVM_RUN` was interrupted (`EINTR`), and, if you like,
    /// after every other exit. It returns early when the limit is lifted, and at once while
    /// somebody [keeps the vCPUs awake](DirtyLog::keep_awake).
    pub fn throttle(&mut self) -> Duration {
        self.vcpu.pay()
    }
}
