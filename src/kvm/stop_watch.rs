//! Finding out whether a thread was stopped during a call.

use core::mem::MaybeUninit;

/// Notices that the thread which made it has been stopped since: by SIGSTOP, a debugger, the freezer.
///
/// Whoever is stopped gives its CPU away of its own accord, in the kernel, on its way back from the
/// system call. So do others that wait there, for a lock: a thread that has not slept was not stopped,
/// but one that has need not have been.
pub(crate) struct StopWatch {
    sleeps: Option<libc::c_long>,
}

impl StopWatch {
    pub(crate) fn start() -> Self {
        Self { sleeps: sleeps() }
    }

    /// Whether it may have been stopped: also where that cannot be known.
    pub(crate) fn may_have_stopped(&self) -> bool {
        self.sleeps.is_none() || self.sleeps != sleeps()
    }
}

/// How often the calling thread has slept so far; none if a seccomp filter keeps that to itself.
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
