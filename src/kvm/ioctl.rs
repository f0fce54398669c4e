// SPDX-License-Identifier: Apache-2.0 OR MIT
//! KVM's ioctls: their numbers, from the kernel's include/uapi/linux/kvm.h, and the calls.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_enable_cap;

use crate::error::EnableError;

pub(super) const GET_API_VERSION: u64 = 0xae00;
pub(super) const CHECK_EXTENSION: u64 = 0xae03;
pub(super) const GET_DIRTY_LOG: u64 = 0x4010_ae42;
pub(super) const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
pub(super) const ENABLE_CAP: u64 = 0x4068_aea3;
pub(super) const CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
pub(super) const RESET_DIRTY_RINGS: u64 = 0xaec7;

/// Issues the ioctl `request`, which takes an integer or nothing.
pub(super) fn value(fd: &impl AsRawFd, request: u64, value: u64) -> io::Result<u32> {
    // SAFETY: called with requests whose argument the kernel takes as an integer.
    returned(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, value) })
}

/// Issues the ioctl `request`, which takes a pointer to a `T`.
///
/// # Safety
/// `request` must be one that takes a `T`, and every address in it must be good for what the
/// kernel does with it.
pub(super) unsafe fn pointer<T>(
    fd: &impl AsRawFd,
    request: u64,
    argument: &mut T,
) -> io::Result<u32> {
    // SAFETY: the pointer is good for the call; the rest is the caller's promise.
    returned(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, core::ptr::from_mut(argument)) })
}

/// Enables a capability that takes one number, which is no address.
pub(super) fn enable_cap(fd: &impl AsRawFd, cap: u32, argument: u64) -> io::Result<()> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = argument;
    // SAFETY: KVM_ENABLE_CAP takes a `kvm_enable_cap`; none of our capabilities takes an address.
    unsafe { pointer(fd, ENABLE_CAP, &mut request) }.map(drop)
}

/// Returns what turns the error of `call` into the reason why the log could not be enabled.
pub(super) fn failed(call: &'static str) -> impl FnOnce(io::Error) -> EnableError {
    move |source| EnableError::Kvm { call, source }
}

fn returned(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
