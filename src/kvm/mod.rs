// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The real kernel: the only room that makes system calls about a VM.
//!
//! May import: ground, ring.

pub(crate) mod bitmap;
pub(crate) mod enable;
mod initially_set;
pub(crate) mod ioctl;
pub(crate) mod mmap;
pub(crate) mod signals;
mod stop_watch;
pub(crate) mod vm;
