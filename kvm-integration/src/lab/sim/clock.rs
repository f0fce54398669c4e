// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtual time.

use std::time::Duration;

/// Nanoseconds since the start of a simulation.
pub(super) type Nanos = u64;

/// A moment that never comes.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// What is too long to be counted comes never.
pub(super) fn nanos(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(NEVER)
}

/// The same of seconds, rounded up: what is due is due by then. A millionth of a microsecond more is
/// a rounding error.
pub(super) fn nanos_up(seconds: f64) -> Nanos {
    // Saturates, and takes what is not a number for 0.
    (seconds * 1e9 - 1e-3).ceil() as Nanos
}

pub(super) fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / 1e9
}
