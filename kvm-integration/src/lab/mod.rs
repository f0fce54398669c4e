//! The pacing laboratory: policies side by side under the same loads, on real KVM or in a
//! discrete-event simulation, and what is measured of them.

pub mod arm;
pub mod measure;
pub mod sim;

pub use arm::{Arm, Shape};
pub use measure::{Measured, Sample};
