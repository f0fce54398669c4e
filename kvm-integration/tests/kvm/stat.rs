// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What KVM counts.

use std::fs::File;
use std::io::{self, Read};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::{kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VmFd;

const GET_STATS_FD: u64 = 0xaece;

/// The number by this name of a virtual machine's statistics; `None` if the kernel has no such number, or no
/// statistics at all (before Linux 5.14).
pub fn vm_stat(vm: &VmFd, name: &str) -> io::Result<Option<u64>> {
    // SAFETY: the ioctl takes no argument.
    let fd = unsafe { libc::ioctl(vm.as_raw_fd(), GET_STATS_FD as _) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        let is_unknown = error.raw_os_error() == Some(libc::ENOTTY);
        return if is_unknown { Ok(None) } else { Err(error) };
    }
    let mut bytes = Vec::new();
    // SAFETY: a new descriptor that nothing else owns.
    unsafe { File::from_raw_fd(fd) }.read_to_end(&mut bytes)?;
    Ok(number(&bytes, name))
}

/// A header; its descriptors, each followed by a name; and the numbers, of 64 bits.
fn number(bytes: &[u8], name: &str) -> Option<u64> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let field = |at| word(at).map(|value| value as usize);
    let name_size = field(offset_of!(kvm_stats_header, name_size))?;
    let count = field(offset_of!(kvm_stats_header, num_desc))?;
    let descriptors = field(offset_of!(kvm_stats_header, desc_offset))?;
    let data = field(offset_of!(kvm_stats_header, data_offset))?;
    let size = size_of::<kvm_stats_desc>() + name_size;
    let has_name = |&at: &usize| {
        let found = bytes.get(at + size_of::<kvm_stats_desc>()..at + size);
        let found = found.and_then(|found| found.split(|&byte| byte == 0).next());
        found == Some(name.as_bytes())
    };
    let at = (0..count).map(|n| descriptors + n * size).find(has_name)?;
    let at = data + field(at + offset_of!(kvm_stats_desc, offset))?;
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
