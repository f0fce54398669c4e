// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of a machine's vCPU.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ring::producer::Producer;

/// A vCPU's state. It has no handle to its machine, or neither would ever be freed.
pub(super) struct VcpuState {
    pub(super) ring: Producer,
    /// Held while the guest runs; a remote TLB flush waits for it.
    running: Mutex<Running>,
    /// The entries of the ring as they were pushed, for a kernel that resets by its own record.
    pushed: Option<Mutex<VecDeque<(u32, u64)>>>,
}

#[derive(Default)]
pub(super) struct Running {
    /// Pages logged by the hardware that have not reached the ring, or the bitmap.
    pub(super) buffer: Vec<(u32, u64)>,
    /// Payloads to push in place of the true ones.
    pub(super) garbage: VecDeque<(u32, u64)>,
    pub(super) ignores_limit: bool,
}

impl VcpuState {
    pub(super) fn new(ring: Producer, ignores_voids: bool) -> Self {
        Self {
            pushed: ignores_voids.then(Mutex::default),
            ring,
            running: Mutex::default(),
        }
    }

    pub(super) fn running(&self) -> MutexGuard<'_, Running> {
        let running = &self.running;
        running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn flush(&self) {
        drop(self.running());
    }

    pub(super) fn awaits_reset(&self) -> bool {
        self.ring.awaits_reset()
    }

    /// Logs a page, while the guest runs.
    pub(super) fn push(&self, slot: u32, page: u64) {
        if let Some(pushed) = &self.pushed {
            let mut pushed = pushed.lock().unwrap_or_else(PoisonError::into_inner);
            pushed.push_back((slot, page));
        }
        self.ring.push(slot, page);
    }

    pub(super) fn recycle(&self, limit: u32, pages: &mut Vec<(u32, u64)>) -> u32 {
        let each = |slot, page| {
            let pushed = self.pushed.as_ref().and_then(|pushed| {
                let mut pushed = pushed.lock().unwrap_or_else(PoisonError::into_inner);
                pushed.pop_front()
            });
            pages.push(pushed.unwrap_or((slot, page)));
        };
        self.ring.recycle(limit, each)
    }
}
