// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tiny guest, and the virtual machine that it runs in.

pub mod memory;
pub mod parking;
pub mod stamp;
pub mod workload;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as processor;
#[cfg(target_arch = "x86_64")]
use x86_64 as processor;

#[cfg(tiny_guest)]
pub mod error;
#[cfg(tiny_guest)]
pub(crate) mod kick;
#[cfg(tiny_guest)]
pub mod program;
#[cfg(tiny_guest)]
mod slots;
#[cfg(tiny_guest)]
pub mod slowdown;
#[cfg(tiny_guest)]
pub mod stress;
#[cfg(all(test, tiny_guest))]
mod tests;
#[cfg(tiny_guest)]
pub mod thread;
#[cfg(tiny_guest)]
pub mod vcpu;
#[cfg(tiny_guest)]
pub mod vm;
