// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whole migrations with and without a working set, of guests that differ in what they write: on real KVM,
//! and in virtual time on the simulated kernel. Both go by the same rounds, those of
//! [`migrate`](crate::migration::migrate()).
//!
//! The guests are small and their link is slow: 32 MiB, sent within a second. Where a fault takes tens of microseconds a
//! guest could not write enough for a faster link, and a simulation would take long.

pub mod arm;
#[cfg(tiny_guest)]
pub mod kvm;
pub mod load;
pub mod measure;
pub mod sim;

use std::time::Duration;

pub use arm::Arm;
pub use load::Load;
pub use measure::{End, Figures, Subject, measure};

/// Pages of a guest.
const PAGES: u64 = 8_192;
/// MiB a second of its link.
const BANDWIDTH_MIB: u64 = 32;
/// The link takes 2,457 pages meanwhile.
const DOWNTIME: Duration = Duration::from_millis(300);
/// Of each vCPU; it does not hold what is written between two syncs.
const RING_ENTRIES: u32 = 512;
