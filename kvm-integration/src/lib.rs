// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tiny guest on real KVM, for the integration suite and the programs of this workspace.
//!
//! [`TinyVm`] is a virtual machine without devices, firmware or operating system. Each of its
//! vCPUs runs one short loop ([`guest::program`]) that stores a stamp into every page of a list, over
//! and over; [`guest::workload`] makes the lists. The host pauses, resumes and stops the vCPUs through
//! [`VcpuThread`], reads their progress while they run, and compares [`GuestMemory`] byte for
//! byte when they stand still.
//!
//! | room | holds | for |
//! |---|---|---|
//! | [`guest`] | the tiny guest and its virtual machine | tests, benchmarks and all programs but `mini-vmm` |
//! | [`host`] | the machine that it runs on: what it is, its CPUs, signals, refused system calls | as above |
//! | [`machine`] | a guest to be migrated, on KVM or on the simulated kernel | `live-migration`, `dirty-limit`, `guestperf`, `pacing-lab` |
//! | [`reaping`] | how rings are emptied: policies by name, and QEMU's way | `pacing-lab`, `guestperf`; the names also `live-migration`, `dirty-limit`, `chaos` |
//! | [`migration`] | pre-copy rounds and the comparison after them | `live-migration`, `guestperf` |
//! | [`charts`] | pages with charts and tables | `guestperf`, `pacing-lab` |
//! | [`cli`] | what programs have in common: arguments, output, tables, signals | all programs but `mini-vmm` |
//! | [`guestperf`] | migrations that are measured | `guestperf` |
//! | [`lab`] | arms and loads, on KVM and in a simulation | `pacing-lab`, `tests/pacing_sim.rs` |
//! | [`page_set`], [`random`] | pages that migrations send; numbers that look random | all of them |
//!
//! The guest is code for x86-64 and arm64, so the machine itself is there on these only; everything else
//! builds everywhere.
//!
//! ```no_run
//! # #[cfg(tiny_guest)]
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
//! # #[cfg(not(tiny_guest))]
//! # fn main() {}
//! ```

pub mod charts;
pub mod cli;
pub mod guest;
pub mod guestperf;
pub mod host;
pub mod lab;
pub mod machine;
pub mod migration;
pub mod page_set;
pub mod random;
pub mod reaping;

pub use guest::memory::{GuestMemory, MemoryError, PAGE_SIZE};
pub use guest::workload::{Region, Workload};
pub use host::{Host, HostError, kvm_available, storm};
pub use reaping::policy::Policy;

#[cfg(tiny_guest)]
pub use guest::{
    error::{VcpuError, VmError},
    program::{self, Exit, Load, Mode},
    stress::Stress,
    thread::{Action, Kicker, VcpuThread, pause_all},
    vcpu::{Progress, TinyVcpu},
    vm::TinyVm,
};
#[cfg(tiny_guest)]
pub use host::refusal;
