//! What is counted, and what subscribers and recorders hear of it.
//!
//! May import: ground, harvest.

#[cfg(feature = "metrics")]
pub mod metrics;
pub(crate) mod stats;
pub(crate) mod trace;
