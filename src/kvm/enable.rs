// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's support for dirty rings, and how they are enabled.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_dirty_gfn, kvm_dirty_log,
};

use super::bitmap::Bitmaps;
use super::{initially_set, ioctl};
use crate::error::{EnableError, HostError, RingSizeError};
use crate::kernel::page_size;

/// Entries of the largest ring of any kernel: `KVM_DIRTY_RING_MAX_ENTRIES` in the kernel's
/// include/linux/kvm_dirty_ring.h.
const MAX_ENTRIES: u32 = 65536;

/// Entries of the smallest ring that holds the kernel's reserve of 576 with page-modification logging.
const MIN_ENTRIES_WITH_PML: u32 = 1024;

/// The size of a ring in entries: a power of two, from one host page (256 entries of 16 bytes in 4 KiB) to 65,536 entries.
///
/// A ring of 4,096 entries holds 16 MiB of dirtied pages, and takes 64 KiB per vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RingEntries(u32);

impl RingEntries {
    /// Creates a size of `entries` entries. The host may allow less.
    ///
    /// # Errors
    /// The number is not a power of two, too small, or too large.
    pub fn new(entries: u32) -> Result<Self, RingSizeError> {
        if !entries.is_power_of_two() {
            return Err(RingSizeError::NotPowerOfTwo { entries });
        }
        let min = (page_size() / size_of::<kvm_dirty_gfn>()) as u32;
        if entries < min {
            return Err(RingSizeError::TooSmall { entries, min });
        }
        let max = MAX_ENTRIES;
        if entries > max {
            return Err(RingSizeError::TooLarge { entries, max });
        }
        Ok(Self(entries))
    }

    /// Returns the number of entries.
    pub fn get(self) -> u32 {
        self.0
    }

    fn bytes(self) -> u64 {
        u64::from(self.0) * size_of::<kvm_dirty_gfn>() as u64
    }
}

/// The dirty rings that the host's KVM offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostSupport {
    /// The largest ring, in entries.
    pub max_entries: u32,
    /// Whether they are offered as `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`, or only in the older form, which works on x86 only.
    pub acq_rel: bool,
    /// Whether bitmaps beside the rings hold what is written without a vCPU (`KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`): on arm64, since
    /// Linux 6.2.
    pub with_bitmap: bool,
    /// Whether KVM has the processor log writes (page-modification logging), so that bitmap mode costs a guest less than rings.
    /// It is read from `/sys/module/kvm_intel/parameters/pml`, or `kvm_amd`; `false` where a jail hides these files.
    pub pml: bool,
}

impl HostSupport {
    /// Opens `/dev/kvm` and queries its support. No VM is needed.
    ///
    /// # Errors
    /// The reason why the host has no usable dirty rings.
    pub fn query() -> Result<Self, HostError> {
        let kvm = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        let kvm = kvm.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => HostError::NoKvm(error),
            Some(libc::EACCES | libc::EPERM) => HostError::NoPermission(error),
            _ => HostError::Kvm {
                call: "opening /dev/kvm",
                source: error,
            },
        })?;
        Self::query_fd(&kvm)
    }

    /// As [`query`](Self::query), of a `/dev/kvm` that is open already: in a jail that has no such file, and is given a
    /// descriptor.
    ///
    /// # Errors
    /// Why dirty rings cannot be had here; [`HostError::Kvm`] with `KVM_GET_API_VERSION` if the descriptor is none of
    /// `/dev/kvm`.
    pub fn query_fd(kvm: impl AsFd) -> Result<Self, HostError> {
        let kvm = kvm.as_fd();
        let failed = |call| move |source| HostError::Kvm { call, source };
        let version = ioctl::value(&kvm, ioctl::GET_API_VERSION, 0);
        let version = version.map_err(failed("KVM_GET_API_VERSION"))?;
        if version != KVM_API_VERSION {
            let found = version as i32;
            return Err(HostError::ApiVersion { found });
        }
        let found = Self::of(&kvm).map_err(failed("KVM_CHECK_EXTENSION"))?;
        found
            .map(|(support, _)| support)
            .ok_or(HostError::NoDirtyRing)
    }

    /// Returns what the KVM or VM behind `fd` offers, and the capability.
    fn of(fd: &impl AsRawFd) -> io::Result<Option<(Self, u32)>> {
        let entries = |cap: u32| {
            let bytes = ioctl::value(fd, ioctl::CHECK_EXTENSION, cap.into())?;
            Ok::<_, io::Error>(bytes / size_of::<kvm_dirty_gfn>() as u32)
        };
        let with_bitmap = KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP;
        let with_bitmap = ioctl::value(fd, ioctl::CHECK_EXTENSION, with_bitmap.into())? > 0;
        let found = |max_entries, acq_rel, cap| {
            let support = Self {
                max_entries,
                acq_rel,
                with_bitmap,
                pml: has_pml(),
            };
            Ok(Some((support, cap)))
        };
        let cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
        let max = entries(cap)?;
        if max > 0 {
            return found(max, true, cap);
        }
        // This form does not promise the orderings; total store order has them anyway.
        if cfg!(target_arch = "x86_64") {
            let cap = KVM_CAP_DIRTY_LOG_RING;
            let max = entries(cap)?;
            if max > 0 {
                return found(max, false, cap);
            }
        }
        Ok(None)
    }
}

