// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors, one type for each family of calls.
//!
//! None of them means a lost page. Each message says what happened, why, and what to do. A call that failed in the kernel
//! has the kernel's error as its source.

use core::time::Duration;
use std::io;

use crate::slot_id::{ADDRESS_SPACES, MAX_SLOT_PAGES, SlotId};
use crate::sync::Arc;

/// The bounds of the delays of a pacing policy, see [`pacing`](crate::pacing).
pub(crate) const SHORTEST_LOOK: Duration = Duration::from_micros(100);
pub(crate) const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// A number of ring entries that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingSizeError {
    /// Not a power of two.
    #[error("a dirty ring of {entries} entries was refused: the number must be a power of two")]
    NotPowerOfTwo {
        /// The requested number.
        entries: u32,
    },
    /// Too small for a page of the host, or for the entries that the kernel keeps in reserve.
    #[error("a dirty ring of {entries} entries is too small: this host needs at least {min}")]
    TooSmall {
        /// The requested number.
        entries: u32,
        /// The smallest ring there is.
        min: u32,
    },
    /// More than the kernel offers.
    #[error("a dirty ring of {entries} entries is too large: this host allows at most {max}")]
    TooLarge {
        /// The requested number.
        entries: u32,
        /// The largest ring there is.
        max: u32,
    },
}

/// A host without usable dirty rings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// No `/dev/kvm`, or no driver behind it.
    #[error("no KVM on this host: load a kvm module, or enable virtualisation in the firmware")]
    NoKvm(#[source] io::Error),
    /// This process may not open `/dev/kvm`.
    #[error(
        "no permission to open /dev/kvm: add the user to its group, or run as a user that has access"
    )]
    NoPermission(#[source] io::Error),
    /// The KVM API is not the stable one.
    #[error("KVM has API version {found}, and the only stable one is 12: use a kernel with that")]
    ApiVersion {
        /// What `KVM_GET_API_VERSION` returned.
        found: i32,
    },
    /// The kernel has no dirty ring that this architecture may use.
    #[error(
        "this kernel has no dirty rings for this architecture (Linux 5.11 on x86, 6.2 on arm64)"
    )]
    NoDirtyRing,
    /// A call failed; the source has the kernel's reason.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl, or other call.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A dirty log that could not be enabled. The VM is unchanged, except after [`SlotExists`](Self::SlotExists), and perhaps after
/// [`Kvm`](Self::Kvm): calls before the one that failed may have changed it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// The size is wrong for this host.
    #[error(transparent)]
    RingSize(#[from] RingSizeError),
    /// The file descriptor is not a KVM virtual machine's.
    #[error(
        "the file descriptor is not a KVM virtual machine's: pass the one that KVM_CREATE_VM returned"
    )]
    NotAVm,
    /// The kernel has no dirty ring that this architecture may use.
    #[error(
        "this kernel has no dirty rings for this architecture (Linux 5.11 on x86, 6.2 on arm64)"
    )]
    NoDirtyRing,
    /// The rings of this VM are enabled already. KVM allows that once.
    #[error(
        "the dirty rings of this VM are enabled already, and KVM allows that once in a VM's life: use the first log"
    )]
    AlreadyEnabled,
    /// A vCPU exists already. The requested rings are the host's largest, so another size would not help.
    #[error("KVM refused the dirty rings because a vCPU exists: enable them before the first vCPU")]
    VcpuExists,
    /// A vCPU exists already, or the ring is smaller than the kernel's reserve. KVM returns the same error for both. A
    /// kernel that is newer than this crate may keep a larger reserve. If there is no vCPU, take larger rings.
    #[error(
        "KVM refused dirty rings of {entries} entries, because a vCPU exists or because it keeps as many in reserve: \
         enable them before the first vCPU; if there is none, take larger rings"
    )]
    VcpuOrReserve {
        /// Entries of each ring.
        entries: u32,
    },
    /// A vCPU exists already; or the rings are enabled already and a memslot exists; or the ring is smaller than the
    /// kernel's reserve. KVM returns the same error for all three on a host whose rings have [bitmaps beside
    /// them](crate::HostSupport::with_bitmap).
    #[error(
        "KVM refused the dirty rings, because a vCPU exists, they are enabled already, or they are smaller than its \
         reserve: enable them once, before the first vCPU and memslot; if that is so, take larger rings"
    )]
    TooLate,
    /// A memslot exists already, on a host whose rings have [bitmaps beside
    /// them](crate::HostSupport::with_bitmap). The VM now has rings for life, and without that bitmap it would lose
    /// what the kernel writes without a vCPU. Create another VM.
    #[error(
        "KVM refused the bitmaps beside the dirty rings because a memslot exists: create a new VM and enable its log \
         before the first memslot"
    )]
    SlotExists,
    /// The VMM enabled manual protection with all pages initially set.
    #[error(
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is on with INITIALLY_SET, which loses pages beside dirty \
         rings: leave it off for this VM"
    )]
    InitiallySet,
    /// A call failed; the source has the kernel's reason.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl, or other call.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A vCPU's ring that could not be attached. The log is unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The ring could not be mapped. The descriptor may not be that of a vCPU of this VM.
    #[error(
        "mapping the dirty ring failed: pass the descriptor of a vCPU of the VM whose rings were enabled"
    )]
    Map(#[source] io::Error),
    /// The log was made with a [`Kernel`](crate::Kernel) of the caller's, not with a VM's file descriptor.
    #[error(
        "the log was made with a kernel of its own and not with a KVM VM: attach its rings by `attach_ring`"
    )]
    NotKvm,
    /// The log reads bitmaps, and the vCPU has a ring. What the vCPU writes is in its ring and in no bitmap.
    #[error(
        "the vCPU has a dirty ring, and the log reads bitmaps, which don't have what it writes: attach it to \
         the log that enabled the rings"
    )]
    HasRing,
    /// The vCPU's ring is attached already, and its [`VcpuRing`](crate::VcpuRing) still exists.
    #[error("the vCPU's ring is attached already: drop its VcpuRing before attaching it again")]
    Twice,
    /// The ring's size is not that of the log's other rings.
    #[error(
        "the ring has {found} entries, and every ring of this log has {expected}: attach one of that size"
    )]
    Size {
        /// Entries of the ring.
        found: u32,
        /// Entries of every ring of the VM.
        expected: u32,
    },
}

