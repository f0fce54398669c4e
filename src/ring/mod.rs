// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One ring of dirtied pages, shared by a vCPU's kernel side and userspace.
//!
//! The kernel produces, one consumer at a time harvests. [`Entry`] holds every memory ordering of the protocol; [`RingView`] is the
//! consumer with its cached index.

// May import: ground.

pub(crate) mod entry;
pub(crate) mod gauge;
pub(crate) mod memory;
mod overruns;
#[cfg(any(test, feature = "test-utils"))]
pub(crate) mod producer;
#[cfg(all(test, not(feature = "modelled")))]
mod properties;
mod reserve;
pub(crate) mod view;

pub use entry::Entry;
pub use memory::RingMemory;
pub use view::RingView;
