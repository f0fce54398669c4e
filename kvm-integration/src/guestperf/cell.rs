//! What the arms are compared under.

use std::fmt;

use serde::Serialize;

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

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            vcpus,
            memory_mib,
            stress_mib,
            ring_entries,
        } = self;
        let noun = if *vcpus == 1 { "vCPU" } else { "vCPUs" };
        write!(
            f,
            "{vcpus} {noun}, {memory_mib} MiB, {stress_mib} MiB stressed, rings of {ring_entries}"
        )
    }
}
