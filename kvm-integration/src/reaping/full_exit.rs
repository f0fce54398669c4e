// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a full exit is served: the crate's way, its own ring, or QEMU's, all rings under one lock.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::{ResetError, SyncError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, VcpuRing};

use super::Shape;
use crate::page_set::PageSet;

/// How full exits are served just now, and what is counted of those that QEMU would serve.
///
/// Relaxed throughout: each is a number by itself, and shapes change while nobody counts.
#[derive(Debug)]
pub(crate) struct FullExits {
    log: DirtyLog,
    /// As QEMU does: all rings, under the lock.
    all_rings: AtomicBool,
    /// QEMU's global lock, and the bitmap that it guards, if one is kept.
    lock: Mutex<Option<Bitmap>>,
    count: AtomicU64,
    stall_ns: AtomicU64,
}

/// What was found since somebody asked.
#[derive(Debug)]
struct Bitmap {
    found: DirtyPages,
    pages: PageSet,
}

impl FullExits {
    pub(crate) fn new(log: &DirtyLog) -> Self {
        Self {
            log: log.clone(),
            all_rings: AtomicBool::new(false),
            lock: Mutex::default(),
            count: AtomicU64::new(0),
            stall_ns: AtomicU64::new(0),
        }
    }

    pub(crate) fn log(&self) -> &DirtyLog {
        &self.log
    }

    pub(super) fn set_shape(&self, shape: Shape) {
        let all_rings = shape == Shape::AllRings;
        self.all_rings.store(all_rings, Ordering::Relaxed);
    }

    /// Keeps a bitmap, empty as `pages` is, into which each full exit syncs; or none any more.
    pub(crate) fn keep_bitmap(&self, pages: Option<PageSet>) {
        *self.lock() = pages.map(|pages| Bitmap {
            found: DirtyPages::new(),
            pages,
        });
    }

    /// On the vCPU's thread.
    pub(crate) fn serve(&self, ring: &mut VcpuRing) -> Result<(), Box<dyn Error + Send + Sync>> {
        if !self.all_rings.load(Ordering::Relaxed) {
            return Ok(ring.on_full()?);
        }
        let start = Instant::now();
        let result: Result<(), SyncError> = match &mut *self.lock() {
            Some(bitmap) => bitmap.sync(&self.log),
            None => self.log.reap().map(drop).map_err(SyncError::from),
        };
        self.count.fetch_add(1, Ordering::Relaxed);
        let stall = start.elapsed().as_nanos() as u64;
        self.stall_ns.fetch_add(stall, Ordering::Relaxed);
        Ok(result?)
    }

    /// Empties all rings as QEMU does: one thread at a time.
    pub(super) fn reap_all(&self) -> Result<u64, ResetError> {
        let _one_at_a_time = self.lock();
        self.log.reap()
    }

    /// Adds what was written since the call before to `dirty`, if a bitmap is kept.
    pub(crate) fn sync(&self, dirty: &mut PageSet) -> Result<(), SyncError> {
        if let Some(bitmap) = &mut *self.lock() {
            bitmap.sync(&self.log)?;
            dirty.take(&mut bitmap.pages);
        }
        Ok(())
    }

    /// Full exits so far, served either way, and the time that vCPUs spent on them.
    pub(crate) fn counts(&self) -> (u64, Duration) {
        let stats = self.log.stats();
        let own: u64 = stats.vcpus.iter().map(|vcpu| vcpu.stall_ns).sum();
        let count = stats.full_exits() + self.count.load(Ordering::Relaxed);
        let stall = own + self.stall_ns.load(Ordering::Relaxed);
        (count, Duration::from_nanos(stall))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Bitmap>> {
        // A sync that panics has put what it found nowhere; the log still has it.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bitmap {
    fn sync(&mut self, log: &DirtyLog) -> Result<(), SyncError> {
        log.sync(&mut self.found)?;
        self.pages.add(&self.found);
        Ok(())
    }
}
