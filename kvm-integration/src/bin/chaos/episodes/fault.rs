// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is done to a guest and its log, and how often it was.

use std::sync::atomic::{AtomicU64, Ordering};

use strum::VariantArray;

/// A kind of trouble. Reports have its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Fault {
    /// A storm of signals at threads that run vCPUs.
    SignalsAtVcpus,
    /// A storm of signals at the reaper's thread.
    SignalsAtReaper,
    /// A storm of signals at threads that sync, change slots, or write as devices do.
    SignalsAtOthers,
    /// A storm of the C library's own signal, which `pthread_sigmask` does not block.
    SignalsOfTheCLibrary,
    /// A running vCPU was thrown out of the guest, and let in again.
    Kicks,
    /// A memslot came while others were in use.
    SlotsAdded,
    /// A memslot's removal began.
    SlotsRetired,
    /// A memslot's removal ended.
    SlotsFinished,
    /// A memslot came with the id of one that was removed, and other memory.
    SlotIdsReused,
    /// A vCPU was made and attached while others ran.
    VcpusAttachedLate,
    /// A vCPU was stopped for good, and its file closed.
    VcpusDropped,
    /// A device wrote some pages and marked them.
    DeviceWrites,
    /// A sync beside others.
    ConcurrentSyncs,
    /// A sync beside others, whose pages were protected as they were read, some or all.
    SyncsOnDemand,
    /// A pass over all rings beside whatever else was going on.
    ConcurrentPasses,
    /// A vCPU left the guest for a full ring.
    FullExits,
    /// A full exit whose pass ended between harvest and reset, as by a panic.
    PassesAbandoned,
    /// The reaper was stopped.
    ReapersStopped,
    /// A reaper was started after one was stopped.
    ReapersRestarted,
    /// The reaper was paused.
    ReapersPaused,
    /// The reaper went on with another policy.
    PoliciesSwapped,
    /// A policy panicked, or was replaced for asking for times out of bounds.
    PoliciesFailed,
    /// A slot was protected anew, and `rearmed` was called.
    SlotsRearmed,
    /// A ring was overrun.
    RingOverruns,
    /// A reset failed.
    FailedResets,
    /// A reset fell short.
    ShortResets,
    /// A reset may have been cut short after its last entry.
    DoubtfulResets,
    /// An entry named a page of a slot that is not in the log.
    EntriesOfNoSlot,
    /// How many pages may stay open changed, or whether any may.
    PlacesChanged,
    /// A page was harvested, and stayed open.
    PagesLeftOpen,
    /// All that stayed open was closed.
    Refreshes,
    /// A last sync was made, and the guest went on.
    LastSyncsCalledOff,
    /// An episode's kernel protected pages that were to stay open.
    VoidsIgnored,
    /// The guest wrote in the midst of a reset, or of the reading of a bitmap. (On KVM it always does, at an unknown time.)
    WritesInResets,
}

/// How often each kind was.
#[derive(Debug)]
pub struct Counts([AtomicU64; Fault::VARIANTS.len()]);

impl Default for Counts {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Counts {
    /// One more.
    pub fn add(&self, fault: Fault) {
        self.add_many(fault, 1);
    }

    /// So many more.
    pub fn add_many(&self, fault: Fault, times: u64) {
        // Relaxed: read for the sake of the number alone.
        self.0[fault as usize].fetch_add(times, Ordering::Relaxed);
    }

    /// How often `fault` was.
    pub fn get(&self, fault: Fault) -> u64 {
        // Relaxed: as above.
        self.0[fault as usize].load(Ordering::Relaxed)
    }
}
