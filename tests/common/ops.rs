// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a script is made of: the guest's, its devices', the VMM's and a faulty kernel's deeds.

use kvm_dirty_ring::Mode;
use kvm_dirty_ring::sim::{BitmapFault, ResetFault, ResetPhase};

/// The machine at its start.
#[derive(Debug, Clone)]
pub struct Setup {
    pub ring_entries: u32,
    pub reserved: u32,
    pub pml: usize,
    pub first_index: u32,
    pub vcpus: usize,
    pub mode: Mode,
    /// Whether there are bitmaps beside rings.
    pub with_bitmap: bool,
    /// Whether a reset protects whole spans of pages.
    pub protects_spans: bool,
    /// Whether a reset protects pages whose entries were made void, too.
    pub ignores_voids: bool,
    /// The working set at the start: its free places.
    pub places: Option<u64>,
}

/// Consecutive pages, written one by one. Numbers are reduced to what exists when it comes to it.
#[derive(Debug, Clone)]
pub struct Write {
    /// `None` is a device.
    pub vcpu: Option<usize>,
    pub slot: usize,
    /// The first page, as a fraction of the slot in 1/65536.
    pub at: u16,
    pub pages: u64,
}

#[derive(Debug, Clone)]
pub enum Op {
    Write(Write),
    /// Writes that no vCPU makes, and that are not marked in the log.
    KernelWrite(Write),
    Reap,
    /// A pass over the rings whose bits are set.
    ReapRings(u8),
    /// A pass over all rings on a shard that only concurrent passes would take.
    ReapOnShard(usize),
    /// What a vCPU does on a full exit, full or not.
    OnFull(usize),
    /// A pass over a vCPU's ring that ends before its reset.
    HarvestAndStop(usize),
    Sync,
    /// A vCPU leaves the guest for a moment.
    Exit(usize),
    /// A sync with vCPUs stopped: from here on the copy equals the truth.
    Checkpoint,
    /// One step in a slot's life: add and create, retire, delete, finish, and so on.
    SlotStep {
        slot: usize,
        pages: u64,
    },
    AddVcpu,
    /// Writes that happen inside the next reset.
    InReset(ResetPhase, Vec<Write>),
    Inject(Vec<ResetFault>),
    InjectBitmap(Vec<BitmapFault>),
    /// The next page that the vCPU logs is logged as nonsense.
    Garble {
        vcpu: usize,
        unknown_slot: bool,
    },
    /// Writes by a vCPU that does not stop at the soft limit.
    Overrun(Write),
    /// Every slot is protected anew.
    Rearm,
    /// The working set is switched on, with so many free places and members at most, or off.
    WorkingSet(Option<(u64, u64)>),
    /// The working set is closed; or that fails, at the first slot.
    Refresh {
        fails: Option<Moment>,
    },
    /// The kernel protects pages for reasons of its own.
    Protect(Write),
    /// A last sync with vCPUs stopped, which is called off.
    LastSync,
    /// So many chunks of so many pages are read of a sync on demand: of the one under way, or of another.
    OnDemand {
        chunks: usize,
        span: u64,
    },
    /// A slot's log is switched on or off, well, or with a failure: before that is done, or after
    /// it.
    Switch {
        slot: usize,
        on: bool,
        fails: Option<Moment>,
    },
}

/// When a call of the VMM's fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Before,
    After,
}
