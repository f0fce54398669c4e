//! What a vCPU does when its ring is full.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::ResetError;
use kvm_dirty_ring::{DirtyLog, VcpuRing};

/// How full exits are served just now, and what is counted of those that QEMU would serve.
///
/// Relaxed throughout: each is a number by itself, and arms change while nobody counts.
#[derive(Debug)]
pub(super) struct FullExits {
    log: DirtyLog,
    /// As QEMU does: all rings, under the lock.
    all_rings: AtomicBool,
    lock: Mutex<()>,
    count: AtomicU64,
    stall_ns: AtomicU64,
}

impl FullExits {
    pub(super) fn new(log: &DirtyLog) -> Self {
        Self {
            log: log.clone(),
            all_rings: AtomicBool::new(false),
            lock: Mutex::default(),
            count: AtomicU64::new(0),
            stall_ns: AtomicU64::new(0),
        }
    }

    pub(super) fn set_all_rings(&self, all_rings: bool) {
        self.all_rings.store(all_rings, Ordering::Relaxed);
    }

    /// On the vCPU's thread.
    pub(super) fn serve(&self, ring: &mut VcpuRing) -> Result<(), ResetError> {
        if !self.all_rings.load(Ordering::Relaxed) {
            return ring.on_full();
        }
        let start = Instant::now();
        let result = self.reap_all();
        self.count.fetch_add(1, Ordering::Relaxed);
        let stall = start.elapsed().as_nanos() as u64;
        self.stall_ns.fetch_add(stall, Ordering::Relaxed);
        result.map(drop)
    }

    /// Empties all rings as QEMU does: one thread at a time, whoever it is.
    pub(super) fn reap_all(&self) -> Result<u64, ResetError> {
        let _one_at_a_time: MutexGuard<'_, ()> =
            self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.log.reap()
    }

    /// Full exits so far, served either way, and the time that vCPUs spent on them.
    pub(super) fn counts(&self) -> (u64, Duration) {
        let stats = self.log.stats();
        let own: u64 = stats.vcpus.iter().map(|vcpu| vcpu.stall_ns).sum();
        let count = stats.full_exits() + self.count.load(Ordering::Relaxed);
        let stall = own + self.stall_ns.load(Ordering::Relaxed);
        (count, Duration::from_nanos(stall))
    }
}
