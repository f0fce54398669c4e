// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the arms are compared under.

use std::fmt;

use super::pattern::Pattern;
use super::result::describe;

/// One guest, under which every arm has its turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cell {
    /// What it does.
    pub pattern: Pattern,
    /// Its vCPUs.
    pub vcpus: u32,
    /// The size of each ring.
    pub ring_entries: u32,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.pattern.into(), self.vcpus, self.ring_entries)
    }
}