/// A call about a memslot that was refused, or failed.
///
/// Nothing has changed, unless the variant states otherwise. [`rearm`](crate::DirtyLog::rearm) goes from slot to
/// slot; it has completed the slots before the one named.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The id is in use.
    #[error("slot {slot} is tracked already: remove it first, or use another id")]
    Exists {
        /// The slot.
        slot: SlotId,
    },
    /// The slot's removal has begun and is not finished.
    #[error("slot {slot} is being removed: delete it in KVM, then finish the removal")]
    Retired {
        /// The slot.
        slot: SlotId,
    },
    /// The slot is not in the log.
    #[error("slot {slot} is not in the log: add it before it is created in KVM")]
    Unknown {
        /// The slot.
        slot: SlotId,
    },
    /// A size that no slot can have.
    #[error(
        "slot {slot} of {pages} pages was refused: a slot has 1 to {} pages",
        MAX_SLOT_PAGES
    )]
    Pages {
        /// The slot.
        slot: SlotId,
        /// The requested number.
        pages: u64,
    },
    /// An address space that no VM has.
    #[error("slot {slot} was refused: a VM has address spaces 0 to {}", ADDRESS_SPACES - 1)]
    AddressSpace {
        /// The slot.
        slot: SlotId,
    },
    /// Pages past the slot's end.
    #[error(
        "{pages} pages from page {first_page} do not fit into slot {slot}, which has {slot_pages} pages"
    )]
    OutOfRange {
        /// The slot.
        slot: SlotId,
        /// The first page of the range.
        first_page: u64,
        /// The pages in the range.
        pages: u64,
        /// The pages in the slot.
        slot_pages: u64,
    },
    /// A page size that is no power of two, or an address that is no multiple of it.
    #[error(
        "pages of {page_bytes} bytes from address {address:#x} were refused: the size must be a power of two, and the \
         address a multiple of it"
    )]
    PageSize {
        /// The address of the first page.
        address: u64,
        /// The size of a page.
        page_bytes: u64,
    },
    /// The VMM's hook failed to protect the slot's pages anew. All of them are suspect now, because the slot may be
    /// unlogged.
    #[error(
        "the hook failed to protect slot {slot} anew, and all its pages are suspect: correct the cause and call it again"
    )]
    Protect {
        /// The slot.
        slot: SlotId,
        /// The hook's error.
        source: io::Error,
    },
    /// The VMM's hook failed to switch `KVM_MEM_LOG_DIRTY_PAGES`. The slot is not tracked now, and every sync reports
    /// all of it.
    #[error(
        "the hook failed to switch the dirty log of slot {slot}, and every sync reports all of it: correct the cause and call \
         it again"
    )]
    Switch {
        /// The slot.
        slot: SlotId,
        /// The hook's error.
        source: io::Error,
    },
    /// The ring of a vCPU is [broken](crate::VcpuStats::broken). Every sync reports every page, and protecting slots anew
    /// does not end that.
    #[error(
        "the dirty ring of vCPU {vcpu} is broken: every page stays suspect, as KVM may overrun the ring again; \
         migrate with the guest stopped, or copy all of its memory"
    )]
    BrokenRing {
        /// The vCPU's number, in the order in which vCPUs were attached.
        vcpu: usize,
    },
    /// The bitmap belongs to another slot.
    #[error(
        "the bitmap for slot {slot} belongs to slot {by}: finish the removal of that slot first"
    )]
    BitmapInUse {
        /// The slot to be added.
        slot: SlotId,
        /// The slot that has the bitmap.
        by: SlotId,
    },
    /// No memory for the slot's bits.
    #[error("no memory to track the {pages} pages of slot {slot}: free some and call it again")]
    NoMemory {
        /// The slot.
        slot: SlotId,
        /// Its pages.
        pages: u64,
    },
    /// The removal was cancelled by [`keep_slot`](crate::DirtyLog::keep_slot). The slot stays.
    #[error("the removal of slot {slot} was cancelled: begin again with `retire_slot`")]
    Kept {
        /// The slot.
        slot: SlotId,
    },
    /// The pass that a removal needs did not complete, or that an addition needs after entries of unknown slots. Call it
    /// again.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// Reading the kernel's bitmap of the slot failed. Call it again.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// KVM refused to switch `KVM_DIRTY_LOG_INITIALLY_SET` off. Where that is on, a slot whose log is switched on beside rings loses the
    /// first write to each page, so the log was not switched on.
    #[error(
        "slot {slot} might begin unprotected, because KVM_ENABLE_CAP failed (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 without \
         INITIALLY_SET): allow that ioctl, and call it again"
    )]
    InitiallySet {
        /// The slot.
        slot: SlotId,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// A map of guest memory, or a use of one, that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMapError {
    /// A region that no guest can have.
    #[error(
        "the region of slot {slot} with {pages} pages at {address:#x} was refused: a region starts at a page boundary, has \
         1 to {} pages, and ends before 2^64",
        MAX_SLOT_PAGES
    )]
    Region {
        /// The slot.
        slot: SlotId,
        /// Its guest address.
        address: u64,
        /// Its pages.
        pages: u64,
    },
    /// A slot has two regions.
    #[error("slot {slot} has two regions: name each slot once")]
    Twice {
        /// The slot.
        slot: SlotId,
    },
    /// Two regions overlap.
    #[error("the regions of slots {} and {} overlap: correct their addresses or sizes", slots[0], slots[1])]
    Overlap {
        /// The two, ascending by address.
        slots: [SlotId; 2],
    },
    /// Dirty pages of a slot are in no region. The map does not match the log.
    #[error(
        "dirty pages of slot {slot} are in no region of the map: make the map anew, with every slot of the log"
    )]
    Unmapped {
        /// The slot.
        slot: SlotId,
    },
    /// Ranges of no pages.
    #[error("ranges of at most 0 pages were requested: allow 1 or more")]
    NoPages,
}

