//! The simulated guest of the examples: all that KVM and the guest's own code do under a real VMM.
//!
//! Nothing here is for copying. Each function names the system call that a VMM makes in its place.

#![allow(dead_code, reason = "no example uses all of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, Run, SlotId};

/// Bytes of a page. A VMM asks `sysconf(_SC_PAGESIZE)`.
pub const PAGE: usize = 4096;

const WORDS: usize = PAGE / 8;

/// A virtual machine with one slot of memory.
pub struct Guest {
    vm: SimVm,
    ram: SlotId,
    memory: Arc<Memory>,
    kicked: Arc<AtomicBool>,
}

impl Guest {
    /// `KVM_CREATE_VM`, and an `mmap` of the guest's memory.
    pub fn new(ring_entries: u32, ram: SlotId, pages: u64) -> Self {
        let mut config = SimConfig::default();
        config.ring_entries = ring_entries;
        Self {
            vm: SimVm::new(config),
            ram,
            memory: Arc::new(Memory::new(pages)),
            kicked: Arc::default(),
        }
    }

    /// `DirtyLog::enable(&vm_fd, RingEntries::new(entries)?)`.
    pub fn dirty_log(&self) -> DirtyLog {
        self.vm.dirty_log()
    }

    /// `KVM_SET_USER_MEMORY_REGION` with `KVM_MEM_LOG_DIRTY_PAGES`.
    pub fn create_slot(&self) {
        self.vm.create_slot(self.ram, self.memory.pages());
    }

    /// Another slot, with memory of its own: `mmap`, and `KVM_SET_USER_MEMORY_REGION` as above. No vCPU of these examples
    /// writes there.
    pub fn add_memory(&self, slot: SlotId, pages: u64) -> Arc<Memory> {
        self.vm.create_slot(slot, pages);
        Arc::new(Memory::new(pages))
    }

    /// `KVM_CREATE_VCPU`.
    pub fn create_vcpu(&self, load: Load) -> Vcpu {
        Vcpu {
            vcpu: self.vm.add_vcpu(),
            ram: self.ram,
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
}

/// What the guest's code does on one vCPU: writes to pages at random, `burst` writes between rests.
#[derive(Clone)]
pub struct Load {
    pub first_page: u64,
    pub pages: u64,
    pub burst: u64,
    pub rest: Duration,
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
    ram: SlotId,
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
            match self.vcpu.write_with(self.ram, page, store) {
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

/// Memory that may be read while others write it: what is read then may be torn.
pub struct Memory {
    words: Box<[AtomicU64]>,
}

impl Memory {
    fn new(pages: u64) -> Self {
        let words = 0..pages as usize * WORDS;
        Self {
            words: words.map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        (self.words.len() / WORDS) as u64
    }

    /// Writes a number into a page, at the begin and somewhere else.
    pub fn write(&self, page: u64, number: u64) {
        let page = &self.words[page as usize * WORDS..][..WORDS];
        page[0].store(number, Ordering::Relaxed);
        page[number as usize % WORDS].store(number, Ordering::Relaxed);
    }

    /// Gives a page back to the host, which reads as zeroes from then on: `madvise(MADV_DONTNEED)`.
    pub fn discard(&self, page: u64) {
        let page = &self.words[page as usize * WORDS..][..WORDS];
        page.iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// The bytes of `pages` pages.
    pub fn read(&self, first_page: u64, pages: u64) -> Vec<u8> {
        let words = &self.words[first_page as usize * WORDS..][..pages as usize * WORDS];
        let mut bytes = Vec::with_capacity(words.len() * 8);
        for word in words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes
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
            destination: vec![0; pages as usize * PAGE],
            pages_per_ms,
        }
    }

    /// Sends pages at the link's speed. How long it took.
    pub fn send(&mut self, memory: &Memory, runs: impl IntoIterator<Item = Run>) -> Duration {
        let start = Instant::now();
        let mut sent = 0;
        for run in runs {
            let bytes = memory.read(run.first_page, run.pages);
            self.destination[run.first_page as usize * PAGE..][..bytes.len()]
                .copy_from_slice(&bytes);
            sent += run.pages;
        }
        let takes = Duration::from_micros(sent * 1000 / self.pages_per_ms);
        thread::sleep(takes.saturating_sub(start.elapsed()));
        start.elapsed()
    }
}