/// Enables rings of `entries` on the VM behind `fd`, or returns the reason for the refusal. Returns the bitmaps beside them, if
/// there are any.
pub(super) fn enable(
    fd: &impl AsRawFd,
    entries: RingEntries,
) -> Result<Option<Bitmaps>, EnableError> {
    let (support, cap) = of_vm(fd)?.ok_or(EnableError::NoDirtyRing)?;
    fits(entries.get(), &support)?;
    if is_enabled(fd, support.with_bitmap)? {
        return Err(EnableError::AlreadyEnabled);
    }
    if initially_set::is_on(fd)? {
        return Err(EnableError::InitiallySet);
    }
    let refused = refusal(entries.get(), &support);
    enable_cap(fd, cap, entries.bytes(), refused)?;
    if !support.with_bitmap {
        return Ok(None);
    }
    // `kvm_vm_ioctl_enable_cap_generic` returns EINVAL without rings, and once a memslot exists.
    let cap = KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP;
    enable_cap(fd, cap, 0, EnableError::SlotExists)?;
    bitmaps(fd).map(Some)
}

/// The reason why KVM refuses rings of `entries` with EINVAL. `kvm_vm_ioctl_enable_dirty_log_ring` does so for a second time, once
/// a vCPU exists, and where the ring is smaller than the reserve. KVM does not report the size of the reserve: rings smaller
/// than the known ones are refused earlier, but a later kernel may keep more.
fn refusal(entries: u32, support: &HostSupport) -> EnableError {
    if support.with_bitmap {
        // Where rings have bitmaps beside them, `is_enabled` cannot detect them once there is a memslot.
        return EnableError::TooLate;
    }
    match entries < support.max_entries {
        true => EnableError::VcpuOrReserve { entries },
        false => EnableError::VcpuExists,
    }
}

/// Returns the bitmaps of the VM behind `fd`, if it has no rings.
pub(super) fn enable_bitmap(fd: &impl AsRawFd) -> Result<Bitmaps, EnableError> {
    let with_bitmap = of_vm(fd)?.is_some_and(|(support, _)| support.with_bitmap);
    if is_enabled(fd, with_bitmap)? {
        return Err(EnableError::AlreadyEnabled);
    }
    bitmaps(fd)
}

/// Returns what the VM behind `fd` offers, if it is a VM.
fn of_vm(fd: &impl AsRawFd) -> Result<Option<(HostSupport, u32)>, EnableError> {
    let found = HostSupport::of(fd).map_err(|error| match error.raw_os_error() {
        // A vCPU returns EINVAL.
        Some(libc::ENOTTY | libc::EBADF | libc::EINVAL) => EnableError::NotAVm,
        _ => ioctl::failed("KVM_CHECK_EXTENSION")(error),
    })?;
    // /dev/kvm answers both, a VM only the former.
    match ioctl::value(fd, ioctl::GET_API_VERSION, 0) {
        Ok(_) => Err(EnableError::NotAVm),
        Err(_) => Ok(found),
    }
}

/// Enables clearing by a call of its own, where KVM can. KVM thereby forgets the VMM's `INITIALLY_SET`, with which new slots begin
/// dirty and unprotected. Slots that have begun so have all bits set, so nothing is lost.
fn bitmaps(fd: &impl AsRawFd) -> Result<Bitmaps, EnableError> {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let offered = ioctl::value(fd, ioctl::CHECK_EXTENSION, cap.into());
    let offered = offered.map_err(ioctl::failed("KVM_CHECK_EXTENSION"))?;
    let manual = offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
    if manual {
        let call = "KVM_ENABLE_CAP";
        let source = io::Error::from_raw_os_error(libc::EINVAL);
        let enable = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
        enable_cap(fd, cap, enable, EnableError::Kvm { call, source })?;
    }
    Ok(Bitmaps::new(manual))
}

/// Enables a capability that takes one number. EINVAL means `invalid`.
fn enable_cap(
    fd: &impl AsRawFd,
    cap: u32,
    argument: u64,
    invalid: EnableError,
) -> Result<(), EnableError> {
    ioctl::enable_cap(fd, cap, argument).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => invalid,
        _ => ioctl::failed("KVM_ENABLE_CAP")(error),
    })
}