/// A reset ioctl that failed. The pages of the pass are kept; the next pass whose reset completes publishes them.
#[derive(Debug, Clone, thiserror::Error)]
#[error("KVM_RESET_DIRTY_RINGS failed, and the pages are kept for the next reset")]
pub struct ResetError {
    /// The kernel's error, shared by all passes that the failed ioctl was to serve.
    #[source]
    pub(crate) source: Arc<io::Error>,
}

impl ResetError {
    /// Returns the kernel's error number, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// A full ring that got no room. The vCPU would leave the guest again at once.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FullError {
    /// The reset failed. The pages are kept. Call it again, a bounded number of times.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The kernel has overrun the ring, see [`VcpuStats::broken`](crate::VcpuStats::broken), and has recycled none of its
    /// entries since the call before. If the next call returns the same, this vCPU cannot enter the guest any more: stop
    /// the guest, or give the VM up.
    #[error(
        "KVM has overrun the dirty ring of vCPU {vcpu}, which cannot be emptied any more: stop the guest, as this vCPU \
         cannot run on"
    )]
    Broken {
        /// The vCPU's number, in the order in which vCPUs were attached.
        vcpu: usize,
    },
    /// Several calls in a row found no full ring. Neither these calls nor any other pass in between recycled entries of
    /// this ring, or next to none although nobody else had taken any. A ring that stops its vCPU is full. So this ring
    /// is another vCPU's or another VM's, the vCPU had not stopped for a full ring, or resets recycle nothing.
    #[error(
        "{calls} full exits of vCPU {vcpu} in a row found no full ring: check that its thread uses this vCPU's ring, of \
         this VM's log"
    )]
    NoRoom {
        /// The vCPU's number, in the order in which vCPUs were attached.
        vcpu: usize,
        /// The calls in a row.
        calls: u32,
    },
}

