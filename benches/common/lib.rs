// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the benchmarks share: rings that another core fills, patterns of pages, medians.

use kvm_dirty_ring::{DirtyLog, SlotId, VcpuRing};

use ring::{NoKernel, Ring};

pub mod pattern;
pub mod ring;

/// A log of one vCPU, whose ring the benchmark fills.
pub struct Tracked {
    /// The log.
    pub log: DirtyLog,
    /// The vCPU's side of the ring.
    pub vcpu: VcpuRing,
    /// The ring.
    pub ring: Ring,
    /// Where the next entry is pushed.
    pub index: usize,
}

impl Tracked {
    /// A ring of `entries` over `slots` slots of `pages` pages each.
    pub fn new(entries: u32, slots: u32, pages: u64) -> Self {
        let log = DirtyLog::with_kernel(Box::new(NoKernel), entries);
        for slot in 0..slots {
            log.add_slot(SlotId::from_raw(slot), pages).expect("a slot");
        }
        let ring = Ring::new(entries);
        let vcpu = log.attach_ring(ring.memory()).expect("a ring");
        Self {
            log,
            vcpu,
            ring,
            index: 0,
        }
    }

    /// Pushes and harvests `pages` of slot 0, half a ring at a time.
    pub fn dirty(&mut self, pages: &[u64]) {
        for pages in pages.chunks(self.ring.entries().len() / 2) {
            let pages: Vec<_> = pages.iter().map(|&page| (0, page)).collect();
            self.index = self.ring.push(self.index, &pages);
            self.vcpu.harvest_and_stop();
        }
    }
}

/// The median; the values are put in order.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Keeps the calling thread on CPU `cpu`, if there is one of that number.
pub fn pin(cpu: usize) {
    // SAFETY: cpu_set_t is an array of integers, for which zeroes are a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET only writes the set; the modulus keeps `cpu` inside it.
    unsafe { libc::CPU_SET(cpu % libc::CPU_SETSIZE as usize, &mut set) };
    // SAFETY: 0 is the calling thread; the set is valid for the call. A failure leaves the thread
    // unpinned, which costs precision alone.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}
