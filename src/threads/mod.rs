//! The threads that the crate runs: the reaper and the limiter, and how they are scheduled.
//!
//! May import: ground, pacing, observe, kvm, log.

mod backoff;
pub(crate) mod limiter;
pub(crate) mod reaper;
pub(crate) mod scheduling;
