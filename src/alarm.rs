//! How a vCPU with a full ring, or the owner, wakes the reaper.

use core::time::Duration;

use crate::sync::{Condvar, Mutex, PoisonError, lock};

/// Rung any number of times, heard once.
#[derive(Default)]
pub(crate) struct Alarm {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Alarm {
    /// Wakes whoever waits, or the next who would.
    pub(crate) fn ring(&self) {
        let mut rung = lock(&self.rung);
        // A storm of full exits wakes the reaper once.
        if !core::mem::replace(&mut *rung, true) {
            self.bell.notify_all();
        }
    }

    /// Waits for the alarm, at most for `limit`.
    #[cfg_attr(
        all(test, feature = "loom"),
        expect(dead_code, reason = "loom has no time")
    )]
    pub(crate) fn wait(&self, limit: Duration) {
        let mut rung = lock(&self.rung);
        if !*rung {
            // A spurious wake-up is an early look, no more.
            (rung, _) = self
                .bell
                .wait_timeout(rung, limit)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *rung = false;
    }
}
