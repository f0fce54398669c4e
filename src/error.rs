//! What can go wrong, one type for each family of calls.

use core::time::Duration;
use std::io;

use crate::slot_id::{ADDRESS_SPACES, MAX_SLOT_PAGES, SlotId};
use crate::sync::Arc;

/// The bounds of what a pacing policy may ask for, see [`pacing`](crate::pacing).
pub(crate) const SHORTEST_LOOK: Duration = Duration::from_micros(100);
pub(crate) const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// Why a number of ring entries was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingSizeError {
    /// Not a power of two.
    #[error("a dirty ring of {entries} entries: the number must be a power of two")]
    NotPowerOfTwo {
        /// What was asked for.
        entries: u32,
    },
    /// Too small for a page of the host, or for the entries that the kernel keeps in reserve.
    #[error("a dirty ring of {entries} entries is too small: at least {min} are needed here")]
    TooSmall {
        /// What was asked for.
        entries: u32,
        /// The smallest ring there is.
        min: u32,
    },
    /// More than the kernel offers.
    #[error("a dirty ring of {entries} entries is too large: this host allows at most {max}")]
    TooLarge {
        /// What was asked for.
        entries: u32,
        /// The largest ring there is.
        max: u32,
    },
}

/// Why a host cannot offer dirty rings at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// No `/dev/kvm`, or no driver behind it.
    #[error("no KVM on this host: load a kvm module, or enable virtualisation in the firmware")]
    NoKvm(#[source] io::Error),
    /// `/dev/kvm` may not be opened by this process.
    #[error("no permission to open /dev/kvm: join its group, or run as a user who may")]
    NoPermission(#[source] io::Error),
    /// An API that is not the stable one.
    #[error("KVM API version {found} instead of 12, the only stable one")]
    ApiVersion {
        /// What `KVM_GET_API_VERSION` returned.
        found: i32,
    },
    /// The kernel has no dirty ring that this architecture may use.
    #[error(
        "this kernel has no dirty rings for this architecture (Linux 5.11 on x86, 6.2 on arm64)"
    )]
    NoDirtyRing,
    /// A call failed for a reason of its own.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl, or other call.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Why the dirty log of a VM could not be enabled. The VM is as it was, but with
