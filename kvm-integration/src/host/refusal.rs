// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Resets that the kernel refuses: by a filter of system calls, on a thread of its own.

use std::io;
use std::thread::{self, Builder};

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

/// The ioctl `KVM_RESET_DIRTY_RINGS`.
const RESET_DIRTY_RINGS: u64 = 0xaec7;

/// Calls `passes` where every reset that it makes is refused, with error number `error`. Passes of
/// others that such a reset was to serve fail with it.
///
/// # Errors
/// The thread or the filter could not be had, or `passes` panicked.
pub fn refusing<T: Send>(error: i32, passes: impl FnOnce() -> T + Send) -> io::Result<T> {
    // No filter can be taken off again: it ends with its thread.
    let confined = move || -> Result<T, Error> {
        apply_filter(&filter(error)?)?;
        Ok(passes())
    };
    thread::scope(|scope| {
        let thread = Builder::new().name("refused".into());
        let thread = thread.spawn_scoped(scope, confined)?;
        let result = thread.join().map_err(|_| io::Error::other("it panicked"))?;
        result.map_err(io::Error::other)
    })
}

/// Lets everything through but resets.
fn filter(error: i32) -> Result<BpfProgram, Error> {
    let dword = SeccompCmpArgLen::Dword;
    let is_reset = SeccompCondition::new(1, dword, SeccompCmpOp::Eq, RESET_DIRTY_RINGS)?;
    let rule = SeccompRule::new(vec![is_reset])?;
    let rules = [(libc::SYS_ioctl, vec![rule])];
    let refuse = SeccompAction::Errno(error as u32);
    let here = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules.into(), SeccompAction::Allow, refuse, here)?;
    Ok(filter.try_into()?)
}
