//! x
#![deny(
    missing_docs,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]

mod alarm;
mod bitmap;
mod dirty_pages;
pub mod error;
mod kernel;
#[cfg(not(all(test, feature = "loom")))]
mod kvm;
mod log;
mod memslots;
pub mod pacing;
mod pass;
#[cfg(not(all(test, feature = "loom")))]
mod reaper;
mod reset;
pub mod ring;
#[cfg(all(any(test, feature = "test-utils"), not(all(test, feature = "loom"))))]
pub mod sim;
mod stats;
mod sync;
mod vcpu;

pub use dirty_pages::{DirtyPages, Run};
pub use kernel::Kernel;
#[cfg(not(all(test, feature = "loom")))]
pub use kvm::{HostSupport, RingEntries};
pub use log::{DirtyLog, RetiredSlot, VcpuRing};
pub use memslots::SlotId;
#[cfg(not(all(test, feature = "loom")))]
pub use reaper::Reaper;
pub use stats::{Stats, VcpuStats};

#[cfg(test)]
#[path = "../loom-tests/mod.rs"]
mod loom_tests;
