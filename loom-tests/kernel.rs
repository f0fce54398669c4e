//! The kernel and the guest as the models see them.

use std::io;

use crate::kernel::Kernel;
use crate::log::DirtyLog;
use crate::ring::producer::Producer;
use crate::slot_id::SlotId;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// Entries of a model's ring; a vCPU stops two before the end.
pub(super) const ENTRIES: u32 = 4;
pub(super) const SOFT_LIMIT: u32 = 2;

/// The slot whose pages the guest writes.
pub(super) const SLOT: SlotId = SlotId::new(0, 0);

/// What a reset does wrong.
#[derive(Clone, Copy)]
pub(super) enum Fault {
    /// Fails, and does nothing.
    Error,
    /// Recycles one entry, does not arm its page, and stops.
    Short,
}

/// A machine of one slot.
pub(super) struct Machine {
    rings: Vec<Producer>,
    pages: Vec<Page>,
    /// Held through a reset, as KVM's `slots_lock` is.
    resets: Mutex<Vec<Fault>>,
}

struct Page {
    /// Whether the next write is logged. The lock makes "armed? then log, then write" one step
    /// towards re-arming, as the processor's fault and the TLB flush make it.
    armed: Mutex<bool>,
    /// What the guest wrote. Relaxed, so that only the crate's own orderings make a copy current.
    content: AtomicU64,
}

impl Machine {
    pub(super) fn new(vcpus: usize, pages: usize) -> Arc<Self> {
        Self::with_faults(vcpus, pages, Vec::new())
    }

    /// A machine whose first resets go wrong, the last of `faults` first.
    pub(super) fn with_faults(vcpus: usize, pages: usize, faults: Vec<Fault>) -> Arc<Self> {
        let page = || Page {
            armed: Mutex::new(true),
            content: AtomicU64::new(0),
        };
        Arc::new(Self {
            rings: (0..vcpus).map(|_| Producer::new(ENTRIES, 0)).collect(),
            pages: (0..pages).map(|_| page()).collect(),
            resets: Mutex::new(faults),
        })
    }

    /// A log of `shards` shards over this machine, its slot added. Rings are attached by the
    /// caller, in order.
    pub(super) fn log(self: &Arc<Self>, shards: usize) -> DirtyLog {
        let kernel = Box::new(Ioctl(Arc::clone(self)));
        let log = DirtyLog::new(kernel, ENTRIES, shards, false);
        log.add_slot(SLOT, self.pages.len() as u64).unwrap();
        log
    }

    /// The ring of vCPU `vcpu`.
    pub(super) fn ring(&self, vcpu: usize) -> &Producer {
        &self.rings[vcpu]
    }

    /// The guest writes; false, and nothing happens, if the vCPU's ring is full.
    pub(super) fn write(&self, vcpu: usize, page: usize, value: u64) -> bool {
        if self.rings[vcpu].used() >= SOFT_LIMIT {
            return false;
        }
        let mut armed = lock(&self.pages[page].armed);
        if core::mem::replace(&mut *armed, false) {
            self.rings[vcpu].push(SLOT.raw(), page as u64);
        }
        self.pages[page].content.store(value, Ordering::Relaxed);
        true
    }

    /// A device writes: no vCPU logs it.
    pub(super) fn device_write(&self, page: usize, value: u64) {
        self.pages[page].content.store(value, Ordering::Relaxed);
    }

    /// Copies a page.
    pub(super) fn read(&self, page: usize) -> u64 {
        self.pages[page].content.load(Ordering::Relaxed)
    }

    fn reset(&self) -> io::Result<u32> {
        let mut faults = lock(&self.resets);
        let limit = match faults.pop() {
            Some(Fault::Error) => return Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            Some(Fault::Short) => 1,
            None => u32::MAX,
        };
        let mut named = Vec::new();
        let mut recycled = 0;
        for ring in &self.rings {
            recycled += ring.recycle(limit - recycled, |_, page| named.push(page as usize));
        }
        // Entries are free before their pages are armed: only the return says that they are.
        if limit == u32::MAX || !self.rings.iter().any(Producer::awaits_reset) {
            for page in named {
                *lock(&self.pages[page].armed) = true;
            }
        }
        Ok(recycled)
    }
}

/// The machine behind its ioctl.
struct Ioctl(Arc<Machine>);

impl Kernel for Ioctl {
    fn reset(&self) -> io::Result<u32> {
        self.0.reset()
    }
}

/// A migration's destination.
pub(super) struct Copy(Vec<u64>);

impl Copy {
    pub(super) fn new(machine: &Machine) -> Self {
        Self(vec![0; machine.pages.len()])
    }

    /// One round: sync, then copy what it reports.
    pub(super) fn round(&mut self, machine: &Machine, log: &DirtyLog) {
        let mut dirty = crate::DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        self.take(machine, &dirty);
    }

    /// Copies the pages in `dirty`.
    pub(super) fn take(&mut self, machine: &Machine, dirty: &crate::DirtyPages) {
        for run in dirty.runs() {
            for page in run.first_page..run.first_page + run.pages {
                self.0[page as usize] = machine.read(page as usize);
            }
        }
    }

    /// Fails the model unless the copy equals the original.
    pub(super) fn verify(&self, machine: &Machine) {
        for (page, &copy) in self.0.iter().enumerate() {
            assert_eq!(copy, machine.read(page), "page {page} was lost");
        }
    }
}
