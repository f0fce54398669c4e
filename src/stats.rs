//! What has happened so far, in numbers.

use core::num::NonZeroU64;

use crate::pass::Harvester;
use crate::vcpu::Vcpu;

/// Counts since the log was enabled. They go up only, but for `suspect_pages` and limits, and are
/// read one by one: passes under way may show in one and not yet in another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Passes begun, by the reaper, by full exits and by syncs.
    pub passes: u64,
    /// Entries harvested.
    pub entries: u64,
    /// Reset ioctls issued.
    pub resets: u64,
    /// Reset ioctls that recycled fewer entries than were marked: a signal was pending that cannot
    /// be blocked, or a ring was overrun. The pages concerned are reported by every sync until
    /// their slot is re-armed.
    pub short_resets: u64,
    /// Reset ioctls that failed.
    pub failed_resets: u64,
    /// Entries that named a slot which is not tracked. Each makes every page suspect.
    pub unknown_slot_entries: u64,
    /// Entries that named a page past the end of their slot. Each makes every page suspect.
    pub out_of_range_entries: u64,
    /// Times that a ring was found overrun. Each makes every page suspect.
    pub overruns: u64,
    /// Times that a slot's own bitmap could not be had from a kernel that should have it: the slot is
    /// not in KVM, is not logged there, or is larger than the log was told. Each reports all pages of
    /// the slot once.
    pub missing_bitmaps: u64,
    /// Pages under suspicion now, which every sync reports: after what the counts from
    /// `short_resets` on tell of, and until their slots are [re-armed](crate::DirtyLog::rearm).
    pub suspect_pages: u64,
    /// The vCPUs, in the order in which they were attached.
    pub vcpus: Vec<VcpuStats>,
}

/// Counts of one vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuStats {
    /// Entries harvested from its ring, or passed over after an overrun.
    pub entries: u64,
    /// Exits for a full ring.
    pub full_exits: u64,
    /// Time that the vCPU spent in [`on_full`](crate::VcpuRing::on_full), in nanoseconds.
    pub stall_ns: u64,
    /// Entries at which the kernel stops the vCPU: supposed, until a full exit has shown it.
    pub soft_limit: u64,
    /// Pages per second that the vCPU may dirty now; none: any number. See
    /// [`DirtyLog::set_dirty_limit`](crate::DirtyLog::set_dirty_limit).
    pub dirty_limit: Option<NonZeroU64>,
    /// Time that the vCPU slept for the sake of that limit, in nanoseconds, in sleeps that are
    /// over; none of it is in `stall_ns`.
    pub limited_ns: u64,
}

impl Stats {
    /// Exits for a full ring, of all vCPUs.
    pub fn full_exits(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.full_exits).sum()
    }

    pub(crate) fn read(harvester: &Harvester, missing_bitmaps: u64) -> Self {
        let counts = &harvester.counts;
        let gate = harvester.gate.stats();
        let layout = harvester.layout();
        Self {
            passes: counts.passes.get(),
            entries: counts.entries.get(),
            resets: gate.resets,
            short_resets: gate.short,
            failed_resets: gate.failed,
            unknown_slot_entries: counts.unknown_slot.get(),
            out_of_range_entries: counts.out_of_range.get(),
            overruns: counts.overruns.get(),
            missing_bitmaps,
            suspect_pages: layout.slots.slots().map(|slot| slot.suspects()).sum(),
            vcpus: layout.vcpus.iter().map(|v| VcpuStats::read(v)).collect(),
        }
    }
}

impl VcpuStats {
    fn read(vcpu: &Vcpu) -> Self {
        let counts = &vcpu.counts;
        Self {
            entries: vcpu.taken(),
            full_exits: counts.full_exits.get(),
            stall_ns: counts.stall_ns.get(),
            soft_limit: counts.soft_limit.get(),
            dirty_limit: vcpu.limit.get(),
            limited_ns: vcpu.limit.slept_ns.get(),
        }
    }
}
