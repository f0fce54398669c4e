// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A system call that is held until something else has happened, so that a race happens each time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{
    SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_RET_TRAP, SECCOMP_RET_USER_NOTIF, SECCOMP_SET_MODE_FILTER,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE, seccomp_notif, seccomp_notif_resp, sock_fprog,
};
use libtest_mimic::Failed;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::machine::patience;

/// The calls that a thread is held in. When it is dropped, held calls fail with `ENOSYS`.
pub struct HeldCalls(OwnedFd);

/// A thread that waits in a call. It goes on, and makes the call, when this is dropped.
pub struct Held<'a> {
    calls: &'a HeldCalls,
    id: u64,
}

impl HeldCalls {
    /// From now on, and for good, holds each `ioctl` of this thread by that request.
    pub fn of_this_thread(request: u32) -> Result<Self, Failed> {
        let mut program = filter(request)?;
        // A request for a trap stands for the action that the compiler of filters does not have.
        for instruction in &mut program {
            if instruction.k == SECCOMP_RET_TRAP {
                instruction.k = SECCOMP_RET_USER_NOTIF;
            }
        }
        let program = sock_fprog {
            len: program.len().try_into()?,
            filter: program.as_mut_ptr().cast(),
        };
        // SAFETY: takes no pointer, and keeps this thread from gaining privileges by an exec.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: reads a program of as many instructions as it says, of the kernel's layout, and copies it.
        let fd = unsafe {
            let flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
            libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program)
        };
        match fd {
            // SAFETY: a new descriptor that nothing else owns.
            0.. => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) })),
            _ => Err(io::Error::last_os_error().into()),
        }
    }

    /// Waits until the thread makes such a call, and holds it there.
    pub fn wait(&self) -> Result<Held<'_>, Failed> {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let patience = patience();
        // SAFETY: one such request, which is ours.
        match unsafe { libc::poll(&mut poll, 1, patience.as_millis() as i32) } {
            1 if poll.revents & libc::POLLIN != 0 => {}
            0 => return Err(format!("{patience:?} went by without the call").into()),
            _ => return Err("the thread ended without the call".into()),
        }
        // SAFETY: for the kernel, which wants zeroes, all of them are right.
        let mut call: seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes such a request, which is ours.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV, &mut call) } {
            0 => Ok(Held {
                calls: self,
                id: call.id,
            }),
            _ => Err(io::Error::last_os_error().into()),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut answer = seccomp_notif_resp {
            id: self.id,
            val: 0,
            error: 0,
            flags: SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        let listener = self.calls.0.as_raw_fd();
        // SAFETY: the kernel reads such an answer. If it fails, the thread is gone, and there is nothing to answer.
        unsafe { libc::ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &mut answer) };
    }
}

/// A filter that traps `ioctl`s by that request.
fn filter(request: u32) -> Result<BpfProgram, Failed> {
    let condition = SeccompCondition::new(1, Dword, SeccompCmpOp::Eq, request.into())?;
    let rules = BTreeMap::from([(libc::SYS_ioctl, vec![SeccompRule::new(vec![condition])?])]);
    let (others, these) = (SeccompAction::Allow, SeccompAction::Trap);
    let filter = SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}
