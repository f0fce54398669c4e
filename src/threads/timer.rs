// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A timer that an event loop waits for by its descriptor.

use core::ptr;
use core::time::Duration;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

/// No policy looks as seldom.
const LONGEST: Duration = Duration::from_secs(3600);

/// A timerfd of the monotonic clock, by which `Instant` goes too.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    /// One that is not armed.
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: takes integers only.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        match fd {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: the call has just opened it, and nobody else has it.
            fd => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
        }
    }

    /// Has the descriptor become readable at `at`, or at once where that has passed. Until then it is not, whatever it was
    /// before: to arm a timer anew takes back its expirations (`timerfd_setup` in the kernel's fs/timerfd.c).
    pub(super) fn arm(&self, at: Instant) -> io::Result<()> {
        let wait = at.saturating_duration_since(Instant::now());
        // 0 would disarm it.
        let wait = wait.clamp(Duration::from_nanos(1), LONGEST);
        let once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let spec = libc::itimerspec {
            it_interval: once,
            it_value: libc::timespec {
                tv_sec: wait.as_secs() as _,
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        // SAFETY: the descriptor is ours; the call reads one struct, which lives, and writes none.
        match unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &spec, ptr::null_mut()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
