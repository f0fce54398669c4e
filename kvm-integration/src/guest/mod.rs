//! The tiny guest, and the virtual machine that it runs in.

pub mod memory;
pub mod parking;
pub mod stamp;
pub mod workload;

#[cfg(target_arch = "x86_64")]
pub mod error;
#[cfg(target_arch = "x86_64")]
pub(crate) mod kick;
#[cfg(target_arch = "x86_64")]
pub mod program;
#[cfg(target_arch = "x86_64")]
mod slots;
#[cfg(target_arch = "x86_64")]
pub mod slowdown;
#[cfg(target_arch = "x86_64")]
pub mod stress;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
#[cfg(target_arch = "x86_64")]
pub mod thread;
#[cfg(target_arch = "x86_64")]
pub mod vcpu;
#[cfg(target_arch = "x86_64")]
pub mod vm;
