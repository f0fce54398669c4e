// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One vCPU, and one stay of it in the guest.

use std::sync::Arc;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::error::{VcpuError, VmError};
use super::kick::ImmediateExit;
use super::memory::GuestMemory;
use super::processor;
use super::program::Exit;
use super::slots::Slots;

/// Reads how far a vCPU is, also while it runs.
#[derive(Clone, Debug)]
pub struct Progress {
    boot: Arc<GuestMemory>,
    offset: u64,
}

impl Progress {
    /// Page stores so far, counted by the chunk, or by up to 64 without chunks; the stores
    /// really done are at most one such step ahead.
    pub fn stores(&self) -> u64 {
        self.boot.read_u64(self.offset)
    }

    /// Passes over the list completed so far.
    pub fn passes(&self) -> u64 {
        self.boot.read_u64(self.offset + 8)
    }

    /// Under [`Stress`](crate::guest::stress::Stress): the longest time between two pages since the last
    /// call of this, in ticks of its clock.
    pub fn take_longest_gap(&self) -> u64 {
        self.boot.take_u64(self.offset + 16)
    }
}

/// A vCPU that waits for a thread to run it. It keeps its machine alive.
#[derive(Debug)]
pub struct TinyVcpu {
    // Fields drop in this order: the vCPU goes before its machine.
    fd: VcpuFd,
    immediate_exit: Arc<ImmediateExit>,
    index: u32,
    progress: Progress,
    _vm: Arc<Slots>,
}

/// How one `KVM_RUN` ended.
pub(crate) enum Ran {
    /// The guest left by itself.
    Left(Exit),
    /// A signal, or the flag that keeps the vCPU out.
    Interrupted,
}

impl TinyVcpu {
    pub(super) fn new(
        vm: Arc<Slots>,
        index: u32,
        progress: u64,
        set_up: impl FnOnce(&VcpuFd) -> Result<(), VmError>,
    ) -> Result<Self, VmError> {
        let failed = |call| VmError::kvm(call, format!("vCPU {index}"));
        let fd = vm
            .fd
            .create_vcpu(index.into())
            .map_err(failed("KVM_CREATE_VCPU"))?;
        set_up(&fd)?;
        let immediate_exit = ImmediateExit::map(&fd)
            .map_err(|error| kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(0)))
            .map_err(failed("mmap"))?;
        Ok(Self {
            fd,
            immediate_exit: Arc::new(immediate_exit),
            index,
            progress: Progress {
                boot: Arc::clone(&vm.boot),
                offset: progress,
            },
            _vm: vm,
        })
    }

    /// The vCPU, to map its ring.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Which vCPU this is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// How far it is; stays readable when the vCPU is gone.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Ticks a second of its clock, by which gaps are counted.
    pub fn clock_hz(&self) -> Result<f64, VmError> {
        let failed = VmError::kvm("KVM_GET_TSC_KHZ", format!("vCPU {}", self.index));
        processor::clock_hz(&self.fd).map_err(failed)
    }

    pub(crate) fn immediate_exit(&self) -> &Arc<ImmediateExit> {
        &self.immediate_exit
    }

    /// Enters the guest once.
    pub(crate) fn run(&mut self) -> Result<Ran, VcpuError> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                return Ok(Ran::Left(Exit::RingFull));
            }
            // KVM_EXIT_INTR comes with EINTR as a rule, never with anything to do.
            Ok(VcpuExit::Intr) => return Ok(Ran::Interrupted),
            Err(source) if matches!(source.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Ran::Interrupted);
            }
            Err(source) => return Err(VcpuError::Run(self.index, source)),
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(other) => match processor::meaning(&other) {
                Some(exit) => return Ok(Ran::Left(exit)),
                None => format!("{other:x?}"),
            },
        };
        let at = processor::program_counter(&self.fd).unwrap_or(u64::MAX);
        let stores = self.progress.stores();
        Err(VcpuError::UnexpectedExit {
            index: self.index,
            exit,
            at,
            stores,
        })
    }

    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, with which KVM fills in this member
        // of the union; all members are integers.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        format!("InternalError (suberror {suberror})")
    }
}
