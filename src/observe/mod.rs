// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What others have counted, as statistics, events and metrics.
//!
//! May import: ground, harvest.

#[cfg(feature = "metrics")]
pub mod metrics;
pub(crate) mod stats;
pub(crate) mod trace;
