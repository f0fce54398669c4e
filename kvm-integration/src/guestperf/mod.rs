// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's experience of a migration: what it feels, and for how long, as its dirty pages are
//! tracked in one way or another.
//!
//! The guest is under memory stress: each vCPU XORs its share of the memory with random bytes, page
//! by page, over and over. It runs quietly for a while, is migrated, and runs quietly again.

#[cfg_attr(
    not(tiny_guest),
    allow(dead_code, reason = "there is no guest for this machine")
)]
pub(crate) mod analysis;
pub mod arm;
pub mod cell;
#[cfg(tiny_guest)]
pub mod kvm;
pub mod result;

pub use arm::{Arm, OURS};
pub use cell::Cell;
pub use result::{ArmResult, CellResult, Figures, Migration, Phases, Round, Sample, Spread};
