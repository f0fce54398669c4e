//! The real kernel: the only files that make system calls.

mod enable;
mod mmap;
mod signals;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

pub use enable::{HostSupport, RingEntries};
use signals::SignalsBlocked;
pub(crate) use signals::block_for_good;

use crate::error::{AttachError, EnableError};
use crate::kernel::{Kernel, RESERVED_ENTRIES};
use crate::log::{DirtyLog, VcpuRing};
use crate::vcpu::MOST_RESERVED_ENTRIES;

/// Numbers of KVM's ioctls, from the kernel's include/uapi/linux/kvm.h.
mod ioctl {
    pub(super) const GET_API_VERSION: u64 = 0xae00;
    pub(super) const CHECK_EXTENSION: u64 = 0xae03;
    pub(super) const GET_DIRTY_LOG: u64 = 0x4010_ae42;
    pub(super) const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    pub(super) const ENABLE_CAP: u64 = 0x4068_aea3;
    pub(super) const RESET_DIRTY_RINGS: u64 = 0xaec7;
}

/// Issues the ioctl `request`, which takes an integer or nothing.
fn ioctl_value(fd: &impl AsRawFd, request: u64, value: u64) -> io::Result<u32> {
    // SAFETY: called with requests whose argument the kernel takes as an integer.
    returned(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, value) })
}

/// Issues the ioctl `request`, which takes a pointer to a `T`.
///
/// # Safety
/// `request` must be one that takes a `T`, and every address in it must be good for what the
/// kernel does with it.
unsafe fn ioctl_struct<T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> io::Result<u32> {
    // SAFETY: the pointer is good for the call; the rest is the caller's promise.
    returned(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, core::ptr::from_mut(argument)) })
}

fn returned(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The host's page size, in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf reads a number; this one always exists.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// A KVM virtual machine with dirty rings.
struct Vm {
    fd: OwnedFd,
}

impl Kernel for Vm {
    fn reset(&self) -> io::Result<u32> {
        // With a signal pending, `kvm_dirty_ring_reset` stops half-way, and pages that it has
        // recycled but not protected are never logged again.
        let _blocked = SignalsBlocked::new()?;
        ioctl_value(&self.fd, ioctl::RESET_DIRTY_RINGS, 0)
    }

    fn reserved_entries(&self) -> u32 {
        if enable::has_pml() {
            MOST_RESERVED_ENTRIES
        } else {
            RESERVED_ENTRIES
        }
    }
}

impl DirtyLog {
    /// Enables dirty rings of `entries` entries on a KVM virtual machine: before its first vCPU is
    /// created. The descriptor is duplicated.
    ///
    /// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL` is preferred; `KVM_CAP_DIRTY_LOG_RING` is taken on x86,
    /// whose memory model makes up for it.
    ///
    /// # Errors
    /// Each way in which KVM refuses it is a variant of its own; the VM is as it was.
    pub fn enable(vm_fd: &impl AsRawFd, entries: RingEntries) -> Result<Self, EnableError> {
        // SAFETY: the caller's object keeps the descriptor open while we borrow it.
        let borrowed = unsafe { BorrowedFd::borrow_raw(vm_fd.as_raw_fd()) };
        let call = "duplicating the VM's file descriptor";
        let fd = borrowed.try_clone_to_owned();
        let fd = fd.map_err(|source| EnableError::Kvm { call, source })?;
        enable::enable(&fd, entries)?;
        Ok(Self::over_kvm(Box::new(Vm { fd }), entries.get()))
    }

    /// Maps the ring of a vCPU of this VM and starts to harvest it. One call for each vCPU, at any
    /// time before it runs; the mapping outlives the descriptor.
    ///
    /// # Errors
    /// The ring cannot be mapped; or the log is not a KVM VM's.
    pub fn attach_vcpu(&self, vcpu_fd: &impl AsRawFd) -> Result<VcpuRing, AttachError> {
        if !self.is_kvm() {
            return Err(AttachError::NotKvm);
        }
        let memory = mmap::map_ring(vcpu_fd, self.ring_entries()).map_err(AttachError::Map)?;
        self.attach_ring(memory)
    }
}
