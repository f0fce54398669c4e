// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a vCPU is made to leave `KVM_RUN`: a flag that keeps it from entering, and a signal that
//! throws it out.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use memmap2::{MmapOptions, MmapRaw};
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

/// `kvm_run.immediate_exit` of one vCPU: while it is set, `KVM_RUN` returns EINTR at once.
///
/// This is a second mapping of the run page. So any thread may write the flag while the vCPU's own
/// thread holds the reference to the first mapping that kvm-ioctls makes of it.
#[derive(Debug)]
pub struct ImmediateExit(MmapRaw);

impl ImmediateExit {
    /// Maps the run page of a vCPU, as far as the flag.
    pub fn map(vcpu: &impl AsRawFd) -> io::Result<Self> {
        MmapOptions::new()
            .len(size_of::<kvm_run>())
            .map_raw(vcpu.as_raw_fd())
            .map(Self)
    }

    /// Sets or clears the flag. Set it before the signal is sent; clear it on the vCPU's thread,
    /// under the lock by which that thread learns what is wanted of it.
    ///
    /// That lock orders this with the thread that asked; the kernel reads the flag once on its way in, so
    /// Relaxed is enough.
    pub fn set(&self, closed: bool) {
        // SAFETY: map() mapped all of kvm_run, and the mapping lives as long as `self`. One byte
        // is always aligned. All of this process's accesses through this mapping are atomic.
        let flag = unsafe {
            AtomicU8::from_ptr(self.0.as_mut_ptr().add(offset_of!(kvm_run, immediate_exit)))
        };
        flag.store(u8::from(closed), Ordering::Relaxed);
    }
}

/// The signal that throws a vCPU out of `KVM_RUN`. Its handler does nothing.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Has the calling thread interrupted by it, whatever mask the thread was born with, and nothing else:
/// its handler does nothing, and without `SA_RESTART` interrupting is all that it is for.
pub fn let_through() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), nothing)?;
    unblock_signal(kick_signal()).map_err(|error| io::Error::other(error.to_string()))
}
