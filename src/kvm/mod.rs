//! The real kernel: the only files that make system calls.

mod bitmap;
mod enable;
mod mmap;
mod signals;
mod stops;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bitmap::Bitmaps;
pub use enable::{HostSupport, RingEntries};
use signals::SignalsBlocked;
pub(crate) use signals::block_for_good;
use stops::StopWatch;

use crate::error::{AttachError, EnableError};
use crate::kernel::{Kernel, Mode, RESERVED_ENTRIES, Recycled};
use crate::log::DirtyLog;
use crate::slot_id::SlotId;
use crate::vcpu::MOST_RESERVED_ENTRIES;
use crate::vcpu_ring::VcpuRing;

/// Numbers of KVM's ioctls, from the kernel's include/uapi/linux/kvm.h.
mod ioctl {
    pub(super) const GET_API_VERSION: u64 = 0xae00;
    pub(super) const CHECK_EXTENSION: u64 = 0xae03;
    pub(super) const GET_DIRTY_LOG: u64 = 0x4010_ae42;
    pub(super) const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    pub(super) const ENABLE_CAP: u64 = 0x4068_aea3;
    pub(super) const CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
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

/// A KVM virtual machine with its dirty log enabled.
struct Vm {
    fd: OwnedFd,
    mode: Mode,
    /// All there is in bitmap mode; beside rings, where there are both.
    bitmaps: Option<Bitmaps>,
}

impl Kernel for Vm {
    fn reset(&self) -> io::Result<Recycled> {
        if self.mode == Mode::Bitmap {
            return Ok(Recycled::default());
        }
        // With a signal pending, `kvm_dirty_ring_reset` stops half-way, and pages that it has
        // recycled but not protected are never logged again.
        let _blocked = SignalsBlocked::new()?;
        let watch = StopWatch::start();
        let entries = ioctl_value(&self.fd, ioctl::RESET_DIRTY_RINGS, 0)?;
        Ok(Recycled {
            entries,
            interrupted: watch.may_have_stopped(),
        })
    }

    fn reserved_entries(&self) -> u32 {
        match self.mode {
            Mode::Bitmap => 0,
            Mode::Rings if enable::has_pml() => MOST_RESERVED_ENTRIES,
            Mode::Rings => RESERVED_ENTRIES,
        }
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn has_bitmap(&self) -> bool {
        self.bitmaps.is_some()
    }

    fn take_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        match &self.bitmaps {
            Some(bitmaps) => bitmaps.take(&self.fd, slot, pages, words),
            None => Err(io::ErrorKind::Unsupported.into()),
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
    /// On arm64 KVM writes some of the guest's memory without a vCPU (tables of the interrupt
    /// controller), which no ring logs. Where `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP` is offered it is
    /// enabled, too, for which no memslot may exist yet, and these pages come with each sync. That
    /// costs a sync one ioctl a slot, which copies a bit a page, 32 KiB for 1 GiB, and one more for
    /// each GiB with such pages.
    ///
    /// # Errors
    /// Each way in which KVM refuses it is a variant of its own; the VM is as it was, but for
    /// [`EnableError::SlotExists`].
    pub fn enable(vm_fd: &impl AsRawFd, entries: RingEntries) -> Result<Self, EnableError> {
        let fd = duplicate(vm_fd)?;
        let vm = Vm {
            bitmaps: enable::enable(&fd, entries)?,
            mode: Mode::Rings,
            fd,
        };
        Ok(Self::over_kvm(Box::new(vm), entries.get()))
    }

    /// A log over the bitmaps that KVM keeps of a virtual machine's slots, for kernels without dirty
    /// rings: at any time, on arm64 before the first memslot. The descriptor is duplicated. All else
    /// is as with rings, but that syncs read the bitmap of each slot, that no vCPU ever stops for a
    /// full ring, and that a reaper finds nothing to do.
    ///
    /// If the kernel offers `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, it is enabled, so that a sync takes
    /// KVM's `mmu_lock` for the dirty part of a slot only; without `INITIALLY_SET`, whether or not the
    /// VMM has set that. With it no harm is done, either: pages of new slots begin as dirty.
    ///
    /// One log a VM, and no `KVM_GET_DIRTY_LOG` or `KVM_CLEAR_DIRTY_LOG` of the VMM beside it: who takes
    /// a bitmap takes it from the other, and KVM tells neither.
    ///
    /// # Errors
    /// Not a VM, one whose dirty rings are enabled, or a call failed; the VM is as it was.
    pub fn enable_bitmap(vm_fd: &impl AsRawFd) -> Result<Self, EnableError> {
        let fd = duplicate(vm_fd)?;
        let vm = Vm {
            bitmaps: Some(enable::enable_bitmap(&fd)?),
            mode: Mode::Bitmap,
            fd,
        };
        Ok(Self::over_kvm(Box::new(vm), mmap::EMPTY_RING_ENTRIES))
    }

    /// [`enable`](Self::enable), or [`enable_bitmap`](Self::enable_bitmap) where the kernel has no
    /// dirty rings for this architecture. [`mode`](Self::mode) tells which it was.
    ///
    /// # Errors
    /// Those of the two: rings that are there and refused are no reason for bitmaps.
    pub fn enable_auto(vm_fd: &impl AsRawFd, entries: RingEntries) -> Result<Self, EnableError> {
        match Self::enable(vm_fd, entries) {
            Err(EnableError::NoDirtyRing) => Self::enable_bitmap(vm_fd),
            enabled => enabled,
        }
    }

    /// Maps the ring of a vCPU of this VM and starts to harvest it: for each vCPU, at any time
    /// before it runs, and again if its [`VcpuRing`] was dropped; the mapping outlives the
    /// descriptor. In [`Mode::Bitmap`] the vCPU has an empty ring of ours, so that a VMM does the
    /// same in both modes.
    ///
    /// Which vCPU it is, says its descriptor's link in `/proc/self/fd`. In a jail without `/proc` one
    /// that comes again looks like another, and a second consumer of its ring would lose pages: attach
    /// each vCPU once there, and keep its `VcpuRing` while it is unplugged.
    ///
    /// # Errors
    /// The ring cannot be mapped; somebody has the vCPU's [`VcpuRing`]; or the log is not a KVM
    /// VM's.
    pub fn attach_vcpu(&self, vcpu_fd: &impl AsRawFd) -> Result<VcpuRing, AttachError> {
        if !self.is_kvm() {
            return Err(AttachError::NotKvm);
        }
        let memory = match self.mode() {
            Mode::Rings => mmap::map_ring(vcpu_fd, self.ring_entries()),
            Mode::Bitmap => Ok(mmap::empty_ring(vcpu_fd)),
        };
        self.attach_ring(memory.map_err(AttachError::Map)?)
    }
}

/// A descriptor of our own for the VM behind `vm_fd`.
fn duplicate(vm_fd: &impl AsRawFd) -> Result<OwnedFd, EnableError> {
    // SAFETY: the caller's object keeps the descriptor open while we borrow it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(vm_fd.as_raw_fd()) };
    let call = "duplicating the VM's file descriptor";
    let fd = borrowed.try_clone_to_owned();
    fd.map_err(|source| EnableError::Kvm { call, source })
}
