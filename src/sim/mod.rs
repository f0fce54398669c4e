//! A simulated kernel, to test a VMM's use of this crate without `/dev/kvm` (feature `test-utils`).
//!
//! It keeps rings in ordinary memory and treats them as KVM does: a page that is *armed*
//! (write-protected) is logged at its next write and disarmed; further writes are silent until a
//! reset arms it again; a vCPU whose ring has reached the soft limit does not run. It also knows
//! the truth: every write counts up the version of its page, logged or not, so a test can tell
//! whether a copy made on the word of a [`DirtyLog`](crate::DirtyLog) is equal to the original.
//!
//! Where the kernel leaves room, the simulation takes the worst: a reset frees all entries first,
//! then arms all pages at the very end, so that whoever copies a page before the reset has returned
//! is found out; so does the reading of a [bitmap](crate::Mode::Bitmap). It arms them in batches, as KVM does,
//! and forgets a whole batch for one page that its slot does not have. [Faults](ResetFault) make it
//! misbehave.
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
//!
//! May import: ground, ring, log.

mod batch;
mod config;
mod slot;
mod vcpu;
mod vcpu_state;
mod vm;

pub use config::{BitmapFault, ResetFault, ResetPhase, SimConfig};
pub use vcpu::{SimVcpu, WriteError};
pub use vm::SimVm;
