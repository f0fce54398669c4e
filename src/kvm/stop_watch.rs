// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Detecting whether a thread was stopped during a call.

use core::mem::MaybeUninit;

/// Detects whether the thread that made it has been stopped since: by SIGSTOP, a debugger, or the freezer.
///
/// A stopped thread gives its CPU away by itself, in the kernel, on its way back from the system call. So does a thread that waits
/// for a lock there. A thread that has not slept was not stopped; one that has slept may have been.
pub(crate) struct StopWatch {
    sleeps: Option<libc::c_long>,
}

impl StopWatch {
    pub(crate) fn start() -> Self {
        Self { sleeps: sleeps() }
    }

    /// Returns whether the thread may have been stopped; true if that is unknown.
    pub(crate) fn may_have_stopped(&self) -> bool {
        self.sleeps.is_none() || self.sleeps != sleeps()
    }
}

/// Returns how often the calling thread has slept so far; `None` if a seccomp filter forbids the call.
fn sleeps() -> Option<libc::c_long> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the call writes one `rusage` to where the pointer says, all of it if it succeeds.
    unsafe {
        match libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) {
            0 => Some(usage.assume_init().ru_nvcsw),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sleeps_may_have_been_stopped() {
        let watch = StopWatch::start();
        std::thread::sleep(core::time::Duration::from_millis(1));
        assert!(watch.may_have_stopped());
        // It may be preempted, which is something else, or wait for the memory that others change.
        assert!((0..100).any(|_| {
            let watch = StopWatch::start();
            core::hint::black_box((0..1000).sum::<u64>());
            !watch.may_have_stopped()
        }));
    }
}
