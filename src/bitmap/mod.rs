// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages as bits, and which pass holds which of them.
//!
//! A harvesting pass sets bits in a *shard* that it alone holds ([`shard`], [`pool`]). Devices set bits in *shared* words
//! ([`shared`]). A sync merges both into the bits that its caller reads ([`pages`]).
//!
//! May import: ground.

pub(crate) mod pages;
pub(crate) mod pool;
#[cfg(all(test, not(feature = "modelled")))]
mod properties;
pub(crate) mod runs;
pub(crate) mod shard;
pub(crate) mod shared;
pub(crate) mod words;
