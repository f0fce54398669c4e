//! Enabling the log of a KVM virtual machine, and mapping the rings of its vCPUs.

use std::os::fd::AsRawFd;

use super::DirtyLog;
use super::vcpu_ring::VcpuRing;
use crate::error::{AttachError, EnableError};
use crate::kernel::Mode;
use crate::kvm::enable::RingEntries;
use crate::kvm::mmap;
use crate::kvm::vm::Vm;

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
    /// A VM whose `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is on with `INITIALLY_SET` is refused. Don't switch that on
    /// *later*, either: slots that are made or begin to be logged from then on lose their first writes, and nothing
    /// shows it. KVM does not tell what was enabled, and with rings it has no bitmap by which a slot would, so no later
    /// call of this crate can notice. A VMM that can't vouch for all of its parts enables the capability once more
    /// without that flag (`args[0]` 0, or 1) before it makes slots and before it starts tracking.
    ///
    /// # Errors
    /// Each way in which KVM refuses it is a variant of its own; the VM is as it was, but for
    /// [`EnableError::SlotExists`].
    pub fn enable(vm_fd: &impl AsRawFd, entries: RingEntries) -> Result<Self, EnableError> {
        let vm = Vm::with_rings(vm_fd, entries)?;
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
    /// On arm64, a VM whose rings were enabled before its first memslot, by another log, has bitmaps beside them,
    /// and looks like one without rings: [`attach_vcpu`](Self::attach_vcpu) notices it, so attach each vCPU.
    /// The syncs of a log without attached vCPUs miss all that vCPUs write there.
    ///
    /// One log a VM, and no `KVM_GET_DIRTY_LOG` or `KVM_CLEAR_DIRTY_LOG` of the VMM beside it: who takes
    /// a bitmap takes it from the other, without a trace.
    ///
    /// # Errors
    /// Not a VM, one whose dirty rings are enabled, or a call failed; the VM is as it was.
    pub fn enable_bitmap(vm_fd: &impl AsRawFd) -> Result<Self, EnableError> {
        let vm = Vm::with_bitmaps(vm_fd)?;
        Ok(Self::over_kvm(Box::new(vm), mmap::EMPTY_RING_ENTRIES))
    }

    /// [`enable`](Self::enable), or [`enable_bitmap`](Self::enable_bitmap) where the kernel has no
    /// dirty rings for this architecture. [`mode`](Self::mode) returns which it was.
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
    /// same in both modes; and one that has a ring in KVM is noticed.
    ///
    /// The link of its descriptor in `/proc/self/fd` names the vCPU. In a jail without `/proc` one
    /// that comes again looks like another, and a second consumer of its ring would lose pages: attach
    /// each vCPU once there, and keep its `VcpuRing` while it is unplugged.
    ///
    /// # Errors
    /// The ring cannot be mapped; somebody has the vCPU's [`VcpuRing`]; the log reads bitmaps and the vCPU has a
    /// ring; or the log is not a KVM VM's.
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
