// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What real and simulated runs have in common.

use anyhow::Result;
use kvm_integration::lab::CellResult;
use serde::Serialize;

/// Takes in what came of a guest.
pub type Report<'a> = dyn FnMut(CellResult) -> Result<()> + 'a;

/// An arm that this machine refuses.
#[derive(Debug, Clone, Serialize)]
pub struct Skipped {
    /// Which.
    pub arm: &'static str,
    /// Why.
    pub why: String,
}