/// [`SlotExists`](Self::SlotExists).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// The size is wrong for this host.
    #[error(transparent)]
    RingSize(#[from] RingSizeError),
    /// The file descriptor is not that of a KVM virtual machine.
    #[error("the file descriptor is not a KVM virtual machine's")]
    NotAVm,
    /// The kernel has no dirty ring that this architecture may use.
    #[error(
        "this kernel has no dirty rings for this architecture (Linux 5.11 on x86, 6.2 on arm64)"
    )]
    NoDirtyRing,
    /// The rings of this VM are enabled already; KVM allows that once.
    #[error("the dirty rings of this VM are enabled already: KVM allows it once in a VM's life")]
    AlreadyEnabled,
    /// A vCPU exists already. The rings asked for are the largest that the host has: no size would do.
    #[error(
        "KVM refused the dirty rings, as it does once a vCPU exists: enable them before the first"
    )]
    VcpuExists,
    /// A vCPU exists already, or the kernel keeps more entries in reserve than so small a ring has, as a kernel may
    /// that is newer than this crate: KVM answers both alike. If there is no vCPU, larger rings will do.
    #[error(
        "KVM refused dirty rings of {entries} entries, as it does once a vCPU exists, and where it keeps as many in \
         reserve: enable them before the first vCPU; if there is none, take larger rings"
    )]
    VcpuOrReserve {
        /// Entries of each ring.
        entries: u32,
    },
    /// A vCPU exists already, or the rings are enabled already and a memslot exists: on a host whose rings have
    /// [bitmaps beside them](crate::HostSupport::with_bitmap) KVM answers both alike; and alike where the kernel keeps more
    /// in reserve than the rings have.
    #[error(
        "KVM refused the dirty rings, as it does once a vCPU exists, for a second time, and where they are smaller than \
         its reserve: enable them once, before the first vCPU and the first memslot; if that is so, take larger ones"
    )]
    TooLate,
    /// A memslot exists already, on a host whose rings have [bitmaps beside
    /// them](crate::HostSupport::with_bitmap). The VM has rings by now, for good, and what the kernel
    /// writes without a vCPU would be lost: make another VM.
    #[error(
        "KVM refused the bitmaps beside the dirty rings, as it does once a memslot exists: enable the \
         log of a new VM before the first"
    )]
    SlotExists,
    /// The VMM switched on manual protection with all pages initially set.
    #[error(
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is on with INITIALLY_SET, which loses pages beside dirty \
         rings: don't enable it for this VM"
    )]
    InitiallySet,
    /// A call failed for a reason of its own.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl, or other call.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Why a vCPU's ring could not be attached. The log is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The ring could not be mapped: is this the fd of a vCPU of this VM?
    #[error("mapping the dirty ring failed: is this a vCPU of the VM whose rings were enabled?")]
    Map(#[source] io::Error),
    /// The log does not rest on a VM's file descriptor.
    #[error("the log has a kernel of its own, not a KVM VM's: attach rings by `attach_ring`")]
    NotKvm,
    /// The log reads bitmaps, and the vCPU has a ring: what it writes is in there, and in no bitmap.
    #[error(
        "the vCPU has a dirty ring, and the log reads bitmaps, which don't have what it writes: attach it to \
         the log that enabled the rings"
    )]
    HasRing,
    /// The vCPU's ring is attached already, and its [`VcpuRing`](crate::VcpuRing) still there.
    #[error("the vCPU's ring is attached already: drop its VcpuRing before attaching it again")]
    Twice,
    /// The ring's size is not the one that the log was made for.
    #[error("a ring of {found} entries, but the VM's have {expected}")]
    Size {
        /// Entries of the ring.
        found: u32,
        /// Entries of every ring of the VM.
        expected: u32,
    },
}

/// Why a call about a memslot was refused, or did not succeed. Nothing has changed, unless the variant
/// says otherwise; [`rearm`](crate::DirtyLog::rearm) goes from slot to slot, and those before the one
/// named are done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The id is in use.
    #[error("slot {slot} is tracked already")]
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
    /// No such slot.
    #[error("slot {slot} is not tracked: add it before it is created in KVM")]
    Unknown {
        /// The slot.
        slot: SlotId,
    },
    /// A size that no slot can have.
    #[error(
        "slot {slot} of {pages} pages: a slot has 1 to {} pages",
        MAX_SLOT_PAGES
    )]
    Pages {
        /// The slot.
        slot: SlotId,
        /// What was asked for.
        pages: u64,
    },
    /// An address space that no VM has.
    #[error("slot {slot}: a VM has address spaces 0 to {}", ADDRESS_SPACES - 1)]
    AddressSpace {
        /// The slot.
        slot: SlotId,
    },
    /// Pages past the slot's end.
    #[error(
        "pages {first_page} to {first_page} + {pages} are not in slot {slot}, which has {slot_pages}"
    )]
    OutOfRange {
        /// The slot.
        slot: SlotId,
        /// The first page named.
        first_page: u64,
        /// How many were named.
        pages: u64,
        /// How many there are.
        slot_pages: u64,
    },
    /// A page size, or the address of such a page, that no log by guest address can have.
    #[error(
        "pages of {page_bytes} bytes from address {address:#x}: the size is a power of two, and the address a multiple of it"
    )]
    PageSize {
        /// The address of the first page.
        address: u64,
        /// The size of a page.
        page_bytes: u64,
    },
    /// The VMM could not have the slot's pages protected anew: all of them are suspect now, as the slot
    /// need not be logged any more.
    #[error("slot {slot} could not be protected anew, all its pages are suspect")]
    Protect {
        /// The slot.
        slot: SlotId,
        /// The hook's error.
        source: io::Error,
    },
    /// The VMM could not switch `KVM_MEM_LOG_DIRTY_PAGES`: the slot is not tracked now, and every sync
    /// reports all of it.
    #[error("the dirty log of slot {slot} could not be switched")]
    Switch {
        /// The slot.
        slot: SlotId,
        /// The hook's error.
        source: io::Error,
    },
    /// The ring of a vCPU is [broken](crate::VcpuStats::broken): every sync reports every page, and protecting
    /// slots anew cannot end that.
    #[error(
        "the dirty ring of vCPU {vcpu} is broken: every page stays suspect, as KVM may overrun the ring again; \
         migrate with the guest stopped, or copy all of its memory"
    )]
    BrokenRing {
        /// The vCPU, by its place in the order in which they were attached.
        vcpu: usize,
    },
    /// The bitmap is another slot's.
    #[error("slot {slot}: the bitmap is that of slot {by}, whose removal must be finished first")]
    BitmapInUse {
        /// The slot to be added.
        slot: SlotId,
        /// The slot that has the bitmap.
        by: SlotId,
    },
    /// No memory for the slot's bits.
    #[error("no memory to track the {pages} pages of slot {slot}")]
    NoMemory {
        /// The slot.
        slot: SlotId,
        /// Its pages.
        pages: u64,
    },
    /// The removal was called off: the slot stays.
    #[error("the removal of slot {slot} was called off")]
    Kept {
        /// The slot.
        slot: SlotId,
    },
    /// The pass that a removal needs, or an addition after entries of slots that are not tracked, did not
    /// complete; try again.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The kernel's own bits of the slot could not all be taken; try again.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}

