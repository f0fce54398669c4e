// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the user ends a program of this workspace early.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The exit status then, as a shell reports the end by SIGINT.
pub(super) const INTERRUPTED: u8 = 130;

/// A flag that SIGINT or SIGTERM sets; a second signal ends the program at once.
pub(super) fn watch_signals() -> io::Result<Arc<AtomicBool>> {
    let interrupted = Arc::<AtomicBool>::default();
    for signal in [SIGINT, SIGTERM] {
        // In this order: only a second signal finds the flag set.
        let shared = || Arc::clone(&interrupted);
        flag::register_conditional_shutdown(signal, INTERRUPTED.into(), shared())?;
        flag::register(signal, shared())?;
    }
    Ok(interrupted)
}

/// Somebody asked for an end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Whether nobody has.
pub fn go_on(interrupted: &AtomicBool) -> Result<(), Interrupted> {
    // Relaxed: nothing comes with it.
    match interrupted.load(Ordering::Relaxed) {
        true => Err(Interrupted),
        false => Ok(()),
    }
}
