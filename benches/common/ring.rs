// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings, and a thread on another core that fills them as a vCPU would.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use kvm_dirty_ring::ring::{Entry, RingMemory};
use kvm_dirty_ring::{Kernel, Recycled};
use memmap2::{MmapOptions, MmapRaw};

use crate::pin;

/// Flag of an entry that names a written page.
pub const DIRTY: u32 = 1;
/// Flag of an entry that was harvested.
pub const RESET: u32 = 2;

/// One entry, laid out as the kernel's.
#[repr(C)]
pub struct Gfn {
    /// Its state.
    pub flags: AtomicU32,
    /// Its slot.
    pub slot: AtomicU32,
    /// Its page.
    pub offset: AtomicU64,
}

/// A ring that the benchmark fills; on a page's begin, as mapped rings are.
#[derive(Clone)]
pub struct Ring {
    map: Arc<MmapRaw>,
    entries: u32,
}

impl Ring {
    /// A ring of `entries` entries, all free.
    pub fn new(entries: u32) -> Self {
        let bytes = entries as usize * size_of::<Gfn>();
        let map = MmapOptions::new().len(bytes).map_anon().expect("memory");
        Self {
            map: Arc::new(map.into()),
            entries,
        }
    }

    /// The same memory for the crate.
    pub fn memory(&self) -> RingMemory {
        let start = NonNull::new(self.map.as_mut_ptr().cast::<Entry>()).expect("a mapping");
        // SAFETY: the mapping is that long and lives as long as its owner; here it is accessed
        // through atomics of the same sizes only.
        unsafe { RingMemory::new(start, self.entries, Box::new(Arc::clone(&self.map))) }
    }

    /// The entries.
    pub fn entries(&self) -> &[Gfn] {
        let start = self.map.as_ptr().cast::<Gfn>();
        // SAFETY: the mapping is `entries` Gfns long, any bytes are one, and all access is atomic.
        unsafe { std::slice::from_raw_parts(start, self.entries as usize) }
    }

    /// Recycles what was harvested, pushes `pages` from entry `index` on, and returns the index behind them.
    pub fn push(&self, mut index: usize, pages: &[(u32, u64)]) -> usize {
        let entries = self.entries();
        for entry in entries {
            // Relaxed: nobody else is at the ring meanwhile. Release: as the kernel's reset.
            if entry.flags.load(Ordering::Relaxed) & RESET != 0 {
                entry.flags.store(0, Ordering::Release);
            }
        }
        for &(slot, page) in pages {
            let entry = &entries[index % entries.len()];
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(page, Ordering::Relaxed);
            // Release: as the kernel's push.
            entry.flags.store(DIRTY, Ordering::Release);
            index += 1;
        }
        index
    }
}

/// A kernel that has nothing to protect: resets cost nothing here.
pub struct NoKernel;

impl Kernel for NoKernel {
    fn reset(&self) -> io::Result<Recycled> {
        Ok(u32::MAX.into())
    }
}

/// What the other core is to push next, and where.
type Job = (Ring, usize, Arc<[(u32, u64)]>);

/// A thread on a core of its own that fills rings, so that their lines are in its cache.
pub struct Filler {
    jobs: Option<SyncSender<Job>>,
    done: Receiver<usize>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    /// Starts the thread on CPU `cpu`.
    pub fn on(cpu: usize) -> Self {
        let (jobs, next) = mpsc::sync_channel::<Job>(1);
        let (report, done) = mpsc::sync_channel(1);
        let thread = thread::spawn(move || {
            pin(cpu);
            for (ring, index, pages) in next {
                if report.send(ring.push(index, &pages)).is_err() {
                    return;
                }
            }
        });
        Self {
            jobs: Some(jobs),
            done,
            thread: Some(thread),
        }
    }

    /// Has `pages` pushed from `index` on; returns the index behind them, once they are there.
    pub fn fill(&self, ring: &Ring, index: usize, pages: &Arc<[(u32, u64)]>) -> usize {
        let jobs = self.jobs.as_ref().expect("a running thread");
        let job = (ring.clone(), index, Arc::clone(pages));
        jobs.send(job).expect("a running thread");
        self.done.recv().expect("a running thread")
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the filler does not panic");
        }
    }
}
