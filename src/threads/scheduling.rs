// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the crate's own threads are scheduled.

use std::io;

use crate::error::{LimiterError, ReaperError};
use crate::kvm::signals::block_for_good;
use crate::sync::Arc;

/// The scheduling of a thread of the crate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Priority {
    /// As the thread that starts it.
    #[default]
    Inherited,
    /// A nice value, from -20 (first) to 19. Below 0 it needs `CAP_SYS_NICE` or `RLIMIT_NICE`.
    Nice(i8),
    /// `SCHED_FIFO` with a priority from 1 to 99: ahead of every thread that is not real-time. It needs `CAP_SYS_NICE` or
    /// `RLIMIT_RTPRIO`. It makes wake-ups timely where vCPUs keep every core busy.
    Fifo(u8),
}

/// Prepares the calling thread: blocks signals, removes timer slack, and applies `cpus` and `priority`.
pub(crate) fn prepare(cpus: &[usize], priority: Priority) -> Result<(), Refused> {
    // Each reset blocks them anyway, and fails if it cannot.
    block_for_good().map_err(failed("pthread_sigmask"))?;
    // Where a filter forbids it, wake-ups are late by another 50 us, and the policy sees it.
    // SAFETY: PR_SET_TIMERSLACK takes one integer: nanoseconds, of which 0 would mean the default.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
    if !cpus.is_empty() {
        pin(cpus)?;
    }
    match priority {
        Priority::Inherited => Ok(()),
        Priority::Nice(nice) => {
            // SAFETY: takes integers only; on Linux, 0 names the calling thread.
            let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice.into()) };
            check("setpriority", result)
        }
        Priority::Fifo(priority) => {
            // The kernel's `sched_param`: musl's has more fields. Its function `sched_setscheduler` always fails, too.
            let parameters = libc::c_int::from(priority);
            // SAFETY: 0 is the calling thread; the call reads one integer, which lives.
            let result = unsafe {
                let call = libc::SYS_sched_setscheduler;
                libc::syscall(call, 0, libc::SCHED_FIFO, &raw const parameters)
            };
            check("sched_setscheduler(SCHED_FIFO)", result as libc::c_int)
        }
    }
}

fn pin(cpus: &[usize]) -> Result<(), Refused> {
    const CALL: &str = "sched_setaffinity";
    // SAFETY: a set of bits, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { core::mem::zeroed() };
    for &cpu in cpus {
        if cpu >= libc::CPU_SETSIZE as usize {
            let error = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(failed(CALL)(error));
        }
        // SAFETY: the set is ours, and has a bit for this CPU.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: 0 is the calling thread; the call reads a set of the size that is passed.
    check(CALL, unsafe {
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    })
}

fn check(call: &'static str, result: libc::c_int) -> Result<(), Refused> {
    match result {
        -1 => Err(failed(call)(io::Error::last_os_error())),
        _ => Ok(()),
    }
}

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> Refused {
    move |error| Refused {
        call,
        source: Arc::new(error),
    }
}

/// A request that the operating system refused.
pub(crate) struct Refused {
    call: &'static str,
    source: Arc<io::Error>,
}

impl From<Refused> for ReaperError {
    fn from(Refused { call, source }: Refused) -> Self {
        Self::Scheduling { call, source }
    }
}

impl From<Refused> for LimiterError {
    fn from(Refused { call, source }: Refused) -> Self {
        Self::Scheduling { call, source }
    }
}
