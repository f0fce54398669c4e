//! What is done to a guest and its log, and how often it was.

use std::sync::atomic::{AtomicU64, Ordering};

/// A kind of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
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
    Kick,
    /// A memslot came while others were in use.
    SlotAdded,
    /// A memslot's removal began.
    SlotRetired,
    /// A memslot's removal ended.
    SlotFinished,
    /// A memslot came with the id of one that was removed, and other memory.
    SlotIdReused,
    /// A vCPU was made and attached while others ran.
    LateVcpu,
    /// A vCPU was stopped for good, and its file closed.
    VcpuDropped,
    /// A device wrote some pages and marked them.
    DeviceWrite,
    /// A sync beside others.
    ConcurrentSync,
    /// A pass over all rings beside whatever else was going on.
    ConcurrentPass,
    /// A vCPU left the guest for a full ring.
    FullExit,
    /// A full exit whose pass ended between harvest and reset, as by a panic.
    PassAbandoned,
    /// The reaper was stopped.
    ReaperStopped,
    /// A reaper was started after one was stopped.
    ReaperRestarted,
    /// The reaper was paused.
    ReaperPaused,
    /// The reaper went on with another policy.
    PolicySwapped,
    /// A policy panicked, or was replaced for asking for times out of bounds.
    PolicyFailed,
    /// A slot was protected anew, and the log told so.
    SlotRearmed,
    /// A ring was overrun.
    RingOverrun,
    /// A reset failed.
    ResetFailed,
    /// A reset fell short.
    ShortReset,
    /// A reset may have been cut short after its last entry.
    DoubtfulReset,
    /// An entry named a page of no slot that the log was told of.
    EntryOfNoSlot,
    /// The guest wrote in the midst of a reset. (On KVM it always does, and nobody can tell when.)
    WriteInReset,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Self; 28] = [
        Self::SignalsAtVcpus,
        Self::SignalsAtReaper,
        Self::SignalsAtOthers,
        Self::SignalsOfTheCLibrary,
        Self::Kick,
        Self::SlotAdded,
        Self::SlotRetired,
        Self::SlotFinished,
        Self::SlotIdReused,
        Self::LateVcpu,
        Self::VcpuDropped,
        Self::DeviceWrite,
        Self::ConcurrentSync,
        Self::ConcurrentPass,
        Self::FullExit,
        Self::PassAbandoned,
        Self::ReaperStopped,
        Self::ReaperRestarted,
        Self::ReaperPaused,
        Self::PolicySwapped,
        Self::PolicyFailed,
        Self::SlotRearmed,
        Self::RingOverrun,
        Self::ResetFailed,
        Self::ShortReset,
        Self::DoubtfulReset,
        Self::EntryOfNoSlot,
        Self::WriteInReset,
    ];

    /// What it is called in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::SignalsAtVcpus => "signals_at_vcpus",
            Self::SignalsAtReaper => "signals_at_reaper",
            Self::SignalsAtOthers => "signals_at_others",
            Self::SignalsOfTheCLibrary => "signals_of_the_c_library",
            Self::Kick => "kicks",
            Self::SlotAdded => "slots_added",
            Self::SlotRetired => "slots_retired",
            Self::SlotFinished => "slots_finished",
            Self::SlotIdReused => "slot_ids_reused",
            Self::LateVcpu => "vcpus_attached_late",
            Self::VcpuDropped => "vcpus_dropped",
            Self::DeviceWrite => "device_writes",
            Self::ConcurrentSync => "concurrent_syncs",
            Self::ConcurrentPass => "concurrent_passes",
            Self::FullExit => "full_exits",
            Self::PassAbandoned => "passes_abandoned",
            Self::ReaperStopped => "reapers_stopped",
            Self::ReaperRestarted => "reapers_restarted",
            Self::ReaperPaused => "reapers_paused",
            Self::PolicySwapped => "policies_swapped",
            Self::PolicyFailed => "policies_failed",
            Self::SlotRearmed => "slots_rearmed",
            Self::RingOverrun => "ring_overruns",
            Self::ResetFailed => "failed_resets",
            Self::ShortReset => "short_resets",
            Self::DoubtfulReset => "doubtful_resets",
            Self::EntryOfNoSlot => "entries_of_no_slot",
            Self::WriteInReset => "writes_in_resets",
        }
    }
}

/// How often each kind was.
#[derive(Debug, Default)]
pub struct Counts([AtomicU64; Fault::ALL.len()]);

impl Counts {
    /// One more.
    pub(super) fn add(&self, fault: Fault) {
        self.add_many(fault, 1);
    }

    /// So many more.
    pub(super) fn add_many(&self, fault: Fault, times: u64) {
        // Relaxed: read for the sake of the number alone.
        self.0[fault as usize].fetch_add(times, Ordering::Relaxed);
    }

    /// How often `fault` was.
    pub fn get(&self, fault: Fault) -> u64 {
        // Relaxed: as above.
        self.0[fault as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_kind_has_its_own_place_and_name() {
        let mut names = HashSet::new();
        for (place, fault) in Fault::ALL.into_iter().enumerate() {
            assert_eq!(fault as usize, place);
            assert!(names.insert(fault.name()));
        }
    }
}
