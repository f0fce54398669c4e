// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads beside a test end with it, also if it fails.

use std::sync::atomic::{AtomicBool, Ordering};

/// Says that it is over when it is dropped.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        // Relaxed: nothing comes with it.
        self.0.store(true, Ordering::Relaxed);
    }
}