/// Why a map of guest memory was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMapError {
    /// A region that no guest can have.
    #[error(
        "slot {slot}, {pages} pages at {address:#x}: a region begins at a page's begin, has 1 to {} \
         pages, and ends before 2^64",
        MAX_SLOT_PAGES
    )]
    Region {
        /// The slot.
        slot: SlotId,
        /// Where it was to begin.
        address: u64,
        /// The pages that it was to have.
        pages: u64,
    },
    /// A slot has two regions.
    #[error("slot {slot} has two regions")]
    Twice {
        /// The slot.
        slot: SlotId,
    },
    /// Two regions have addresses in common.
    #[error("slots {} and {} overlap", slots[0], slots[1])]
    Overlap {
        /// The two, ascending by address.
        slots: [SlotId; 2],
    },
    /// Dirty pages of a slot are in no region: the map is not that of the log.
    #[error(
        "dirty pages of slot {slot} are in no region of the map, which is not that of the log: make it anew"
    )]
    Unmapped {
        /// The slot.
        slot: SlotId,
    },
    /// Ranges of no pages.
    #[error("ranges of at most 0 pages: 1 or more are allowed")]
    NoPages,
}

/// A reset ioctl failed. The pages of the pass are kept, and the next one that completes a reset
/// publishes them.
#[derive(Debug, Clone, thiserror::Error)]
#[error("KVM_RESET_DIRTY_RINGS failed")]
pub struct ResetError {
    /// The kernel's error; shared by all passes that the failed ioctl was to serve.
    #[source]
    pub(crate) source: Arc<io::Error>,
}

impl ResetError {
    /// The kernel's error number, where it gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// Why a full ring was not given any room. The vCPU would leave the guest at once again.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FullError {
    /// The reset failed. The pages are kept; try again, but not without end.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The kernel has overrun the ring, see [`VcpuStats::broken`](crate::VcpuStats::broken), and nothing of it was
    /// recycled since the call before. Where the next call says so again, this vCPU has no way back into the guest:
    /// stop the guest, or give the VM up.
    #[error(
        "the dirty ring of vCPU {vcpu} is broken, as KVM has overrun it, and can't be emptied any more: the vCPU \
         can't run on"
    )]
    Broken {
        /// The vCPU, by its place in the order in which they were attached.
        vcpu: usize,
    },
    /// In several calls in a row nothing of this ring was recycled, by the call or by any other pass since the one
    /// before, or next to nothing though nobody else had taken any. A ring that stops its vCPU is full: so this is
    /// another vCPU's ring or another VM's, the vCPU had not stopped for it, or resets recycle nothing.
    #[error(
        "{calls} full exits of vCPU {vcpu} in a row have found no full ring: is it the ring of another vCPU, or is \
         the log that of another VM?"
    )]
    NoRoom {
        /// The vCPU, by its place in the order in which they were attached.
        vcpu: usize,
        /// How many calls there were.
        calls: u32,
    },
}