/// Checks that the host takes rings of that size.
fn fits(entries: u32, host: &HostSupport) -> Result<(), RingSizeError> {
    let max = host.max_entries;
    if entries > max {
        return Err(RingSizeError::TooLarge { entries, max });
    }
    let min = MIN_ENTRIES_WITH_PML;
    if entries < min && host.pml {
        return Err(RingSizeError::TooSmall { entries, min });
    }
    Ok(())
}

/// Returns whether KVM logs through a page-modification buffer of the processor: Intel's, or AMD's, which has as many entries.
pub(super) fn has_pml() -> bool {
    is_on_in(Path::new("/sys/module"))
}

/// Reads the parameter `pml` of KVM's module for this processor, below `modules`.
fn is_on_in(modules: &Path) -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| {
        let parameter = fs::read_to_string(modules.join(module).join("parameters/pml"));
        parameter.is_ok_and(|value| value.starts_with(['Y', '1']))
    })
}

/// Returns whether the VM behind `fd` has its rings already. If so, it has no bitmaps, and `kvm_get_dirty_log` returns that before
/// it looks for the slot. A reset would show it, too, but take entries from the rings' user.
///
/// Where a VM can have both, KVM accepts the capability for bitmaps beside rings only, repeatedly without harm, and only while
/// there is no memslot. After that a VM with both looks like one with bitmaps only, until a vCPU is attached, which shows
/// its ring.
fn is_enabled(fd: &impl AsRawFd, with_bitmap: bool) -> Result<bool, EnableError> {
    if with_bitmap {
        let cap = KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP;
        match enable_cap(fd, cap, 0, EnableError::SlotExists) {
            Ok(()) => return Ok(true),
            Err(EnableError::SlotExists) => {}
            Err(error) => return Err(error),
        }
    }
    let mut log = kvm_dirty_log {
        slot: u32::MAX,
        ..Default::default()
    };
    // SAFETY: KVM_GET_DIRTY_LOG takes such a request; there is no such slot, so nothing is written.
    let asked = unsafe { ioctl::pointer(fd, ioctl::GET_DIRTY_LOG, &mut log) };
    let call = "KVM_GET_DIRTY_LOG";
    match asked {
        Ok(_) => Ok(false),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENXIO) => Ok(true),
            Some(libc::EINVAL | libc::ENOENT) => Ok(false),
            Some(libc::ENOTTY) => Err(EnableError::NotAVm),
            _ => Err(EnableError::Kvm {
                call,
                source: error,
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KVM returns the same error for an existing vCPU and for a ring that does not hold its reserve.
    #[test]
    fn a_reserve_that_nobody_knows_is_among_the_reasons() {
        let support = |with_bitmap| HostSupport {
            max_entries: 65_536,
            acq_rel: true,
            with_bitmap,
            pml: false,
        };
        let refused = refusal(1024, &support(false));
        assert!(matches!(
            refused,
            EnableError::VcpuOrReserve { entries: 1024 }
        ));
        let told = refused.to_string();
        assert!(told.contains("vCPU") && told.contains("reserve") && told.contains("larger"));
        // No kernel keeps its largest ring in reserve.
        let refused = refusal(65_536, &support(false));
        assert!(matches!(refused, EnableError::VcpuExists));
        let refused = refusal(1024, &support(true));
        assert!(matches!(refused, EnableError::TooLate) && refused.to_string().contains("reserve"));
    }

    #[test]
    fn sizes_are_refused_with_what_is_allowed() {
        let min = (page_size() / 16) as u32;
        assert_eq!(RingEntries::new(4096).map(RingEntries::get), Ok(4096));
        for entries in [0, 3, 4095, 65535] {
            let expected = RingSizeError::NotPowerOfTwo { entries };
            assert_eq!(RingEntries::new(entries), Err(expected));
        }
        let entries = min / 2;
        let expected = RingSizeError::TooSmall { entries, min };
        assert_eq!(RingEntries::new(entries), Err(expected));
        let (entries, max) = (131_072, 65_536);
        let expected = RingSizeError::TooLarge { entries, max };
        assert_eq!(RingEntries::new(entries), Err(expected));
    }

    #[test]
    fn a_parameter_of_either_module_shows_the_buffer() {
        let root = std::env::temp_dir().join(format!("kvm-dirty-ring-pml-{}", std::process::id()));
        assert!(!is_on_in(&root), "no module at all");
        for module in ["kvm_intel", "kvm_amd"] {
            let parameters = root.join(module).join("parameters");
            fs::create_dir_all(&parameters).unwrap();
            assert!(!is_on_in(&root), "{module} without the parameter");
            for (value, is_on) in [("Y\n", true), ("N\n", false), ("1\n", true), ("0\n", false)] {
                fs::write(parameters.join("pml"), value).unwrap();
                assert_eq!(is_on_in(&root), is_on, "{module}: {value}");
            }
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
