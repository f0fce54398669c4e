// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pacing laboratory: policies side by side under the same loads, on real KVM or in a
//! discrete-event simulation, and what is measured of them.

pub mod arm;
pub mod cell;
pub mod measure;
pub mod migrations;
pub mod pattern;
pub mod result;
pub mod rhythm;
pub mod sim;
pub mod turn;

#[cfg(tiny_guest)]
pub mod kvm;

pub use crate::reaping::Shape;
pub use arm::Arm;
pub use cell::Cell;
pub use measure::{Measured, Sample};
pub use pattern::Pattern;
pub use result::{ArmResult, CellResult};
pub use turn::Turn;
