// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Overruns that meet a reset at one entry: the kernel recycles it while the vCPU fills it.
//!
//! The simulated vCPU pushes an entry whole, as a kernel does whose vCPU is not stopped half-way. This one
//! can be stopped between the payload and the flags, and run inside a reset.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, iter};

use kvm_dirty_ring::ring::{Entry, RingMemory};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Kernel, Recycled, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 300;
const ENTRIES: u32 = 64;
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`.
#[repr(C)]
#[derive(Default)]
struct Gfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// What happens inside the next reset, once the first payload is read and before its entry is freed.
type Meanwhile = Box<dyn FnOnce(&Torn) + Send>;

/// A kernel with one slot and two vCPUs, of which one never writes.
struct Torn {
    ring: Box<[Gfn]>,
    idle: Box<[Gfn]>,
    pushed: AtomicU32,
    recycled: AtomicU32,
    protected: Mutex<BTreeSet<u64>>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl Torn {
    fn entry(&self, index: u32) -> &Gfn {
        &self.ring[(index % ENTRIES) as usize]
    }

    /// The first half of a write: the page is no longer protected, the entry has its payload. False if the
    /// page is not to be logged.
    fn begin_write(&self, page: u64) -> bool {
        let mut protected = self.protected.lock().unwrap();
        let entry = self.entry(self.pushed.load(SeqCst));
        let is_logged = protected.remove(&page);
        if is_logged {
            entry.slot.store(RAM.raw(), SeqCst);
            entry.offset.store(page, SeqCst);
        }
        is_logged
    }

    fn end_write(&self) {
        let entry = self.entry(self.pushed.fetch_add(1, SeqCst));
        entry.flags.store(DIRTY, SeqCst);
    }

    /// Never stopped by a full ring, as the emulator of kvm_pvm.
    fn write(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            if self.begin_write(page) {
                self.end_write();
            }
        }
    }
}

struct Handle(Arc<Torn>);

impl Kernel for Handle {
    fn reset(&self) -> io::Result<Recycled> {
        let Self(kernel) = self;
        let mut pages = Vec::new();
        loop {
            let entry = kernel.entry(kernel.recycled.load(SeqCst));
            if entry.flags.load(SeqCst) & RESET == 0 {
                break;
            }
            pages.push(entry.offset.load(SeqCst));
            let meanwhile = kernel.meanwhile.lock();
            let meanwhile = meanwhile.unwrap_or_else(PoisonError::into_inner).take();
            if let Some(meanwhile) = meanwhile {
                meanwhile(kernel);
            }
            entry.flags.store(0, SeqCst);
            kernel.recycled.fetch_add(1, SeqCst);
        }
        let entries = pages.len() as u32;
        kernel.protected.lock().unwrap().extend(pages);
        Ok(entries.into())
    }
}

struct Machine {
    kernel: Arc<Torn>,
    log: DirtyLog,
    vcpu: VcpuRing,
    idle: VcpuRing,
    dirty: DirtyPages,
}

impl Machine {
    fn new() -> Self {
        let ring = || (0..ENTRIES).map(|_| Gfn::default()).collect();
        let kernel = Arc::new(Torn {
            ring: ring(),
            idle: ring(),
            pushed: AtomicU32::new(0),
            recycled: AtomicU32::new(0),
            protected: Mutex::new((0..PAGES).collect()),
            meanwhile: Mutex::default(),
        });
        let log = DirtyLog::with_kernel(Box::new(Handle(Arc::clone(&kernel))), ENTRIES);
        log.add_slot(RAM, PAGES).unwrap();
        let attach = |ring: &[Gfn]| {
            let start = NonNull::from(ring).cast::<Entry>();
            // SAFETY: `Gfn` is laid out as `Entry` is, the owner keeps the ring, and it is accessed by atomics.
            let memory = unsafe { RingMemory::new(start, ENTRIES, Box::new(Arc::clone(&kernel))) };
            log.attach_ring(memory).unwrap()
        };
        let (vcpu, idle) = (attach(&kernel.ring), attach(&kernel.idle));
        Self {
            kernel,
            log,
            vcpu,
            idle,
            dirty: DirtyPages::new(),
        }
    }

    fn sync(&mut self) {
        self.log.sync(&mut self.dirty).unwrap();
    }

    fn overruns(&self) -> u64 {
        self.log.stats().overruns
    }
}

/// The reset would protect the page that the vCPU is about to log, and forget the one that was harvested.
#[test]
fn a_vcpu_that_is_stopped_while_it_overruns_what_is_reset() {
    let mut machine = Machine::new();
    let kernel = Arc::clone(&machine.kernel);
    kernel.write(0..60);
    machine.vcpu.harvest_and_stop();
    kernel.write(60..64);
    assert!(kernel.begin_write(64));
    // A harvest of these would see that a whole ring waits.
    machine.idle.on_full().unwrap();
    kernel.end_write();
    machine.sync();
    for page in [0, 64] {
        kernel.write([page]);
        machine.sync();
        assert!(machine.dirty.contains(RAM, page), "page {page} was lost");
    }
    assert_eq!(machine.overruns(), 1);
}

/// A vCPU that stops where a kernel's reserve begins is no overrun, wherever it is in the ring.
#[test]
fn a_ring_filled_up_to_its_reserve_is_none() {
    for begin in 0..64 {
        let mut machine = Machine::new();
        let kernel = Arc::clone(&machine.kernel);
        kernel.write(100..100 + begin);
        machine.sync();
        for harvested in 1..63 {
            kernel.write(0..harvested);
            machine.vcpu.harvest_and_stop();
            kernel.write(harvested..63);
            machine.sync();
            machine.sync();
        }
        assert_eq!(machine.overruns(), 0);
        assert_eq!(machine.log.stats().suspect_pages, 0);
    }
}

/// The next resets each forget a page that the vCPU pushes meanwhile.
fn forget(kernel: &Torn, mut pushed: VecDeque<Range<u64>>) {
    let Some(pages) = pushed.pop_front() else {
        return;
    };
    *kernel.meanwhile.lock().unwrap() = Some(Box::new(|kernel| {
        kernel.write(pages);
        forget(kernel, pushed);
    }));
}

/// With the vCPUs stopped there is no other sync to see it.
#[test]
fn the_last_sync_sees_a_gap_behind_what_it_takes() {
    for forgotten in 1..4 {
        let mut machine = Machine::new();
        let kernel = Arc::clone(&machine.kernel);
        kernel.write(0..60);
        let one_by_one = (65..64 + forgotten).map(|page| page..page + 1);
        forget(&kernel, iter::once(60..65).chain(one_by_one).collect());
        machine.sync();
        let seen: Vec<bool> = (60..70)
            .map(|page| machine.dirty.contains(RAM, page))
            .collect();
        kernel.write(64 + forgotten..70);
        machine.sync();
        for (page, seen) in (60..70).zip(seen) {
            assert!(
                seen || machine.dirty.contains(RAM, page),
                "page {page} was lost"
            );
        }
        assert_eq!(machine.overruns(), 1);
    }
}

/// A gap of more than three, behind a few entries: the full exit that takes these finds it.
#[test]
fn a_full_exit_finds_a_gap_behind_what_it_takes() {
    let mut machine = Machine::new();
    let kernel = Arc::clone(&machine.kernel);
    kernel.write(0..60);
    let one_by_one = (65..69).map(|page| page..page + 1);
    forget(&kernel, iter::once(60..65).chain(one_by_one).collect());
    machine.vcpu.on_full().unwrap();
    kernel.write(100..150);
    machine.vcpu.on_full().unwrap();
    assert_eq!(machine.overruns(), 1);
    machine.sync();
    assert!(machine.dirty.contains(RAM, 100), "page 100 was lost");
}

/// The reset would free the entry that the vCPU has pushed: a gap of one, or a few, that shows once it has run
/// on.
#[test]
fn a_push_that_a_reset_forgets_leaves_a_gap() {
    for forgotten in 1..4 {
        let mut machine = Machine::new();
        let kernel = Arc::clone(&machine.kernel);
        kernel.write(0..60);
        let one_by_one = (65..64 + forgotten).map(|page| page..page + 1);
        forget(&kernel, iter::once(60..65).chain(one_by_one).collect());
        machine.sync();
        kernel.write(64 + forgotten..70);
        machine.sync();
        machine.sync();
        assert_eq!(machine.overruns(), 1);
        for page in 60..70 {
            assert!(machine.dirty.contains(RAM, page), "page {page} was lost");
        }
    }
}
