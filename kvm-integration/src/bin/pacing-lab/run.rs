//! What real and simulated runs have in common.

use std::error::Error;
use std::io;

use kvm_integration::lab::CellResult;
use serde::Serialize;

/// Takes in what came of a guest.
pub type Report<'a> = dyn FnMut(CellResult) -> Result<(), Box<dyn Error>> + 'a;

/// Nobody may take silence for success.
#[derive(Debug, thiserror::Error)]
#[error("the result could not be written to {place}: see where the output goes")]
pub struct Unwritten {
    /// Where it was to go.
    pub place: String,
    /// What the kernel said.
    pub source: io::Error,
}

impl Unwritten {
    /// For a result that was to go to `place`.
    pub fn to(place: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let place = place.into();
        move |source| Self { place, source }
    }
}

/// An arm that this machine refuses.
#[derive(Debug, Clone, Serialize)]
pub struct Skipped {
    /// Which.
    pub arm: &'static str,
    /// Why.
    pub why: String,
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
