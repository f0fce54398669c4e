// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The simulated guest of the examples: all that KVM and the guest's own code do under a real VMM.
//!
//! Nothing here is for copying. Each function names the system call that a VMM makes in its place.

#![allow(dead_code, reason = "no example uses all of it")]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, GuestMap, GuestRegion, Run, SlotId};

/// Bytes of a page. A VMM asks `sysconf(_SC_PAGESIZE)`.
pub fn page_size() -> usize {
    let slot = SlotId::new(0, 0);
    let page = Run {
        slot,
        first_page: 0,
        pages: 1,
    };
    let range = one_slot(slot, 1).range(page).expect("it has one page");
    (range.end - range.start) as usize
}

fn words() -> usize {
    page_size() / 8
}

fn one_slot(slot: SlotId, pages: u64) -> GuestMap {
    let region = GuestRegion {
        slot,
        address: 0,
        pages,
    };
    GuestMap::new([region]).expect("a slot has 1 page to 2^31 - 1")
}

/// Where slots are: their ids, the guest's number of their first page, and how many pages they have.
pub fn map(slots: impl IntoIterator<Item = (u16, u64, u64)>) -> GuestMap {
    let regions = slots
        .into_iter()
        .map(|(id, first_page, pages)| GuestRegion {
            slot: SlotId::new(0, id),
            address: first_page * page_size() as u64,
            pages,
        });
    GuestMap::new(regions).expect("no two have a page in common")
}

/// A virtual machine.
pub struct Guest {
    vm: SimVm,
    map: GuestMap,
    memory: Arc<Memory>,
    kicked: Arc<AtomicBool>,
}

impl Guest {
    /// `KVM_CREATE_VM`, and an `mmap` of the guest's memory, which is one slot from address 0 on.
    pub fn new(ring_entries: u32, ram: SlotId, pages: u64) -> Self {
        Self::with_map(ring_entries, &one_slot(ram, pages))
    }

    /// The same with memory in these slots. Holes between them are not mapped.
    pub fn with_map(ring_entries: u32, map: &GuestMap) -> Self {
        let mut config = SimConfig::default();
        config.ring_entries = ring_entries;
        Self {
            vm: SimVm::new(config),
            map: map.clone(),
            memory: Arc::new(Memory::of(map)),
            kicked: Arc::default(),
        }
    }

    /// `DirtyLog::enable(&vm_fd, RingEntries::new(entries)?)`.
    pub fn dirty_log(&self) -> DirtyLog {
        self.vm.dirty_log()
    }

    /// `KVM_SET_USER_MEMORY_REGION` with `KVM_MEM_LOG_DIRTY_PAGES`, for each slot.
    pub fn create_slots(&self) {
        for region in self.map.regions() {
            self.vm.create_slot(region.slot, region.pages);
        }
    }

    /// `KVM_SET_USER_MEMORY_REGION` of no size.
    pub fn delete_slot(&self, slot: SlotId) {
        self.vm.delete_slot(slot);
    }

    /// `KVM_CREATE_VCPU`.
    pub fn create_vcpu(&self, load: Load) -> Vcpu {
        Vcpu {
            vcpu: self.vm.add_vcpu(),
            map: self.map.clone(),
            memory: Arc::clone(&self.memory),
            kicked: Arc::clone(&self.kicked),
            load,
            writes: 0,
        }
    }

    /// The guest's memory as the VMM has it mapped.
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// What makes every vCPU leave `KVM_RUN`: a signal to its thread, with `immediate_exit` set.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::Relaxed);
    }

    /// Clears `immediate_exit`: vCPUs may run again.
    pub fn resume(&self) {
        self.kicked.store(false, Ordering::Relaxed);
    }
}

/// What the guest's code does on one vCPU: writes to pages at random, `burst` writes between rests.
#[derive(Clone)]
pub struct Load {
    pub first_page: u64,
    pub pages: u64,
    pub burst: u64,
    pub rest: Duration,
}

impl Load {
    /// A moderate one.
    pub fn new(first_page: u64, pages: u64) -> Self {
        Self {
            first_page,
            pages,
            burst: 20,
            rest: Duration::from_millis(2),
        }
    }
}

/// Why a vCPU has left the guest: `exit_reason` of `struct kvm_run`.
pub enum Exit {
    /// `KVM_EXIT_DIRTY_RING_FULL`.
    DirtyRingFull,
    /// `KVM_RUN` was interrupted (`EINTR`).
    Kicked,
}

/// A vCPU.
pub struct Vcpu {
    /// For `log.attach_ring(vcpu.vcpu.ring_memory())`: a VMM has `log.attach_vcpu(&vcpu_fd)`.
    pub vcpu: SimVcpu,
    map: GuestMap,
    memory: Arc<Memory>,
    kicked: Arc<AtomicBool>,
    load: Load,
    /// Writes of the guest so far.
    pub writes: u64,
}

