// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the arms are compared under.

use std::fmt;

use serde::Serialize;

use crate::guest::memory::PAGE_SIZE;
use crate::guest::workload::Region;

/// One guest, which every arm migrates in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Cell {
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its logged memory, in MiB.
    pub memory_mib: u64,
    /// As much of it is stressed, in MiB.
    pub stress_mib: u64,
    /// The size of each ring.
    pub ring_entries: u32,
}

impl Cell {
    /// Whether there can be such a guest: it stresses memory that it has, and a page of each vCPU's.
    pub fn is_possible(&self) -> bool {
        self.stress_mib <= self.memory_mib && self.share(0, 0).pages > 0
    }

    /// What vCPU `index` stresses, where the memory begins at `gpa`: pages that no other does.
    pub fn share(&self, index: u32, gpa: u64) -> Region {
        let pages = self.stress_mib << 20 >> PAGE_SIZE.ilog2();
        let bound = |index: u32| pages * u64::from(index) / u64::from(self.vcpus);
        let first = bound(index);
        Region {
            gpa: gpa + first * PAGE_SIZE,
            pages: bound(index + 1) - first,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (vcpus, memory, stress) = (self.vcpus, self.memory_mib, self.stress_mib);
        let noun = if vcpus == 1 { "vCPU" } else { "vCPUs" };
        write!(f, "{vcpus} {noun}, {memory} MiB, {stress} MiB stressed, ")?;
        write!(f, "rings of {}", self.ring_entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_the_stressed_memory() {
        let cell = Cell {
            vcpus: 3,
            memory_mib: 9,
            stress_mib: 5,
            ring_entries: 256,
        };
        let mut gpa = 1 << 30;
        for index in 0..3 {
            let share = cell.share(index, 1 << 30);
            assert_eq!(share.gpa, gpa);
            gpa += share.pages * PAGE_SIZE;
        }
        assert_eq!(gpa, (1 << 30) + (5 << 20));
    }
}
