//! Resets that the kernel refuses: by a filter of system calls, on a thread of its own.

use std::thread::{self, Builder};

use kvm_dirty_ring::DirtyLog;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

use super::error::ChaosError;
use super::helpers::nap;

/// The ioctl `KVM_RESET_DIRTY_RINGS`.
const RESET_DIRTY_RINGS: u64 = 0xaec7;

/// A pass over empty rings makes no ioctl. Passes until one does, at the most.
const MOST_PASSES: u32 = 100;

/// Makes passes until the reset of one is refused, with error number `error`. Passes that it was to
/// serve too fail with it.
pub(super) fn refuse_a_reset(log: &DirtyLog, error: i32) -> Result<(), ChaosError> {
    // No filter can be taken off again: it ends with its thread.
    let passes = move || -> Result<(), Error> {
        apply_filter(&filter(error)?)?;
        for _ in 0..MOST_PASSES {
            if log.reap().is_err() {
                break;
            }
            nap(100);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let thread = Builder::new().name("chaos-refused".into());
        let thread = thread.spawn_scoped(scope, passes);
        let thread = thread.map_err(ChaosError::Spawn)?;
        Ok(thread.join().map_err(|_| ChaosError::Panicked)??)
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