impl FullError {
    /// Returns the kernel's error number, if a reset failed with one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Reset(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

/// A kernel bitmap that could not be read in full. The bits that were read are kept and come with the next sync that
/// completes.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "reading the dirty bitmap of slot {slot} failed, and what was read is kept for the next sync"
)]
pub struct BitmapError {
    pub(crate) slot: SlotId,
    /// The kernel's error.
    #[source]
    pub(crate) source: Arc<io::Error>,
}

impl BitmapError {
    /// Returns the slot whose bitmap could not be read.
    pub fn slot(&self) -> SlotId {
        self.slot
    }

    /// Returns the kernel's error number, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// A sync that did not complete. Its pages come with the next one that does.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// A reset failed.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// A kernel bitmap could not be read in full.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// No memory for the list of dirty pages.
    #[error("no memory for the list of dirty pages: free some and sync again")]
    NoMemory,
}

/// A pacing policy that was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// It panicked. A program that is built with `panic = "abort"` has ended instead.
    #[error("the pacing policy panicked, and `Fixed` replaces it: correct the policy")]
    Panicked,
    /// It returned delays out of bounds, many times in a row.
    #[error(
        "the pacing policy keeps returning delays out of bounds, {asked:?} in the end, and `Fixed` replaces it: return \
         {SHORTEST_LOOK:?} to {LONGEST_LOOK:?}"
    )]
    OutOfBounds {
        /// The last delay that it returned.
        asked: Duration,
    },
}

/// A failure of a reaper. The reaper continues where it can, and the log loses nothing either way.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReaperError {
    /// The log has a reaper already.
    #[error("the log has a reaper already: stop it first")]
    Running,
    /// The thread could not be started.
    #[error("starting the reaper's thread failed: the process may have too many threads")]
    Spawn(#[source] Arc<io::Error>),
    /// A reset failed. The reaper continues at its policy's pace. While resets keep failing it tries less and less often,
    /// down to once a second.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The policy failed. The reaper continues with [`Fixed`](crate::pacing::Fixed), once a second.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The thread could not get the requested CPUs or priority.
    #[error(
        "{call} failed for the reaper's thread: grant the permission, or spawn it without CPUs or priority"
    )]
    Scheduling {
        /// The call.
        call: &'static str,
        /// The kernel's error.
        #[source]
        source: Arc<io::Error>,
    },
    /// The reaper's thread panicked and has ended. Full exits and syncs still empty the rings.
    #[error("the reaper panicked and has ended: drop it and spawn another")]
    Panicked,
    /// The timer of an [`EventReaper`](crate::EventReaper) could not be made or armed: a seccomp filter, or no descriptors are
    /// left.
    #[error("{call} failed for the reaper's timer")]
    Timer {
        /// The call.
        call: &'static str,
        /// The kernel's error.
        #[source]
        source: Arc<io::Error>,
    },
}

/// Why a VM was given no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// It has one.
    #[error("the VM is called {name:?} already: a log is given one name, once")]
    Named {
        /// The name that it keeps.
        name: String,
    },
}

/// A dirty limit that was refused. No limit has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// The kernel logs into bitmaps, which do not record which vCPU wrote.
    #[error(
        "a dirty limit needs rings, and this log is in bitmap mode: bitmaps do not record which vCPU wrote"
    )]
    Bitmap,
    /// There is no such vCPU.
    #[error("no vCPU {vcpu} is attached: there are {vcpus}, numbered from 0")]
    NoVcpu {
        /// The vCPU's number, in the order in which vCPUs were attached.
        vcpu: usize,
        /// The number of attached vCPUs.
        vcpus: usize,
    },
}

/// A failure of a [`Limiter`](crate::Limiter).
///
/// Limits still hold wherever vCPUs call [`on_full`](crate::VcpuRing::on_full) or
/// [`throttle`](crate::VcpuRing::throttle).
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LimiterError {
    /// The thread could not be started.
    #[error("starting the limiter's thread failed: the process may have too many threads")]
    Spawn(#[source] Arc<io::Error>),
    /// The thread could not get the requested priority.
    #[error(
        "{call} failed for the limiter's thread: grant the permission, or spawn it without a priority"
    )]
    Scheduling {
        /// The call.
        call: &'static str,
        /// The kernel's error.
        #[source]
        source: Arc<io::Error>,
    },
    /// The kick panicked, and the thread has ended.
    #[error(
        "the kick of a limiter panicked, and its thread has ended: correct the kick and spawn another"
    )]
    Panicked,
}
