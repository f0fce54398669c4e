// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tracked memslots: how an entry finds its page's bit (the hot loop's look-up), and what a sync returns.
//!
//! May import: ground, bitmap, ring.

pub(crate) mod dirty_pages;
pub(crate) mod dirty_part;
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) mod guest_map;
pub(crate) mod joiner;
pub(crate) mod members;
mod slot_pages;
pub(crate) mod table;
pub(crate) mod targets;
pub(crate) mod working_set;
