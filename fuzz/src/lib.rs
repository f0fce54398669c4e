// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the fuzz targets are made of: inputs and their decoding, kernels, oracles.
//!
//! Each target is a `Script`, decoded from bytes, and a `run` that panics if the script shows that
//! something is wrong. There are no threads and no clocks in it: the same bytes do the same.

#[path = "../../tests/common/mod.rs"]
#[allow(missing_docs, reason = "shared with the tests, which are no library")]
pub mod common;
mod memory;

pub mod drain;
pub mod ops;
pub mod pacing;
pub mod ring_parse;
