// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that writes its memory all the time, ready to be migrated: on KVM, or on the simulated
//! kernel.

#[cfg(tiny_guest)]
mod kvm;
pub mod rate;
mod sim;
#[cfg(tiny_guest)]
pub(crate) mod vcpus;
mod writes;

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use kvm_dirty_ring::{DirtyLog, RingEntries, SlotId};

use crate::guest::memory::GuestMemory;
use crate::guest::workload::{Region, Workload};

#[cfg(tiny_guest)]
pub use kvm::{KvmMachine, Logging};
use rate::{Dormitory, Throttle};
pub use sim::SimMachine;
pub use writes::Writes;

/// Where the two slots begin: below a hole, and far above it, as on a PC.
const SLOT_GPAS: [u64; 2] = [1 << 30, 256 << 30];
/// The most pages that the slots have room for: 256 GiB.
pub const MAX_PAGES: u64 = 1 << 26;
/// Entries of all vCPUs' lists together: 128 MiB of them.
const MAX_LIST_ENTRIES: usize = 1 << 24;

/// A guest whose vCPUs run from its making until it is paused or dropped.
pub trait Guest {
    /// Its memory, slot by slot.
    fn slots(&self) -> &[GuestSlot];

    /// Page stores of all vCPUs so far.
    fn stores(&self) -> u64;

    /// Looks whether every vCPU is still up.
    fn check(&mut self) -> Result<()>;

    /// Takes every vCPU out of the guest, and waits until all are.
    fn pause(&mut self) -> Result<()>;

    /// Lets paused vCPUs run again.
    fn resume(&mut self);

    /// Protects all pages of a slot anew, those too that KVM takes for protected. The vCPUs are paused.
    fn protect(&mut self, slot: SlotId) -> Result<()>;

    /// The time. A simulated guest may have a clock of its own.
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Lets time go by until then; the guest runs meanwhile, unless it is paused.
    fn wait_until(&mut self, until: Instant) {
        thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}

/// A guest with a dirty log.
pub trait Machine: Guest {
    /// The log of everything its vCPUs write.
    fn log(&self) -> &DirtyLog;

    /// What makes its vCPUs, by their index, look after their dirty limits.
    fn kick(&self) -> Kick;
}

/// For a [`Limiter`](kvm_dirty_ring::Limiter).
pub type Kick = Box<dyn FnMut(usize) + Send>;

/// A logged slot and what is behind it.
#[derive(Debug, Clone)]
pub struct GuestSlot {
    /// What KVM calls it.
    pub id: SlotId,
    /// Where the guest sees it.
    pub region: Region,
    /// Its pages.
    pub memory: Arc<GuestMemory>,
}

impl GuestSlot {
    pub(crate) fn new(id: SlotId, region: Region) -> Result<Self> {
        let memory = GuestMemory::new(region.pages);
        let memory = Arc::new(memory.context("no memory for the guest: make it smaller")?);
        Ok(Self { id, region, memory })
    }
}

/// The two slots of a guest of so many pages. They differ in size, so that mistaking one for the other cannot go unnoticed.
pub(crate) fn regions(pages: u64) -> [(SlotId, Region); 2] {
    let lower = pages / 4;
    let sizes = [lower, pages - lower];
    // Slot 0 is the tiny guest's own.
    [0, 1].map(|n| {
        let region = Region {
            gpa: SLOT_GPAS[n],
            pages: sizes[n],
        };
        (SlotId::new(0, n as u16 + 1), region)
    })
}

fn unattached(index: u32) -> String {
    format!("the ring of vCPU {index} could not be attached")
}

/// What kind of guest to make.
#[derive(Debug, Clone)]
pub struct Setup {
    /// How many vCPUs, from 1 to [`MAX_VCPUS`](crate::guest::stamp::MAX_VCPUS).
    pub vcpus: u32,
    /// The size of each ring.
    pub ring_entries: RingEntries,
    /// Logged memory, in pages: from 4 to [`MAX_PAGES`]. A quarter of it is the lower slot.
    pub pages: u64,
    /// Which pages are written, in what order.
    pub workload: Workload,
    /// What the order comes from.
    pub seed: u64,
    /// Page stores per second of all vCPUs together; 0: as many as they can.
    pub write_rate: u64,
}

impl Setup {
    /// The two slots.
    pub fn regions(&self) -> [(SlotId, Region); 2] {
        regions(self.pages)
    }

    /// Stores between two looks at the throttle; 0: never.
    pub fn chunk(&self) -> u32 {
        writes::chunk(self.stores_per_second())
    }

    /// What each vCPU writes.
    #[cfg(tiny_guest)]
    fn writes(&self) -> Vec<Writes> {
        let writes = |vcpu| Writes {
            list: self.list(vcpu),
            per_second: self.stores_per_second(),
        };
        (0..self.vcpus).map(writes).collect()
    }

    /// How many entries each vCPU's list has: every page is in one of them, unless the guest is so
    /// large that lists would be too.
    fn list_length(&self) -> usize {
        let chunk = self.chunk();
        let covering = self.workload.covering_length(self.pages, self.vcpus, chunk);
        // As long as that, random lists would have no page in common.
        let times = 1 + usize::from(self.workload == Workload::Random);
        let granule = chunk.max(1) as usize;
        let most = (MAX_LIST_ENTRIES / self.vcpus as usize).max(granule);
        (covering * times).min(most - most % granule)
    }

    fn list(&self, vcpu: u32) -> Vec<u64> {
        let regions = self.regions().map(|(_, region)| region);
        self.workload
            .addresses(self.seed, vcpu, self.vcpus, &regions, self.list_length())
    }

    fn throttle(&self, dormitory: &Arc<Dormitory>) -> Throttle {
        Throttle::new(self.stores_per_second(), dormitory)
    }

    /// Of one vCPU.
    fn stores_per_second(&self) -> f64 {
        self.write_rate as f64 / f64::from(self.vcpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> Setup {
        Setup {
            vcpus: 3,
            ring_entries: RingEntries::new(4096).unwrap(),
            pages: 1000,
            workload: Workload::Random,
            seed: 1,
            write_rate: 0,
        }
    }

    #[test]
    fn slots_have_all_pages_and_do_not_meet() {
        for pages in [4, 1000, 1001, MAX_PAGES] {
            let [(_, low), (_, high)] = Setup { pages, ..setup() }.regions();
            assert_eq!(low.pages + high.pages, pages);
            assert!(low.pages > 0);
            assert!(low.gpa + low.pages * 4096 <= high.gpa);
            assert!(high.gpa + high.pages * 4096 <= 512 << 30);
        }
    }

    #[test]
    fn lists_are_whole_chunks_of_bounded_length() {
        for write_rate in [0, 1, 299, 30_000, 1_000_000_000] {
            for pages in [4, 1001, MAX_PAGES] {
                for workload in Workload::ALL {
                    let setup = Setup {
                        pages,
                        workload,
                        write_rate,
                        ..setup()
                    };
                    let length = setup.list_length();
                    assert!(length > 0 && length <= MAX_LIST_ENTRIES / 3);
                    assert_eq!(length % setup.chunk().max(1) as usize, 0);
                    assert!(setup.chunk() > 0 || write_rate == 0);
                }
            }
        }
    }
}
