//! Track the memory that a KVM guest dirties, through its vCPUs' dirty rings, and lose no page.
//!
//! A VMM that migrates a running virtual machine, or snapshots it, must know which pages the guest
//! has written. KVM logs them into one ring a vCPU. Someone has to empty the rings before they are
//! full, has to have the pages write-protected again before anybody copies them, and must lose
//! none: one lost page is a corrupted guest. This crate does that.
//!
//! ```text
//!  kernel ring ── RingView ──▶ shard (private bits) ──▶ reset ioctl ──▶ published shard
//!  (one a vCPU)                held by one pass         re-protects           │ OR
//!                                                                             ▼
//!  VMM and device writes ──▶ device bits (shared) ────── swap ──▶ DirtyPages ──▶ runs of pages
//! ```
//!
//! # Use
//!
//! ```no_run
//! use kvm_dirty_ring::{pacing::Adaptive, DirtyLog, DirtyPages, Reaper, RingEntries, SlotId};
//! # fn example(vm_fd: std::fs::File, vcpu_fd: std::fs::File, pages: u64)
//! # -> Result<(), Box<dyn std::error::Error>> {
//!
//! let log = DirtyLog::enable(&vm_fd, RingEntries::new(4096)?)?; // before the first vCPU
//! let ram = SlotId::new(0, 0);
//! log.add_slot(ram, pages)?; // before the slot is created with KVM_MEM_LOG_DIRTY_PAGES
//! let mut ring = log.attach_vcpu(&vcpu_fd)?; // one for each vCPU; it goes to the vCPU's thread
//! let reaper = Reaper::spawn(&log, Adaptive::default())?;
//!
//! // On the vCPU's thread, when KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL:
//! ring.on_full()?;
//!
//! // On the migration's thread, each round; pages may be read once `sync` has returned:
//! let mut dirty = DirtyPages::new();
//! log.sync(&mut dirty)?;
//! for run in dirty.runs() {
//!     println!("slot {}: {} pages from {}", run.slot, run.pages, run.first_page);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! - **Publish after reset.** A page is reported only once it is write-protected again, so a write
//!   that a copy may have missed is reported by a later sync.
//! - **A final sync is complete.** With the vCPUs stopped, one [`DirtyLog::sync`] returns every
//!   page written since the one before, whatever other passes were under way.
//! - **Nothing is dropped.** Entries that make no sense, resets that fail or stop half-way, rings
//!   that the kernel overran: each is counted in [`Stats`], and every page that may be concerned
//!   is reported, by every sync, until the VMM has [re-armed](DirtyLog::rearm) it.
//!
//! # What the VMM must do
//!
//! - Enable the log before the first vCPU, on aarch64 before the first memslot too, and not use
//!   `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with `INITIALLY_SET` beside it.
//! - Add each logged memslot before it is created; remove it in [two
//!   steps](DirtyLog::retire_slot).
//! - Set `KVM_MEM_LOG_DIRTY_PAGES` later, and clear it, by way of [`DirtyLog::start_tracking`] and
//!   [`DirtyLog::stop_tracking`].
//! - Call [`VcpuRing::on_full`] on `KVM_EXIT_DIRTY_RING_FULL`.
//! - [Mark](DirtyLog::mark_dirty) what the VMM and its devices write, after they have written it; or
//!   have it marked by guest memory of the crate vm-memory (feature `vm-memory`).
//! - Before the last sync: have every vCPU thread out of `KVM_RUN`, since processors with
//!   page-modification logging hold pages back until a vCPU exits.
//! - Where it sets [dirty limits](DirtyLog::set_dirty_limit): call [`VcpuRing::throttle`] when
//!   `KVM_RUN` was interrupted, and [keep vCPUs awake](DirtyLog::keep_awake) while it stops them.
//! - Sync, and run vCPUs, on threads that have no io_uring of their own, but for one with
//!   `IORING_SETUP_DEFER_TASKRUN`: its work interrupts resets as signals do, and nobody can block it.
//! - Under seccomp, allow the ioctls `0xAEC7` and `0x4010AE42`, `rt_sigprocmask` and `getrusage` to every thread that syncs or
//!   runs a vCPU, and to the reaper; to that also `prctl`, without which it wakes up 50 us later. With
//!   bitmaps, and on aarch64, also the ioctl `0xC018AEC0` to who syncs or removes slots.
//!   `SECURITY.md` has the whole list, thread by thread.
//!
//! # Pages that stay open
//!
//! A page that the guest writes all the time need not be protected in each round of a migration: with a [working
//! set](DirtyLog::set_working_set) it stays open, every sync reports it among the [members](DirtyPages::members), and it
//! is sent in the last round, which [`DirtyLog::last_sync`] finds without a reset. [`convergence`] decides when to go on,
//! to [close](DirtyLog::refresh) them, to finish, or to give up. Off unless it is switched on.
//!
//! # Without rings
//!
//! Kernels without dirty rings keep a bitmap for each slot. [`DirtyLog::enable_auto`] falls back to them,
//! [`DirtyLog::enable_bitmap`] insists on them, and [`DirtyLog::mode`] returns which it is. All calls are
//! the same, and so are the promises; vCPUs never stop for a full ring, and a reaper finds nothing to do.
//! A slot must be created in KVM before the first sync after `add_slot`: until then all of it is dirty.
//!
//! `docs/guide.md` leads through all of it, from the size of the rings to the final pass.
//!
//! # Seeing what it does
//!
//! [`DirtyLog::stats`] has all that is counted. With the feature `tracing`, full exits, passes, syncs, the
//! reaper's life and faults are events of the target `kvm_dirty_ring`, by QEMU's names, emitted when no other thread
//! waits for the one that emits them; `docs/guide.md` lists them. With the feature `metrics`, `metrics::publish`
//! hands stats to a recorder.
//!
//! 64-bit Linux on x86-64 and aarch64; on riscv64 it compiles, and its unit tests run, but no KVM has run it. It does not
//! compile for other processors. A page is a page of the host. Test without `/dev/kvm` on the
//! simulated kernel, `sim` (feature `test-utils`).

