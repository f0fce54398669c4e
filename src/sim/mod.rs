// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A simulated kernel, to test a VMM's use of this crate without `/dev/kvm` (feature `test-utils`).
//!
//! It keeps rings in ordinary memory and treats them as KVM does. The next write to a page that is *armed* (write-protected) is
//! logged and disarms the page. Further writes are silent until a reset arms it again. A vCPU whose ring has reached the soft limit
//! does not run.
//!
//! It also has the truth: every write increments the version of its page, logged or not. So a test can compare a copy, made by a
//! [`DirtyLog`](crate::DirtyLog), with the original.
//!
//! Where the kernel has a choice, the simulation takes the worst case. A reset frees all entries first and arms all pages at the
//! very end, as does the reading of a [bitmap](crate::Mode::Bitmap). So a copy that is made before the reset has returned is
//! detected. It arms pages in batches, as KVM does, and skips a whole batch for one page that its slot does not have.
//! [Faults](ResetFault) make it misbehave.
//!
//! ```
//! use kvm_dirty_ring::sim::{SimConfig, SimVm};
//! use kvm_dirty_ring::{DirtyPages, SlotId};
//!
//! let vm = SimVm::new(SimConfig::default());
//! let log = vm.dirty_log();
//! let ram = SlotId::new(0, 0);
//! log.add_slot(ram, 1000)?;
//! vm.create_slot(ram, 1000);
//! let vcpu = vm.add_vcpu();
//! let _ring = log.attach_ring(vcpu.ring_memory())?;
//!
//! vcpu.write(ram, 7)?;
//! let mut dirty = DirtyPages::new();
//! log.sync(&mut dirty)?;
//! assert!(dirty.contains(ram, 7));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// May import: ground, ring, log.

mod batch;
mod config;
mod slot;
mod vcpu;
mod vcpu_state;
mod vm;

pub use config::{BitmapFault, ResetFault, ResetPhase, SimConfig};
pub use vcpu::{SimVcpu, WriteError};
pub use vm::SimVm;
