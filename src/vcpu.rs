//! One vCPU's ring with its consumer token, and what is counted of it.

use crossbeam_utils::CachePadded;

use crate::ring::{RingMemory, RingView};
use crate::sync::{Counter, Mutex};

/// Entries that a kernel with Intel's page-modification logging keeps in reserve: 64, and 512 for
/// the hardware's buffer (`kvm_cpu_dirty_log_size` in the kernel's arch/x86/kvm).
pub(crate) const MOST_RESERVED_ENTRIES: u32 = 64 + 512;

/// One attached vCPU.
pub(crate) struct Vcpu {
    /// What tells its ring from the others.
    pub(crate) name: String,
    /// The lock is the consumer's token. Nobody waits for anything while holding it.
    pub(crate) ring: Mutex<RingView>,
    pub(crate) counts: CachePadded<Counts>,
}

/// Each is written once for a pass or a full exit, never for an entry.
#[derive(Default)]
pub(crate) struct Counts {
    /// Entries harvested.
    pub(crate) taken: Counter,
    /// Exits for a full ring.
    pub(crate) full_exits: Counter,
    /// Nanoseconds spent on them.
    pub(crate) stall_ns: Counter,
    /// Entries at which the vCPU stops: a prior, until a full exit has shown it.
    pub(crate) soft_limit: Counter,
}

impl Vcpu {
    /// A ring that stops its vCPU `reserved` entries before its end, or so we suppose.
    pub(crate) fn new(memory: RingMemory, reserved: u32) -> Self {
        let name = memory.name().to_owned();
        let ring = RingView::new(memory);
        let counts = Counts::default();
        let prior = ring.entries().saturating_sub(reserved).max(1);
        counts.soft_limit.set(prior.into());
        Self {
            name,
            ring: Mutex::new(ring),
            counts: CachePadded::new(counts),
        }
    }

    /// Learns the soft limit from a full exit that found `present` entries, no others outstanding.
    ///
    /// What is below the largest reserve that kernels keep was taken from us by another pass.
    pub(crate) fn learn_soft_limit(&self, present: u32, ring_entries: u32) {
        if present >= ring_entries.saturating_sub(MOST_RESERVED_ENTRIES).max(1) {
            self.counts.soft_limit.set(present.into());
        }
    }
}
