// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Enabling the log of a KVM virtual machine, and mapping the rings of its vCPUs.

use std::os::fd::{AsFd, AsRawFd};

use super::DirtyLog;
use super::vcpu_ring::VcpuRing;
use crate::error::{AttachError, EnableError};
use crate::kernel::Mode;
use crate::kvm::enable::RingEntries;
use crate::kvm::mmap;
use crate::kvm::vm::Vm;

impl DirtyLog {
    /// Enables dirty rings of `entries` entries on a KVM virtual machine.
    ///
    /// Call it before the first vCPU is created. The descriptor is duplicated.
    ///
    /// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL` is preferred. `KVM_CAP_DIRTY_LOG_RING` is used on x86 only, whose memory model makes up
    /// for the difference.
    ///
    /// On arm64, call it before the first memslot, too. KVM writes some of the guest's memory without a vCPU there (tables of the
    /// interrupt controller), which no ring logs. Where `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP` is offered it is enabled as well,
    /// and these pages come with each sync. That costs a sync one ioctl per slot, which copies one bit per page (32 KiB for 1 GiB),
    /// and one more ioctl for each GiB with such pages.
    ///
    /// A VM whose `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is on with `INITIALLY_SET` is refused: with rings, the first write to each page of a
    /// slot would be lost where `KVM_MEM_LOG_DIRTY_PAGES` is set while the guest has the page mapped. If the VMM enables it *later*,
    /// [`start_tracking`](Self::start_tracking), [`rearm`](Self::rearm), [`rearm_from`](Self::rearm_from) and
    /// [`refresh`](Self::refresh) switch it off before they call their hook. No hook, and no other thread, may enable it in between.
    ///
    /// # Errors
    /// Each reason for which KVM refuses has a variant of its own. The VM is unchanged, except after
    /// [`EnableError::SlotExists`], and perhaps after [`EnableError::Kvm`].
    pub fn enable(vm_fd: &impl AsRawFd, entries: RingEntries) -> Result<Self, EnableError> {
        let vm = Vm::with_rings(vm_fd, entries)?;
        Ok(Self::over_kvm(Box::new(vm), entries.get()))
    }

    /// Creates a log over the bitmaps that KVM keeps of a VM's slots, for kernels without dirty rings.
    ///
    /// Call it at any time; on arm64 before the first memslot. The descriptor is duplicated.
    ///
    /// All calls are as with rings, but there are no dirty rates and no dirty limits. A sync reads the bitmap of each slot, no vCPU ever stops for a full ring, and a reaper finds
    /// nothing to do.
    ///
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is enabled where the kernel offers it, without `INITIALLY_SET`, whether or not the VMM
    /// has set that. A sync then takes KVM's `mmu_lock` for the dirty part of a slot only. To have KVM protect no whole slot at once
    /// when its log starts, the VMM enables the capability again after this call, with `KVM_DIRTY_LOG_INITIALLY_SET`: all
    /// pages of slots whose log starts from then on begin dirty, and [`sync_on_demand`](Self::sync_on_demand) protects each chunk that
    /// is read.
    ///
    /// On arm64, a VM whose rings were enabled before its first memslot, by another log, has bitmaps beside them and looks like
    /// one without rings. [`attach_vcpu`](Self::attach_vcpu) detects it, so attach each vCPU. The syncs of a log without attached
    /// vCPUs would miss all that vCPUs write there.
    ///
    /// Use one log per VM, and no `KVM_GET_DIRTY_LOG` or `KVM_CLEAR_DIRTY_LOG` beside it: each takes bits that the other then
    /// misses.
    ///
    /// # Errors
    /// The descriptor is not a VM's, the VM's dirty rings are enabled, or a call failed. The VM is unchanged.
    pub fn enable_bitmap(vm_fd: &impl AsRawFd) -> Result<Self, EnableError> {
        let vm = Vm::with_bitmaps(vm_fd)?;
        Ok(Self::over_kvm(Box::new(vm), mmap::EMPTY_RING_ENTRIES))
    }

