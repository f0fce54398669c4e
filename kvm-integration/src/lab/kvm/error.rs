//! What can go wrong.

use std::io;

use kvm_dirty_ring::error::{
    AttachError, EnableError, ReaperError, RingSizeError, SlotError, SyncError,
};

use crate::memory::MemoryError;
use crate::vcpu::VcpuError;
use crate::vm::VmError;

/// A cell could not be set up, or not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// There can't be rings of that size.
    #[error("rings of that size can't be had")]
    RingSize(#[from] RingSizeError),
    /// There is no memory for the guest.
    #[error("no memory for the guest: take fewer vCPUs or smaller rings")]
    Memory(#[from] MemoryError),
    /// The dirty rings could not be enabled.
    #[error("dirty rings could not be enabled")]
    Enable(#[from] EnableError),
    /// The guest's slot could not be tracked.
    #[error("the guest's slot could not be tracked")]
    Slot(#[from] SlotError),
    /// A ring could not be attached.
    #[error("a vCPU's ring could not be attached")]
    Attach(#[from] AttachError),
    /// KVM refused the machine.
    #[error("the machine could not be made")]
    Vm(#[from] VmError),
    /// A vCPU failed.
    #[error("a vCPU failed")]
    Vcpu(#[from] VcpuError),
    /// A vCPU's thread has ended, and did not say why.
    #[error("a vCPU's thread has ended for no reason it could give")]
    Ended,
    /// The rings could not be emptied before an arm's turn.
    #[error("the rings could not be emptied")]
    Sync(#[from] SyncError),
    /// The reaper failed.
    #[error("the reaper of arm {arm} failed")]
    Reaper {
        /// The arm.
        arm: &'static str,
        /// What it said.
        source: ReaperError,
    },
    /// The operating system does not let the reaper run as the arm wants it.
    #[error("the reaper of arm {arm} may not run as it should")]
    Refused {
        /// The arm.
        arm: &'static str,
        /// What the kernel said.
        source: ReaperError,
    },
    /// The kernel does not say how much CPU time a thread takes.
    #[error("no CPU time of a thread can be had from /proc/self/task")]
    CpuTime,
    /// The kernel does not say which CPUs there are, or does not start a thread.
    #[error("{call} failed")]
    Os {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest stands still.
    #[error("the guest has stored nothing for all of an arm's turn")]
    Stuck,
    /// The guest would not fit into memory: the kernel would end some process later.
    #[error("the guest takes {wanted} MiB, and {available} MiB are available")]
    TooLarge {
        /// What its pages take.
        wanted: u64,
        /// What there is.
        available: u64,
    },
    /// The caller wanted no more.
    #[error("interrupted")]
    Interrupted,
}

impl LabError {
    pub(super) fn os(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { call, source }
    }
}
