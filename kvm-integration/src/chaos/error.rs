//! Why an episode did not come to its end.

use kvm_dirty_ring::Run;
use kvm_dirty_ring::error::{ReaperError, SlotError, SyncError};

use crate::machine::MachineError;
use crate::memory::MemoryError;

/// An episode did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChaosError {
    /// The machine could not be made or changed, or a vCPU failed.
    #[error("the machine failed")]
    Machine(#[from] MachineError),
    /// There is no memory for a slot or its copy.
    #[error("no memory for a slot or its copy")]
    Memory(#[from] MemoryError),
    /// The log could not say what was written.
    #[error("the dirty pages could not be had")]
    Sync(#[from] SyncError),
    /// The log refused something about a slot.
    #[error("the log refused a change of slots, or a device's write")]
    Slot(#[from] SlotError),
    /// The reaper failed.
    #[error("the reaper failed")]
    Reaper(#[from] ReaperError),
    /// A sync reported pages of a slot that was not there while it ran.
    #[error("a sync reported {} pages from {} on of slot {}, which has none of them", run.pages,
            run.first_page, run.slot)]
    Stray {
        /// What it reported.
        run: Run,
    },
    /// A thread could not be started.
    #[error("a thread could not be started: too many of them?")]
    Spawn(#[source] std::io::Error),
    /// The kernel could not be had to refuse a reset.
    #[cfg(target_arch = "x86_64")]
    #[error("no reset could be refused: no filter of system calls?")]
    Refusal(#[source] std::io::Error),
    /// A thread panicked, which has been on stderr already.
    #[error("a thread of the episode panicked")]
    Panicked,
}