impl FullError {
    /// The kernel's error number, where a reset failed with one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Reset(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

/// The kernel's own bits of a slot could not all be taken. Those that were are kept, and come with the
/// next sync that completes.
#[derive(Debug, Clone, thiserror::Error)]
#[error("taking the dirty bitmap of slot {slot} failed")]
pub struct BitmapError {
    pub(crate) slot: SlotId,
    /// The kernel's error.
    #[source]
    pub(crate) source: Arc<io::Error>,
}

impl BitmapError {
    /// The slot.
    pub fn slot(&self) -> SlotId {
        self.slot
    }

    /// The kernel's error number, where it gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// Why a sync did not complete. Nothing is lost: its pages come with the next one that does.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// A reset failed.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The kernel's own bits of a slot could not all be taken.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// No memory for the list of dirty pages.
    #[error("no memory for the dirty pages")]
    NoMemory,
}

/// Why a pacing policy was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// It panicked. A program that is built with `panic = "abort"` has ended instead.
    #[error("the pacing policy panicked")]
    Panicked,
    /// It asked for times out of bounds, many times in a row.
    #[error(
        "the pacing policy keeps asking for looks out of bounds, {asked:?} apart in the end: {SHORTEST_LOOK:?} to {LONGEST_LOOK:?} \
         are allowed"
    )]
    OutOfBounds {
        /// What it asked for last.
        asked: Duration,
    },
}

/// What went wrong with a reaper. It goes on wherever it can; the log loses nothing either way.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReaperError {
    /// The log has a reaper already.
    #[error("the log has a reaper already: stop it first")]
    Running,
    /// The thread could not be started.
    #[error("starting the reaper's thread failed")]
    Spawn(#[source] Arc<io::Error>),
    /// A reset failed. The reaper goes on at its policy's pace; where one after another fails, more and more slowly, down to
    /// once a second.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The policy failed. The reaper goes on with [`Fixed`](crate::pacing::Fixed), once a second.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The thread could not be given the place or the priority that were asked for.
    #[error("{call} failed for the reaper's thread")]
    Scheduling {
        /// The call.
        call: &'static str,
        /// The kernel's error.
        #[source]
        source: Arc<io::Error>,
    },
    /// The reaper itself panicked, and has ended. Full exits and syncs still empty the rings.
    #[error("the reaper panicked")]
    Panicked,
}

/// Why a vCPU's dirty limit was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// The kernel logs into bitmaps, which do not record which vCPU wrote.
    #[error(
        "a dirty limit takes rings, and this log is in bitmap mode: bitmaps do not record which vCPU wrote"
    )]
    Bitmap,
    /// There is no such vCPU.
    #[error("there is no vCPU {vcpu} to limit: {vcpus} are attached, numbered from 0")]
    NoVcpu {
        /// The vCPU, by its place in the order in which they were attached.
        vcpu: usize,
        /// How many are attached.
        vcpus: usize,
    },
}

/// What went wrong with a [`Limiter`](crate::Limiter). Limits hold all the same wherever vCPUs come
/// to [`on_full`](crate::VcpuRing::on_full) or [`throttle`](crate::VcpuRing::throttle).
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LimiterError {
    /// The thread could not be started.
    #[error("starting the limiter's thread failed")]
    Spawn(#[source] Arc<io::Error>),
    /// The thread could not be given the priority that was asked for.
    #[error("{call} failed for the limiter's thread")]
    Scheduling {
        /// The call.
        call: &'static str,
        /// The kernel's error.
        #[source]
        source: Arc<io::Error>,
    },
    /// The kick panicked, and the thread has ended.
    #[error("the kick of a limiter panicked")]
    Panicked,
}
