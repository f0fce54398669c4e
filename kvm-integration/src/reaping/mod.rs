//! Who empties what at a full exit: the crate's way, and QEMU's.

#[cfg(target_arch = "x86_64")]
pub(crate) mod full_exit;
pub mod policy;
#[cfg(target_arch = "x86_64")]
mod qemu_reaper;
#[cfg(target_arch = "x86_64")]
pub(crate) mod reaper;

/// Who empties what when a vCPU stops on a full ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The crate's: the vCPU empties its own ring, without a lock that others wait for, and wakes
    /// the reaper.
    OwnRing,
    /// QEMU's: the vCPU takes the lock that the reaper takes, too, and empties every ring. Nobody
    /// wakes the reaper.
    AllRings,
}
