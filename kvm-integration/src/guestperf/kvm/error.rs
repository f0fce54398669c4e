//! What can go wrong.

use std::io;

use kvm_dirty_ring::error::{AttachError, EnableError, ReaperError, RingSizeError, SlotError};

use crate::machine::MachineError;
use crate::memory::MemoryError;
use crate::migration::MigrationError;
use crate::vm::VmError;

/// A guest could not be set up, or not be migrated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestperfError {
    /// There can't be rings of that size.
    #[error("rings of that size can't be had")]
    RingSize(#[from] RingSizeError),
    /// There is no memory for the guest or its copy.
    #[error("no memory for the guest and its copy: make it smaller")]
    Memory(#[from] MemoryError),
    /// The guest and its copy would not fit into memory: the kernel would end some process later.
    #[error("the guest and its copy take {wanted} MiB, and {available} MiB are available")]
    TooLarge {
        /// What both take.
        wanted: u64,
        /// What there is.
        available: u64,
    },
    /// The dirty rings could not be enabled.
    #[error("dirty rings could not be enabled")]
    Enable(#[from] EnableError),
    /// The guest's slot could not be tracked.
    #[error("the guest's slot could not be tracked")]
    Slot(#[from] SlotError),
    /// A ring could not be attached.
    #[error("a vCPU's ring could not be attached")]
    Attach(#[from] AttachError),
    /// KVM refused something.
    #[error("KVM refused")]
    Vm(#[from] VmError),
    /// A vCPU failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A reaper did not start.
    #[error("the reaper did not start")]
    Reaper(#[from] ReaperError),
    /// The migration failed.
    #[error("the migration failed")]
    Migration(#[from] MigrationError),
    /// The operating system refused something.
    #[error("{call} failed")]
    Os {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not say how much CPU time a thread takes.
    #[error("no CPU time of a thread can be had from /proc/self/task")]
    CpuTime,
    /// Nobody looked at the guest in its quiet phase.
    #[error("the guest was not looked at in all of its quiet phase: is the machine so busy?")]
    Unseen,
    /// The caller wanted no more.
    #[error("interrupted")]
    Interrupted,
}

impl GuestperfError {
    pub(super) fn os(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { call, source }
    }
}
