//! The guest's experience of a migration, policy by policy.

pub mod cell;
pub mod result;

pub use cell::Cell;
pub use result::{ArmResult, CellResult, Figures, Migration, Phases, Round, Sample, Spread};
