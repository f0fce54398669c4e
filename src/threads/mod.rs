// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads that the crate runs: the reaper and the limiter, and how they are scheduled; and a reaper for threads of the
//! VMM's own.
//!
//! May import: ground, pacing, observe, kvm, log.

mod backoff;
pub(crate) mod event_reaper;
pub(crate) mod limiter;
pub(crate) mod reaper;
pub(crate) mod scheduling;
mod timer;
mod turns;
