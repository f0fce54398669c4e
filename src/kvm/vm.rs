// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A KVM virtual machine as a [`Kernel`]: the reset ioctl, with all that it needs around it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::kvm_dirty_log;

use super::bitmap::{self, Bitmaps};
use super::enable::{self, RingEntries};
use super::signals::SignalsBlocked;
use super::stop_watch::StopWatch;
use super::{initially_set, ioctl};
use crate::error::EnableError;
use crate::kernel::{Kernel, Mode, RESERVED_ENTRIES, Recycled};
use crate::slot_id::SlotId;

/// Entries that a kernel with page-modification logging (Intel's; AMD's since 2026) keeps in reserve: 64, and
/// 512 for the processor's buffer (`kvm_cpu_dirty_log_size` in the kernel's arch/x86/kvm).
const RESERVED_WITH_PML: u32 = 64 + 512;

/// A KVM virtual machine with its dirty log enabled.
pub(crate) struct Vm {
    fd: OwnedFd,
    mode: Mode,
    /// In bitmap mode the only log; beside rings, where there are both.
    bitmaps: Option<Bitmaps>,
    /// Whether this KVM has `KVM_DIRTY_LOG_INITIALLY_SET`, which loses pages beside rings. In bitmap mode always false.
    has_initially_set: bool,
}

impl Kernel for Vm {
    fn reset(&self) -> io::Result<Recycled> {
        if self.mode == Mode::Bitmap {
            return Ok(Recycled::default());
        }
        // With a signal pending, `kvm_dirty_ring_reset` stops half-way, and pages that it has recycled but not protected are never
        // logged again.
        let _blocked = SignalsBlocked::new()?;
        self.wait_for_slots_lock();
        let watch = StopWatch::start();
        let entries = ioctl::value(&self.fd, ioctl::RESET_DIRTY_RINGS, 0)?;
        Ok(Recycled {
            entries,
            interrupted: watch.may_have_stopped(),
        })
    }

    fn reserved_entries(&self) -> u32 {
        match self.mode {
            Mode::Bitmap => 0,
            Mode::Rings if enable::has_pml() => RESERVED_WITH_PML,
            Mode::Rings => RESERVED_ENTRIES,
        }
    }

    fn switch_initially_set_off(&self) -> io::Result<()> {
        match self.has_initially_set {
            true => initially_set::switch_off(&self.fd),
            false => Ok(()),
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

    fn read_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        match &self.bitmaps {
            Some(bitmaps) => bitmaps.read(&self.fd, slot, words),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn clear_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        bitmap::clear(&self.fd, slot, pages, words)
    }
}

impl Vm {
    /// Waits until no thread changes the VM's memslots. The reset would have to wait otherwise, and a thread that slept in a reset looks
    /// like one that was stopped at its end. Another change may begin before the reset does; that is rare.
    fn wait_for_slots_lock(&self) {
        let mut none = kvm_dirty_log {
            slot: u32::MAX,
            ..Default::default()
        };
        // SAFETY: `kvm_get_dirty_log_protect` takes such a request, and refuses it, once it has had the lock: there is no slot of
        // that number in any VM, and with rings alone no bitmap. So it writes nowhere.
        let refused = unsafe { ioctl::pointer(&self.fd, ioctl::GET_DIRTY_LOG, &mut none) };
        debug_assert!(refused.is_err());
    }

    /// Enables dirty rings of `entries` entries, see [`DirtyLog::enable`](crate::DirtyLog::enable).
    pub(crate) fn with_rings(
        vm_fd: &impl AsRawFd,
        entries: RingEntries,
    ) -> Result<Self, EnableError> {
        let fd = duplicate(vm_fd)?;
        Ok(Self {
            bitmaps: enable::enable(&fd, entries)?,
            mode: Mode::Rings,
            has_initially_set: initially_set::exists(&fd)?,
            fd,
        })
    }

    /// Enables bitmaps only, see [`DirtyLog::enable_bitmap`](crate::DirtyLog::enable_bitmap).
    pub(crate) fn with_bitmaps(vm_fd: &impl AsRawFd) -> Result<Self, EnableError> {
        let fd = duplicate(vm_fd)?;
        Ok(Self {
            bitmaps: Some(enable::enable_bitmap(&fd)?),
            mode: Mode::Bitmap,
            has_initially_set: false,
            fd,
        })
    }
}

/// Returns a descriptor of our own for the VM behind `vm_fd`.
fn duplicate(vm_fd: &impl AsRawFd) -> Result<OwnedFd, EnableError> {
    let call = "duplicating the VM's file descriptor";
    let failed = |source| EnableError::Kvm { call, source };
    let number = vm_fd.as_raw_fd();
    if number < 0 {
        // No descriptor, and no value of `BorrowedFd`.
        return Err(failed(io::Error::from_raw_os_error(libc::EBADF)));
    }
    // SAFETY: the caller's object keeps the descriptor open while we borrow it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned().map_err(failed)
}
