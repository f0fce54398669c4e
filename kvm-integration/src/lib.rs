//! A tiny guest on real KVM, for the integration suite and the programs of this workspace.
//!
//! [`TinyVm`] is a virtual machine without devices, firmware or operating system. Each of its
//! vCPUs runs one short loop ([`program`]) that stores a stamp into every page of a list, over
//! and over; [`workload`] makes the lists. The host pauses, resumes and stops the vCPUs through
//! [`VcpuThread`], reads their progress while they run, and compares [`GuestMemory`] byte for
//! byte when they stand still.
//!
//! On top of it, [`machine`] makes such a guest, or one on the simulated kernel, ready to be
//! migrated, and [`migration`] migrates it.
//!
//! The guest is x86-64 code, so the machine itself is there on x86-64 only; everything else builds
//! everywhere.
//!
//! ```no_run
//! # #[cfg(target_arch = "x86_64")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use kvm_integration::{
//!     Action, GuestMemory, Load, Mode, Region, TinyVm, VcpuThread, Workload, kvm_available,
//! };
//!
//! let vm = TinyVm::new(&kvm_available()?)?;
//! // Enable the dirty ring on `vm.vm_fd()` here: no vCPU exists yet.
//! let region = Region { gpa: 4 << 30, pages: 4096 };
//! vm.add_slot(1, region.gpa, Arc::new(GuestMemory::new(region.pages)?), true)?;
//! let list = Workload::Random.addresses(7, 0, 1, &[region], 8192);
//! let vcpu = vm.create_vcpu(0, &Load::new(Mode::Native, list))?;
//! let thread = VcpuThread::spawn(vcpu, |_exit| Action::Continue)?;
//! thread.pause();
//! println!("{} pages stored", thread.progress());
//! thread.resume();
//! thread.stop()?;
//! # Ok(())
//! # }
//! # #[cfg(not(target_arch = "x86_64"))]
//! # fn main() {}
//! ```

pub mod bystanders;
pub mod chaos;
pub mod charts;
#[cfg(target_arch = "x86_64")]
mod cores;
#[cfg(target_arch = "x86_64")]
mod cpu_time;
pub mod guestperf;
pub mod host;
pub mod interrupt;
pub mod lab;
pub mod machine;
pub mod markdown;
pub mod memory;
pub mod migration;
pub mod order;
pub mod output;
pub mod page_set;
mod parking;
pub mod policy;
mod random;
pub mod rate;
#[cfg(target_arch = "x86_64")]
pub mod refusal;
pub mod shape;
pub mod stamp;
pub mod storm;
pub mod watchdog;
pub mod workload;

#[cfg(target_arch = "x86_64")]
pub mod kick;
#[cfg(target_arch = "x86_64")]
pub mod program;
#[cfg(target_arch = "x86_64")]
pub mod slowdown;
#[cfg(target_arch = "x86_64")]
pub mod stress;
#[cfg(target_arch = "x86_64")]
pub mod thread;
#[cfg(target_arch = "x86_64")]
pub mod vcpu;
#[cfg(target_arch = "x86_64")]
pub mod vm;

pub use host::{Host, HostError, kvm_available};
pub use memory::{GuestMemory, MemoryError, PAGE_SIZE};
pub use policy::Policy;
pub use workload::{Region, UnknownWorkload, Workload};

#[cfg(target_arch = "x86_64")]
pub use program::{Load, Mode};
#[cfg(target_arch = "x86_64")]
pub use stress::Stress;
#[cfg(target_arch = "x86_64")]
pub use thread::{Action, Kicker, VcpuThread, pause_all};
#[cfg(target_arch = "x86_64")]
pub use vcpu::{Exit, Progress, TinyVcpu, VcpuError};
#[cfg(target_arch = "x86_64")]
pub use vm::{TinyVm, VmError};
