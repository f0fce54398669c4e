// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one vCPU writes, and how fast.

/// How often a second a vCPU with a limited write rate looks whether it is too fast. On `kvm_pvm`
/// an exit costs a native guest 57 µs, so that this costs it half a percent.
const LOOKS_PER_SECOND: f64 = 100.0;
/// The most stores between two of these looks.
const MAX_CHUNK: f64 = 4096.0;

/// What one vCPU writes, over and over.
#[derive(Debug, Clone)]
pub struct Writes {
    /// The guest-physical addresses of its pages, in order: a multiple of the [chunk](Self::chunk) of them.
    pub list: Vec<u64>,
    /// Page stores a second; 0: as many as it can.
    pub per_second: f64,
}

impl Writes {
    /// Stores between two looks whether it is too fast; 0: never.
    pub fn chunk(&self) -> u32 {
        chunk(self.per_second)
    }
}

pub(super) fn chunk(per_second: f64) -> u32 {
    match per_second {
        0.0 => 0,
        rate => (rate / LOOKS_PER_SECOND).clamp(1.0, MAX_CHUNK) as u32,
    }
}
