//! The guest's experience of a migration: what it feels, and for how long, as its dirty pages are
//! tracked in one way or another.
//!
//! The guest is under memory stress: each vCPU XORs its share of the memory with random bytes, page
//! by page, over and over. It runs quietly for a while, is migrated, and runs quietly again.

#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "guests run on x86-64 only")
)]
pub(crate) mod analysis;
pub mod arm;
pub mod cell;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod result;

pub use arm::{Arm, OURS};
pub use cell::Cell;
pub use result::{ArmResult, CellResult, Figures, Migration, Phases, Round, Sample, Spread};
