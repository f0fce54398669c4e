// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which rings a full exit empties: the crate's way, and QEMU's.

#[cfg(tiny_guest)]
pub(crate) mod full_exit;
pub mod policy;
#[cfg(tiny_guest)]
mod qemu_reaper;
#[cfg(tiny_guest)]
pub(crate) mod reaper;

/// Which rings are emptied when a vCPU stops on a full ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The crate's: the vCPU empties its own ring, without a lock that others wait for, and wakes
    /// the reaper.
    OwnRing,
    /// QEMU's: the vCPU takes the lock that the reaper takes, too, and empties every ring. Nobody
    /// wakes the reaper.
    AllRings,
}