impl Vcpu {
    /// `KVM_RUN`.
    pub fn run(&mut self) -> Exit {
        while !self.kicked.load(Ordering::Relaxed) {
            // Any odd factor visits all of 2^64 in a disorderly manner.
            let random = (self.writes + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            let page = self.load.first_page + random % self.load.pages;
            let store = || self.memory.write(page, self.writes);
            let place = self.map.locate(page * page_size() as u64);
            let (slot, slot_page) = place.expect("the guest has the page");
            match self.vcpu.write_with(slot, slot_page, store) {
                Ok(()) => self.writes += 1,
                Err(WriteError::RingFull) => return Exit::DirtyRingFull,
                Err(error) => panic!("{error}"),
            }
            if self.writes % self.load.burst == 0 {
                thread::sleep(self.load.rest);
            }
        }
        self.vcpu.exit();
        Exit::Kicked
    }
}

/// Guest memory, page by page as the guest numbers them. It may be read while others write it: what is read then may be torn.
pub struct Memory {
    /// What lies between two holes, with its address, in ascending order.
    blocks: Vec<(u64, Box<[AtomicU64]>)>,
}

impl Memory {
    /// As much memory as the guest has, all zeroes.
    pub fn of(map: &GuestMap) -> Self {
        let mut blocks: Vec<Range<u64>> = Vec::new();
        for region in map.regions() {
            let end = region.address + region.pages * page_size() as u64;
            match blocks.last_mut().filter(|last| last.end == region.address) {
                Some(last) => last.end = end,
                None => blocks.push(region.address..end),
            }
        }
        let zeroes = |block: Range<u64>| {
            let words = (block.end - block.start) / 8;
            (block.start, (0..words).map(|_| AtomicU64::new(0)).collect())
        };
        Self {
            blocks: blocks.into_iter().map(zeroes).collect(),
        }
    }

    /// The guest's number of its last page, and one.
    pub fn pages(&self) -> u64 {
        let last = self.blocks.last();
        last.map_or(0, |(address, words)| {
            (address / 8 + words.len() as u64) / self::words() as u64
        })
    }

    /// The words from this guest address up to the next hole.
    fn from(&self, address: u64) -> &[AtomicU64] {
        let blocks = self.blocks.iter().rev();
        let mut blocks = blocks.skip_while(|(start, _)| *start > address);
        let (start, words) = blocks.next().expect("the guest has memory there");
        &words[((address - start) / 8) as usize..]
    }

    fn page(&self, page: u64) -> &[AtomicU64] {
        &self.from(page * page_size() as u64)[..words()]
    }

    /// Writes a number into a page, at the begin and somewhere else.
    pub fn write(&self, page: u64, number: u64) {
        let page = self.page(page);
        page[0].store(number, Ordering::Relaxed);
        page[number as usize % words()].store(number, Ordering::Relaxed);
    }

    /// Gives a page back to the host, which reads as zeroes from then on: `madvise(MADV_DONTNEED)`.
    pub fn discard(&self, page: u64) {
        let words = self.page(page).iter();
        words.for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// The bytes of `pages` pages.
    pub fn read(&self, first_page: u64, pages: u64) -> Vec<u8> {
        let address = |page| page * page_size() as u64;
        self.bytes(&(address(first_page)..address(first_page + pages)))
    }

    /// The bytes at these guest addresses, which are multiples of 8.
    pub fn bytes(&self, range: &Range<u64>) -> Vec<u8> {
        let words = &self.from(range.start)[..((range.end - range.start) / 8) as usize];
        let mut bytes = Vec::with_capacity(words.len() * 8);
        for word in words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes
    }

    /// Puts bytes at a guest address: where a migration or a snapshot arrives.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        for (word, bytes) in self.from(address).iter().zip(bytes.chunks_exact(8)) {
            let number = bytes.try_into().expect("a word has 8 bytes");
            word.store(u64::from_ne_bytes(number), Ordering::Relaxed);
        }
    }

    /// Whether all memory of the guest is the same here and there.
    pub fn equals(&self, other: &Self, map: &GuestMap) -> bool {
        map.regions().iter().all(|region| {
            let range = region.address..region.address + region.pages * page_size() as u64;
            self.bytes(&range) == other.bytes(&range)
        })
    }
}

/// One of several ways to the destination, for a thread of its own. A message costs time beside that of its pages.
#[derive(Clone)]
pub struct Connection {
    destination: Arc<Memory>,
    pages_per_ms: u64,
    message: Duration,
}

impl Connection {
    /// One of 20 MB/s, or less where messages are short.
    pub fn new(destination: &Arc<Memory>) -> Self {
        Self {
            destination: Arc::clone(destination),
            pages_per_ms: 5,
            message: Duration::from_micros(200),
        }
    }

    /// Sends what is at these guest addresses.
    pub fn send(&self, memory: &Memory, range: &Range<u64>) {
        let start = Instant::now();
        self.destination.put(range.start, &memory.bytes(range));
        let pages = (range.end - range.start) / page_size() as u64;
        let takes = self.message + Duration::from_micros(pages * 1000 / self.pages_per_ms);
        thread::sleep(takes.saturating_sub(start.elapsed()));
    }
}

/// The way to the destination of a migration, and the memory there.
pub struct Link {
    pub destination: Vec<u8>,
    pages_per_ms: u64,
}

impl Link {
    /// To a destination of so many pages.
    pub fn new(pages: u64, pages_per_ms: u64) -> Self {
        Self {
            destination: vec![0; pages as usize * page_size()],
            pages_per_ms,
        }
    }

    /// Sends pages at the link's speed. How long it took.
    pub fn send(&mut self, memory: &Memory, runs: impl IntoIterator<Item = Run>) -> Duration {
        let start = Instant::now();
        let mut sent = 0;
        for run in runs {
            let bytes = memory.read(run.first_page, run.pages);
            self.destination[run.first_page as usize * page_size()..][..bytes.len()]
                .copy_from_slice(&bytes);
            sent += run.pages;
        }
        let takes = Duration::from_micros(sent * 1000 / self.pages_per_ms);
        thread::sleep(takes.saturating_sub(start.elapsed()));
        start.elapsed()
    }
}
