// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting for an event reaper as an event loop does.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_dirty_ring::EventReaper;

/// Whether the descriptor becomes readable in that time.
pub fn is_readable(reaper: &EventReaper, within: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: reaper.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, which lives.
    let found = unsafe { libc::poll(&mut poll, 1, within.as_millis() as libc::c_int) };
    assert!(found >= 0, "poll: {}", io::Error::last_os_error());
    found == 1
}
