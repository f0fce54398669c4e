// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the property tests and the fuzz targets share: the machine that runs scripts, and the slow
//! oracles.

pub mod judge;
pub mod machine;
pub mod ops;
pub mod shape;
