// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Track the memory that a KVM guest dirties, through its vCPUs' dirty rings, and lose no page.
//!
//! A VMM that migrates a running virtual machine, or takes snapshots of it, needs the pages that the guest
//! has written. KVM logs them into one ring per vCPU. This crate empties the rings before they are full, has
//! their pages write-protected again before the VMM copies them, and returns each page that was written. One
//! lost page is a corrupted guest.
//!
//! ```text
//!  guest vCPU            KVM                       this crate                     VMM
//!      │ writes a page    │                             │                          │
//!      ├─────────────────▶│ logs an entry in the ring   │                          │
//!      │ runs on          ├────────────────────────────▶│ reaper: harvests it      │
//!      │                  │◀──── resets the entry ──────┤                          │
//!      │                  │ protects the page again ···▶│ publishes the page       │
//!      │                  │                             │◀─────────────── sync() ──┤ each round
//!      │                  │                             ├──── runs of pages ──────▶│ copies, sends
//!      │ fills its ring ─▶│ stops the vCPU              │                          │
//!      │                  ├── KVM_EXIT_DIRTY_RING_FULL ─┼─────────────────────────▶│ vCPU's thread
//!      │                  │◀──── harvest and reset ─────┤◀──────────── on_full() ──┤
//!      │◀─────────────────┤◀────────────────────────────┼───────────────── KVM_RUN ┤
//! ```
//!
//! # The protocol
//!
//! 1. The VMM enables the rings with [`DirtyLog::enable`] before the first vCPU, and a VM keeps them for life.
//! 2. It [adds](DirtyLog::add_slot) each memslot whose memory it will copy to the log, before it creates the slot in KVM, and
//!    [attaches](DirtyLog::attach_vcpu) each vCPU before that runs.
//! 3. While a slot has `KVM_MEM_LOG_DIRTY_PAGES`, KVM logs the first write to each protected page in the ring of the
//!    vCPU that wrote.
//! 4. A [`Reaper`] harvests rings at the pace of its [policy](pacing), before they are full.
//! 5. KVM stops a vCPU whose ring is full, and [`VcpuRing::on_full`] on its thread makes room.
//! 6. Each harvest marks its entries and calls the reset ioctl, by which KVM protects the pages again.
//! 7. Only then are the pages published, so a later write to one of them is logged again.
//! 8. The VMM [marks](DirtyLog::mark_dirty) what devices and the VMM itself have written.
//! 9. Each [`DirtyLog::sync`] returns all pages published or marked since the sync before, and the VMM copies them.
//! 10. Once every vCPU is out of `KVM_RUN` and every device has stopped, one more sync returns the rest, and the
//!     copy is complete.
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
//! # Guide
//!
//! The [guide] puts the crate into a VMM, task by task, and begins with a [checklist](guide#checklist).
//! It covers the size of the rings, [slots and vCPUs that come and go][slots], [threads], [dirty limits][limits],
//! [what to do when something goes wrong][operations], and [what QEMU and Cloud Hypervisor call it][terms]. The same pages are
//! in `docs/` of the package. `SECURITY.md` lists every system call for a seccomp filter, and `ARCHITECTURE.md` explains
//! why the crate is right.
//!
//! [slots]: guide::slots
//! [threads]: guide::threads
//! [limits]: guide::limits
//! [operations]: guide::operations
//! [terms]: guide::terms
//!
//! # What it promises
//!
//! - **Publish after reset.** While the guest runs, a page is returned only after it was write-protected again, or it is
//!   returned by every sync. So a later sync returns each write that the VMM's copy may have missed.
//! - **A final sync is complete.** With the vCPUs stopped, one [`DirtyLog::sync`] returns every
//!   page written since the one before, whatever other passes were under way.
//! - **Nothing is dropped.** [`Stats`] counts entries that make no sense, resets that fail or stop half-way, and rings that
//!   the kernel overran. The pages of a failed reset wait for the next one that succeeds. In the other cases every sync
//!   returns every page in the log that may be concerned, until the VMM has [re-armed](DirtyLog::rearm) it; after an
//!   overrun, for good.
//!
//! Pages can be lost in two cases. First, no call detects an interruption in the last microseconds of a reset that does not put
//! the thread to sleep. The rules below on io_uring, on SIGSTOP, and on livepatches avoid it. Second, on kvm_pvm, a KVM outside
//! mainline Linux, a ring can be overrun during a reset. The crate may not notice that until the vCPU's next full exit, and a
//! sync before that, even the last, may lack pages.
//!
//! # What the VMM must do
//!
//! - Enable the log before the first vCPU, on aarch64 before the first memslot, too. With rings,
//!   leave `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with `INITIALLY_SET` off.
//! - Add each memslot whose memory you will copy before you create it, logged or not; remove it in [two
//!   steps](DirtyLog::retire_slot).
//! - Set `KVM_MEM_LOG_DIRTY_PAGES` later, and clear it, in the closure of [`DirtyLog::start_tracking`] or
//!   [`DirtyLog::stop_tracking`]. Create a memslot without that flag in the closure of the latter.
//! - Call [`VcpuRing::on_full`] on `KVM_EXIT_DIRTY_RING_FULL`.
//! - [Mark](DirtyLog::mark_dirty) what the VMM and its devices write, after they have written it. The feature
//!   `vm-memory` marks what is written by the methods of that crate.
//! - Before the last sync, get every vCPU thread out of `KVM_RUN`: processors with page-modification logging hold
//!   pages back until a vCPU exits.
//! - With [dirty limits](DirtyLog::set_dirty_limit), call [`VcpuRing::throttle`] when `KVM_RUN` was interrupted, and
//!   [keep vCPUs awake](DirtyLog::keep_awake) while you stop them.
//! - Run vCPUs, and make [calls that reset](guide::threads#what-each-call-waits-for), on threads that [have no io_uring of
//!   their own](guide::threads#signals-and-kicks). Its work interrupts resets as signals do, and cannot be blocked.
//! - While a guest is tracked, do not stop the process by SIGSTOP, a debugger or the freezer, and do not livepatch the host's
//!   kernel.
//! - Under seccomp, [allow the calls](guide#under-seccomp-and-in-a-chroot) that each thread makes.
//!
//! # Pages that stay open
//!
//! A page that the guest writes all the time need not be protected in each round of a migration. With a [working
//! set](DirtyLog::set_working_set) it stays open, every sync reports it among the [members](DirtyPages::members), and
//! the VMM sends it in the last round, which [`DirtyLog::last_sync`] finds without a reset. [`convergence`] decides when
//! to go on, to [close](DirtyLog::refresh) the members, to finish, or to give up. The working set is off by default.
//!
//! # Without rings
//!
//! Kernels without dirty rings keep a bitmap for each slot. [`DirtyLog::enable_auto`] falls back to them,
//! [`DirtyLog::enable_bitmap`] uses them anywhere, and [`DirtyLog::mode`] returns which a log uses. The calls and
//! the promises are the same, but there are no dirty rates and limits. vCPUs never stop for a full ring, and a reaper
//! finds nothing to do.
//! Create a slot in KVM before the first sync after `add_slot`: until then all of it is dirty.
//!
//! # Statistics and events
//!
//! [`DirtyLog::stats`] returns all counts. With the feature `tracing`, full exits, passes, syncs, the reaper's life and
//! faults are events of the target `kvm_dirty_ring`, by QEMU's names. They are emitted under no lock of the crate's. With
//! the feature `metrics`, `metrics::publish` passes the counts to a recorder.
//!
//! # Platforms
//!
//! 64-bit Linux on x86-64 and aarch64. On riscv64 the crate compiles and its unit tests run, but no KVM has run it. It does
//! not compile for other processors. A page is a base page of the host. To test without `/dev/kvm`, use the simulated
//! kernel, `sim` (feature `test-utils`).

#![deny(
    missing_docs,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("kvm-dirty-ring is for 64-bit Linux");

// Memory orderings, page sizes and the mapping of rings were tried on these processors only.
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
)))]
compile_error!(
    "kvm-dirty-ring runs on x86_64, aarch64 and riscv64: it was not tried on other processors"
);

// Documentation only; tests/snippets.rs in kvm-integration compiles what the pages show.
#[cfg(all(doc, not(doctest)))]
pub mod guide;

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
pub use slots::dirty_pages::DirtyPages;
pub use slots::dirty_part::{DirtyPart, Run};
#[cfg(not(all(test, feature = "modelled")))]
pub use slots::guest_map::{GuestMap, GuestRegion};
pub use slots::working_set::WorkingSet;
#[cfg(not(all(test, feature = "modelled")))]
pub use threads::event_reaper::EventReaper;
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
