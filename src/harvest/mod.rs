// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From entries to published pages: passes over rings, the resets that they share, and the bits that the kernel itself keeps.
//!
//! May import: ground, bitmap, ring, limit, pacing, slots.

pub(crate) mod kernel_bits;
mod last_batch;
pub(crate) mod pass;
pub(crate) mod reset_gate;
pub(crate) mod vcpu;
