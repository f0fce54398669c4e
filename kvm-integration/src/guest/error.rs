// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes wrong with the machine and its vCPUs.

use std::error::Error;

use super::memory::{HIGHEST_GPA, LOWEST_GPA, MemoryError};
use super::stamp::MAX_VCPUS;

/// The machine could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// A call to KVM failed.
    #[error("{0} failed for {1}: see the cause")]
    Kvm(&'static str, String, #[source] kvm_ioctls::Error),
    /// There is no memory for the boot slot or a vCPU's run page.
    #[error("the machine's own memory could not be mapped")]
    Memory(#[from] MemoryError),
    /// The lists' capacity does not fit into the boot slot.
    #[error(
        "lists of {1} entries for {0} vCPUs don't fit below {LOWEST_GPA:#x}: ask for \
         at least one vCPU, at most {MAX_VCPUS}, and fewer entries"
    )]
    Capacity(u32, usize),
    /// A slot's place is not for tests, or not page-aligned.
    #[error(
        "slot {id} can't be at {gpa:#x}: give it a page-aligned address such that it lies within \
         {LOWEST_GPA:#x} and {HIGHEST_GPA:#x}"
    )]
    SlotPlace {
        /// The slot.
        id: u32,
        /// Where it was to be.
        gpa: u64,
    },
    /// The id is in use.
    #[error("slot {id} exists already: remove it first or choose another id")]
    SlotExists {
        /// The slot.
        id: u32,
    },
    /// There is no such slot, or it is the boot slot.
    #[error("there is no slot {id} of yours: add it first")]
    NoSlot {
        /// The slot.
        id: u32,
    },
    /// The machine was made for fewer vCPUs.
    #[error("vCPU {index} is one too many: the machine was made for {vcpus}")]
    VcpuIndex {
        /// The vCPU.
        index: u32,
        /// How many there may be.
        vcpus: u32,
    },
    /// The list is empty, too long, or no multiple of the chunk.
    #[error(
        "vCPU {index} can't work on {entries} entries in chunks of {chunk}: give it at least one \
         and at most {capacity}, and a multiple of the chunk"
    )]
    List {
        /// The vCPU.
        index: u32,
        /// How long its list is.
        entries: usize,
        /// The stores between two exits, 0 for none.
        chunk: u32,
        /// How long its list may be.
        capacity: usize,
    },
}

impl VmError {
    pub(super) fn kvm(
        call: &'static str,
        what: impl Into<String>,
    ) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |source| Self::Kvm(call, what, source)
    }
}

/// A vCPU failed, or its thread could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The guest left for a reason it has no cause for.
    #[error(
        "vCPU {index} left the guest with {exit} at {at:#x} (store {stores}): an MMIO exit \
         means that its list holds a page of no slot, a shutdown that it faulted"
    )]
    UnexpectedExit {
        /// The vCPU.
        index: u32,
        /// The exit, as kvm-ioctls calls it.
        exit: String,
        /// The instruction.
        at: u64,
        /// The stores reported so far.
        stores: u64,
    },
    /// `KVM_RUN` failed.
    #[error("KVM_RUN failed for vCPU {0}: see the cause")]
    Run(u32, #[source] kvm_ioctls::Error),
    /// The handler said [`Action::Fail`](crate::guest::thread::Action::Fail).
    #[error("the handler of vCPU {0} failed")]
    Handler(u32, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The handler panicked.
    #[error("the handler of vCPU {index} panicked: {message}")]
    Panicked {
        /// The vCPU.
        index: u32,
        /// The panic's message.
        message: String,
    },
    /// The thread could not be started.
    #[error("the thread of vCPU {0} could not be started: too many threads or signals?")]
    Spawn(u32, #[source] std::io::Error),
    /// The thread could not be pinned.
    #[error("vCPU {0} could not be pinned to CPU {1}: choose one this process may run on")]
    Pin(u32, usize, #[source] std::io::Error),
}

impl VcpuError {
    /// Its text, with those of all its causes.
    pub(super) fn with_causes(&self) -> String {
        let causes = std::iter::successors(self.source(), |&cause| cause.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }
}