#![deny(
    missing_docs,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("kvm-dirty-ring is for 64-bit Linux");

// Orderings, page sizes and the mapping of rings are those of processors on which somebody has run this.
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
)))]
compile_error!(
    "kvm-dirty-ring is for x86_64, aarch64 and riscv64: on no other processor was it ever run"
);

mod bitmap;
pub mod convergence;
pub mod error;
mod harvest;
mod kernel;
#[cfg(not(all(test, feature = "modelled")))]
mod kvm;
mod limit;
mod log;
mod observe;
pub mod pacing;
mod prefetch;
pub mod ring;
#[cfg(all(
    any(test, feature = "test-utils"),
    not(all(test, feature = "modelled"))
))]
#[cfg_attr(docsrs, doc(cfg(feature = "test-utils")))]
pub mod sim;
mod slot_id;
mod slots;
mod sync;
#[cfg(not(all(test, feature = "modelled")))]
mod threads;

pub use kernel::{Kernel, Mode, Recycled};
#[cfg(not(all(test, feature = "modelled")))]
pub use kvm::enable::{HostSupport, RingEntries};
pub use log::DirtyLog;
pub use log::last_sync::LastPages;
pub use log::limits::Awake;
pub use log::on_demand::OnDemand;
#[cfg(not(all(test, feature = "modelled")))]
pub use log::rate::{Rate, RateMeter, Rates};
pub use log::slots::RetiredSlot;
pub use log::vcpu_ring::VcpuRing;
#[cfg(all(feature = "vm-memory", not(all(test, feature = "modelled"))))]
pub use log::vm_memory;
#[cfg(feature = "metrics")]
pub use observe::metrics;
pub use observe::stats::{ReaperStats, Stats, VcpuStats, WorkingSetStats};
pub use slot_id::SlotId;
pub use slots::dirty_pages::{DirtyPages, DirtyPart, Run};
#[cfg(not(all(test, feature = "modelled")))]
pub use slots::guest_map::{GuestMap, GuestRegion};
pub use slots::working_set::WorkingSet;
#[cfg(not(all(test, feature = "modelled")))]
pub use threads::limiter::Limiter;
#[cfg(not(all(test, feature = "modelled")))]
pub use threads::reaper::{Reaper, ReaperBuilder};
#[cfg(not(all(test, feature = "modelled")))]
pub use threads::scheduling::Priority;

#[cfg(test)]
#[path = "../loom-tests/mod.rs"]
mod loom_tests;

#[cfg(all(test, feature = "modelled", not(feature = "loom")))]
#[path = "../shuttle-tests/mod.rs"]
mod shuttle_tests;