    /// Calls [`enable`](Self::enable), or [`enable_bitmap`](Self::enable_bitmap) where the kernel has no dirty
    /// rings for this architecture.
    ///
    /// [`mode`](Self::mode) returns which of the two it was.
    ///
    /// # Errors
    /// Those of the two. If the kernel has rings and refuses them, bitmaps are not tried.
    pub fn enable_auto(vm_fd: &impl AsRawFd, entries: RingEntries) -> Result<Self, EnableError> {
        match Self::enable(vm_fd, entries) {
            Err(EnableError::NoDirtyRing) => Self::enable_bitmap(vm_fd),
            enabled => enabled,
        }
    }

    /// Maps the ring of a vCPU of this VM and starts to harvest it.
    ///
    /// Call it for each vCPU before it runs, and again if its [`VcpuRing`] was dropped. The mapping outlives the
    /// descriptor.
    ///
    /// In [`Mode::Bitmap`] the vCPU gets an empty ring of the crate's, so a VMM makes the same calls in both modes. A vCPU that has
    /// a ring in KVM is detected.
    ///
    /// The link of its descriptor in `/proc/self/fd` identifies the vCPU. In a jail without `/proc`, attach each vCPU once, and
    /// keep its `VcpuRing` while the vCPU is unplugged: the crate could not recognise it, and a second consumer of its ring would
    /// lose pages.
    ///
    /// # Errors
    /// The ring cannot be mapped; the vCPU's [`VcpuRing`] still exists; the log reads bitmaps and the vCPU has a ring; or the log
    /// does not belong to a KVM VM.
    pub fn attach_vcpu(&self, vcpu_fd: &impl AsRawFd) -> Result<VcpuRing, AttachError> {
        if !self.is_kvm() {
            return Err(AttachError::NotKvm);
        }
        let memory = match self.mode() {
            Mode::Rings => mmap::map_ring(vcpu_fd, self.ring_entries()).map(Some),
            Mode::Bitmap => mmap::empty_ring(vcpu_fd),
        };
        let memory = memory.map_err(AttachError::Map)?;
        self.attach_ring(memory.ok_or(AttachError::HasRing)?)
    }
}

/// The same for borrowed descriptors.
///
/// A type that implements [`AsRawFd`] alone, as those of kvm-ioctls do, promises nothing about its number. One that implements
/// [`AsFd`], as [`OwnedFd`](std::os::fd::OwnedFd) and [`File`](std::fs::File) do, has the descriptor open for as long as it is
/// borrowed, and the compiler checks that.
///
/// ```no_run
/// use kvm_dirty_ring::{DirtyLog, HostSupport, RingEntries};
/// use std::os::fd::OwnedFd;
///
/// /// All that a jailed process was given.
/// fn start(kvm: OwnedFd, vm: OwnedFd, vcpu: OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
///     let largest = HostSupport::query_fd(&kvm)?.max_entries;
///     let log = DirtyLog::enable_fd(&vm, RingEntries::new(largest.min(4096))?)?;
///     let ring = log.attach_vcpu_fd(&vcpu)?;
/// #   drop(ring);
///     Ok(())
/// }
/// ```
impl DirtyLog {
    /// As [`enable`](Self::enable).
    ///
    /// # Errors
    /// As [`enable`](Self::enable).
    pub fn enable_fd(vm: impl AsFd, entries: RingEntries) -> Result<Self, EnableError> {
        Self::enable(&vm.as_fd(), entries)
    }

    /// As [`enable_bitmap`](Self::enable_bitmap).
    ///
    /// # Errors
    /// As [`enable_bitmap`](Self::enable_bitmap).
    pub fn enable_bitmap_fd(vm: impl AsFd) -> Result<Self, EnableError> {
        Self::enable_bitmap(&vm.as_fd())
    }

    /// As [`enable_auto`](Self::enable_auto).
    ///
    /// # Errors
    /// As [`enable_auto`](Self::enable_auto).
    pub fn enable_auto_fd(vm: impl AsFd, entries: RingEntries) -> Result<Self, EnableError> {
        Self::enable_auto(&vm.as_fd(), entries)
    }

    /// As [`attach_vcpu`](Self::attach_vcpu).
    ///
    /// # Errors
    /// As [`attach_vcpu`](Self::attach_vcpu).
    pub fn attach_vcpu_fd(&self, vcpu: impl AsFd) -> Result<VcpuRing, AttachError> {
        self.attach_vcpu(&vcpu.as_fd())
    }
}
